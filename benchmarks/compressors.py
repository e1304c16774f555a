#!/usr/bin/env python3
"""Encode and decode speed of the compressors on one core, as fractions of a plain copy in the same run.

    python benchmarks/compressors.py                      # the defaults, every instruction set
    python benchmarks/compressors.py --specs topk:sparsity=0.999 --numel 1000000
    python benchmarks/compressors.py --specs polar:rate=0.25 polar:rate=0.25,rank=0 --layer 1024x1024

Speeds are GB/s of float32 input, each the best of --repeat runs through the public API,
payload allocation included (from 32 MB up the C library takes fresh pages from the kernel
each time, which costs more than a cast: hence the default --numel); "both/copy" is the time
of a copy, measured in turns with them, over that of encoding plus decoding. torch.topk stands
for selection alone (values of |x|, unsorted), the torch reference for the readable definition
of the same bytes.

    python benchmarks/compressors.py --device cuda

measures the kernels of the GPU instead, by CUDA events, at --numel 2^26: GB/s of float32 input, and each
as a fraction of a copy on the device ("enc/copy", "dec/copy", "add/copy"; a copy reads and writes the tensor once).
"""

import argparse
import sys
import time

import torch
from example_specs import with_every_method

from gcompress import TopK, backends, from_spec
from gcompress.backends import gpu

SPECS = [
    "sign",
    "onebit",
    "bf16",
    "fp16",
    "fp8",
    "mxfp4",
    "eden:bits=0.5",
    "eden:bits=1",
    "eden:bits=2",
    "eden:bits=4",
    "eden:bits=8",
    "qsgd:bits=4",
    "ternary",
    "ternary:rounding=nearest,bucket=1024",
    "natural",
    "quantize:bits=8",
    "quantize:bits=4",
    "quantize:bits=4,rounding=stochastic",
    "quantize:bits=2",
    "quantize:bits=1",
    "topk:sparsity=0.99",
    "topk:sparsity=0.999",
    "mask:sparsity=0.99,bits=2",
    "mask:sparsity=0.99,bits=2,signed=false",
    "mask:sparsity=0.99,bits=1",
    "mask:sparsity=0.99,bits=2,levels=lloyd",
    "threshold:threshold=2.5",
    "chain:(topk:sparsity=0.99),(quantize:bits=4)",
    "hybrid:(topk:sparsity=0.999),(quantize:bits=2)",
    "entropy:(quantize:bits=4)",
    "entropy:(quantize:bits=2)",
    "shared:bits=4",
    "shared:bits=4,rounding=stochastic",
    "lowrank:rank=4",
    "polar:rate=0.25",
    "polar:rate=0.5",
    "polar:rate=1.0",
    "polar:rate=2.0",
]


def best_seconds(repeat, *functions):
    """The best time of each function, taking turns, so that all meet the same noise."""
    best = [float("inf")] * len(functions)
    for turn in range(repeat + 1):
        for number, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn > 0:  # the first touches the memory
                best[number] = min(best[number], time.perf_counter() - start)
    return best


def sides(text):
    """(rows, columns) from "ROWSxCOLUMNS"."""
    rows, columns = map(int, text.split("x"))
    return rows, columns


def entries(arguments):
    """Normal entries; for a layer its strongest directions too."""
    generator = torch.Generator().manual_seed(0)
    if not arguments.layer:
        return torch.randn(arguments.numel, generator=generator)
    rows, columns = arguments.layer
    directions = torch.randn(rows, 8, generator=generator) * 0.7 ** torch.arange(8)
    return directions @ torch.randn(8, columns, generator=generator) + torch.randn(rows, columns, generator=generator)


def width_of(specs):
    """Of the table's first column."""
    return max(len("compressor"), *(len(str(from_spec(spec))) for spec in specs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=with_every_method(SPECS), metavar="SPEC", help="what to measure")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what to measure (default cpu)")
    parser.add_argument("--numel", type=int, help="entries of the tensor (default 2^23, on a GPU 2^26)")
    parser.add_argument(
        "--layer",
        type=sides,
        metavar="ROWSxCOLUMNS",
        help="a matrix: eight outer products of falling strength, and noise",
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the best counts (default 5)")
    parser.add_argument("--backends", nargs="+", choices=backends.available_backends(), help="default: all native ones")
    parser.add_argument("--no-reference", action="store_true", help="leave the slow torch reference out")
    arguments = parser.parse_args()
    arguments.numel = arguments.numel or (2**26 if arguments.device == "cuda" else 2**23)
    if arguments.device == "cuda":
        return on_device(arguments)
    torch.set_num_threads(1)
    tensor = entries(arguments)
    arguments.numel = tensor.numel()
    out = torch.empty_like(tensor)
    size = 4 * arguments.numel / 1e9
    (copy,) = best_seconds(arguments.repeat, lambda: out.copy_(tensor))
    k = max(1, round(arguments.numel * 0.01))
    (select,) = best_seconds(2, lambda: torch.topk(tensor.abs().view(-1), k, sorted=False))
    print(f"plain copy {size / copy:.2f} GB/s, torch.topk at 1 % {size / select:.3f} GB/s, {arguments.numel} entries")
    width = width_of(arguments.specs)
    print(f"{'compressor':{width}} {'backend':10} {'bits':>6} {'encode':>7} {'decode':>7} {'both/copy':>9}  vs torch")
    chosen = arguments.backends or backends.available_backends()[1:] or ["reference"]
    for compressor in map(from_spec, arguments.specs):
        bits = 8 * compressor.compress(tensor)[0].numel() / arguments.numel  # nbytes may be a bound
        reference = None if arguments.no_reference else measure("reference", compressor, tensor, out, 1)
        for backend in chosen:
            copy, encode, decode = measure(backend, compressor, tensor, out, arguments.repeat)
            both = encode + decode
            notes = [f"{sum(reference[1:]) / both:.0f}x the reference"] if reference else []
            if isinstance(compressor, TopK):
                notes.append(f"{select / both:.1f}x torch.topk")
            print(
                f"{compressor!s:{width}s} {backend:10s} {bits:6.3f} {size / encode:7.2f} {size / decode:7.2f} "
                f"{copy / both:9.3f}  {', '.join(notes)}",
                flush=True,
            )


def measure(backend, compressor, tensor, out, repeat):
    """Seconds of a copy, of encoding and of decoding."""
    with backends.use_backend(backend):
        payload, _ = compressor.compress(tensor)
        return best_seconds(
            repeat,
            lambda: out.copy_(tensor),
            lambda: compressor.compress(tensor),
            lambda: compressor.decode_into(payload, out.view(-1)),
        )


def on_device(arguments):
    """The table of a GPU; returns the exit code."""
    active, reason = gpu.status()
    if not active:
        print(f"no kernels for a GPU: {reason}", file=sys.stderr)
        return 2
    print(f"{reason}, torch {torch.__version__}")
    tensor = entries(arguments).cuda()
    arguments.numel = tensor.numel()
    out, size = torch.empty_like(tensor), 4 * arguments.numel / 1e9
    (copy,) = best_event_seconds(arguments.repeat, lambda: out.copy_(tensor))
    print(f"plain copy {size / copy:.0f} GB/s of input, {2 * size / copy:.0f} GB/s moved, {arguments.numel} entries")
    heads = ("encode", "decode", "add", "enc/copy", "dec/copy", "add/copy")
    width = width_of(arguments.specs)
    print(f"{'compressor':{width}s} {'bits':>6s} " + " ".join(f"{head:>8s}" for head in heads))
    for compressor in map(from_spec, arguments.specs):
        if backends.kernels(tensor, compressor) is None:
            print(f"{compressor!s:{width}s} has no kernels: the torch reference runs")
            continue
        payload, _ = compressor.compress(tensor)
        seconds = best_event_seconds(
            arguments.repeat,
            lambda c=compressor: c.compress(tensor),
            lambda c=compressor, p=payload: c.decode_into(p, out.view(-1)),
            lambda c=compressor, p=payload: c.decode_into(p, out.view(-1), add=True),
        )
        speeds = " ".join(f"{size / part:8.1f}" for part in seconds)
        fractions = " ".join(f"{copy / part:8.3f}" for part in seconds)
        print(f"{compressor!s:{width}s} {8 * payload.numel() / arguments.numel:6.3f} {speeds} {fractions}", flush=True)
    return 0


def best_event_seconds(repeat, *functions):
    """`best_seconds` by the device's own clock.

    Each time is that of several calls, so that launches overlap with work: ten, or as many as take a tenth of a second.
    """
    best, calls = [float("inf")] * len(functions), [1] * len(functions)
    for turn in range(repeat + 2):
        for number, function in enumerate(functions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls[number]):
                function()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3 / calls[number]
            if turn == 1:  # the first compiles, and fills the allocator's cache
                calls[number] = max(1, min(10, int(0.1 / seconds)))
            elif turn > 1:
                best[number] = min(best[number], seconds)
    return best


if __name__ == "__main__":
    sys.exit(main())
