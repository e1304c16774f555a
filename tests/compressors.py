"""The compressors and inputs that every law in tests/ is run on."""

import torch

from gcompress import REGISTRY, PayloadError, from_spec

# At least one spec of every method in the registry (test_compressor_laws.py checks that none is missing).
SPECS = [
    "quantize:bits=4",
    "quantize:bits=1",
    "quantize:bits=2,rounding=stochastic",
    "quantize:bits=1,rounding=stochastic",
    "quantize:bits=3,bucket=8",
    "quantize:bits=5,bucket=0",
    "quantize:bits=6,bucket=136",
    "quantize:bits=7",
    "quantize:bits=8,bucket=0,rounding=stochastic",
    "topk:sparsity=0.99",
    "topk:sparsity=0.9999",
    "topk:sparsity=0.5",
    "topk:sparsity=0.0",
    "topk:sparsity=0.9,index=fixed",
    "topk:sparsity=0.9,index=bitmap",
    "topk:sparsity=0.5,index=gaps",
    "mask:sparsity=0.99,bits=2",
    "mask:sparsity=0.99,bits=1",
    "mask:sparsity=0.9,bits=3",
    "mask:sparsity=0.5,bits=5",
    "mask:sparsity=0.99,bits=8",
    "mask:sparsity=0.0,bits=2",
    "mask:sparsity=0.99,bits=2,signed=false",
    "mask:sparsity=0.9,bits=4,signed=false",
    "mask:sparsity=0.99,bits=2,levels=lloyd",
    "mask:sparsity=0.9,bits=3,signed=false,levels=lloyd",
    "mask:sparsity=0.9,bits=6,levels=lloyd",
    "sign",
    "sign:bucket=64",
    "sign:bucket=4160",
    "onebit",
    "onebit:bucket=0",
    "bf16",
    "fp16",
    "fp16:bucket=0",
    "fp8",
    "fp8:bucket=64",
    "mxfp4",
    "mxfp4:bucket=16",
    "randomk:sparsity=0.99",
    "randomk:sparsity=0.4",
    "randomk:sparsity=0.0",
    "randomk:sparsity=0.9,unbiased=true",
    "threshold:threshold=2.0",
    "threshold:threshold=1e-05",
    "threshold:threshold=0.3,relative=true",
    "chain:(topk:sparsity=0.99),(quantize:bits=4)",
    "shared:bits=4",
    "shared:bits=2,bucket=100",
    "shared:bits=7,bucket=0,rounding=stochastic",
    "shared:bits=8",
    "lowrank:rank=4",
    "lowrank:rank=1",
    "entropy:(quantize:bits=4)",
    "entropy:(quantize:bits=3,bucket=0,rounding=stochastic)",
    "entropy:(topk:sparsity=0.9)",
    "entropy:(hybrid:(topk:sparsity=0.99),(mask:sparsity=0.99,bits=5))",
    "chain:(topk:sparsity=0.5),(entropy:(quantize:bits=2))",
    "chain:(mask:sparsity=0.9,bits=2),(quantize:bits=8,bucket=0)",
    "chain:(quantize:bits=4,bucket=64),(quantize:bits=8)",
    "chain:(randomk:sparsity=0.9,unbiased=true),(quantize:bits=2,rounding=stochastic)",
    "hybrid:(topk:sparsity=0.999),(quantize:bits=2)",
    "hybrid:(threshold:threshold=3.0),(quantize:bits=1)",
    "hybrid:(topk:sparsity=0.99),(chain:(topk:sparsity=0.5),(quantize:bits=3,rounding=stochastic))",
    "polar:rate=0.5",
    "polar:rate=0.1,block=1024,scales=tensor,floor=0",
    "polar:rate=1.0,scales=chunk",
    "polar:rate=2.5,allocation=flat",
    "polar:rate=4,block=256",
    "polar:rate=1.0,block=256,list_size=4",
    "polar:rate=0.3,block=256,list_size=8,floor=0",
    "polar:rate=0.5,outliers=0.0,floor=0",
    "polar:rate=2.0,block=1024,outliers=0.02",
    "polar:rate=1.0,unbiased=true",
    "polar:rate=0.2,block=512,unbiased=true,floor=0",
    "eden:bits=1",
    "eden:bits=1,scale=unbiased",
    "eden:bits=2,block=1024",
    "eden:bits=4",
    "eden:bits=5,block=16384",
    "eden:bits=8,block=64",
    "eden:bits=0.5",
    "eden:bits=0.1,scale=unbiased,block=256",
    "qsgd:bits=4",
    "qsgd:bits=2,bucket=0",
    "qsgd:bits=8,bucket=64,norm=max",
    "ternary",
    "ternary:clip=0.0,bucket=64",
    "ternary:rounding=nearest,bucket=1024",
    "natural",
]
COMPRESSORS = [from_spec(spec) for spec in SPECS]
MISSING = set(REGISTRY) - {compressor.name for compressor in COMPRESSORS}


def fits(compressor, payload, numel):
    """Whether a payload has the size that the compressor promises."""
    if compressor.fixed_size or numel == 0:
        return payload.shape == (compressor.nbytes(numel),)
    return payload.numel() == compressor.payload_nbytes(payload, numel) <= compressor.nbytes(numel)


LARGEST = torch.finfo(torch.float32).max
SIZES = (1, 2, 7, 63, 64, 65, 127, 128, 129, 1023, 1024, 8200, 70001)


def inputs(numel, seed=0):
    """{name: float32 tensor of numel entries}: what gradients and activations look like, and what breaks codecs."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(numel, generator=generator)
    return {
        "gauss": gauss,
        "heavy": torch.exp(1.5 * torch.randn(numel, generator=generator)) * gauss.sign(),
        "relu": gauss.relu(),
        "ties": torch.randint(-3, 4, (numel,), generator=generator).float(),
        "zero": torch.zeros(numel),
        "constant": torch.full((numel,), 0.3),
        "negative": -gauss.abs(),
        "one entry": torch.nn.functional.one_hot(torch.tensor(numel // 2), numel).float(),
        "denormal": gauss * 1e-40,
        "smallest normal": gauss.sign() * torch.finfo(torch.float32).tiny,
        "huge": gauss.clamp(-1.5, 1.5) * 1e38,
        "minus zero": -torch.zeros(numel),
        "largest": gauss.sign() * LARGEST,
        "near largest": torch.where(gauss.abs() > 0.7, gauss.sign() * (0.3 + gauss.abs() % 0.7) * LARGEST, gauss),
    }


def poisoned(numel, seed=0):
    """{name: tensor} with entries that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(numel, generator=generator)

    def with_value(position, value):
        tensor = gauss.clone()
        tensor[position] = value
        return tensor

    return {
        "one nan": with_value(numel // 2, float("nan")),
        "one inf": with_value(numel // 3, float("inf")),
        "one -inf": with_value(numel - 1, -float("inf")),
        "all nan": torch.full((numel,), float("nan")),
        "many": torch.where(gauss > 0, float("inf"), gauss),
    }


def refusals(compressor, payload, ctx, positions):
    """How many payloads with a random byte at one of these positions are refused; all others must decode."""
    generator, refused = torch.Generator().manual_seed(1), 0
    for position in positions:
        damaged = payload.clone()
        damaged[position] = torch.randint(0, 256, (), generator=generator)
        try:
            compressor.decompress(damaged, ctx)
        except PayloadError:
            refused += 1
    return refused
