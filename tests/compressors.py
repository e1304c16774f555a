"""The compressors and inputs that every law in tests/ is run on."""

import os

import torch

from gcompress import PayloadError, from_spec, methods

ONLY = os.environ.get("TEST_METHOD")  # run the laws on one method
SPECS = [spec for name in sorted(methods()) if ONLY in (None, name) for spec in methods()[name].examples]
COMPRESSORS = [from_spec(spec) for spec in SPECS]
MISSING = set() if ONLY else set(methods()) - {compressor.name for compressor in COMPRESSORS}


def fits(compressor, payload, numel):
    """Whether a payload has the size that the compressor promises."""
    if compressor.fixed_size or numel == 0:
        return payload.shape == (compressor.nbytes(numel),)
    return payload.numel() == compressor.payload_nbytes(payload, numel) <= compressor.nbytes(numel)


LARGEST = torch.finfo(torch.float32).max
SIZES = (1, 2, 7, 63, 64, 65, 127, 128, 129, 1023, 1024, 8200, 70001)


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_or_nan(one, other):
    """Whether all entries are equal, or NaN in both."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


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
