#!/usr/bin/env python3
"""The whole way of a gradient on one rank of several, in copies of the gradient: what training pays beside the wire.

    python benchmarks/exchange_path.py                                  # every method, 8 layers of 1024 x 1024, 4 ranks
    python benchmarks/exchange_path.py --methods quantize:bits=4@twophase polar:rate=0.25,rank=0@allgather

A method is a spec, or SPEC@EXCHANGE. All is measured in one run on one core. What is compared is
measured in turns, since a machine's speed changes from one second to the next; each figure is the
median of --repeat:

bits   bits for an entry that leave this rank on the link, both rounds of two-phase together.
path   one rank's step with `GradientExchange`: correct by what is remembered, encode, sum (of its own pieces, if
       two-phase), encode again, decode, apply what is remembered; in copies of the gradients. The wire is not real:
       every other rank sends what this one does, and the time that this takes is left out.
codec  encoding and decoding every layer once, by the compressor alone; in copies.
ratio  path over codec.
fp16, bf16
       Gbit/s of each rank's link up to which the method's step, this path and the bytes on the link, takes less time
       than an all-reduce of 16-bit floats by torch (its own path: the casts). "all": at any speed; "none": at none.
us     microseconds of the path for a tensor of --small entries, one of 300 in a step.

With --device cuda the gradients lie on a GPU, and times are between two points at which it has nothing left to do.
"""

import argparse
import functools
import statistics
import sys

import torch
from example_specs import with_every_method

from gcompress import ConfigError, Policy
from gcompress.forecast.mirror import MirroredPath, moment, shortest

METHODS = [
    "quantize:bits=4@twophase",
    "quantize:bits=4@allgather",
    "sign@twophase",
    "onebit@twophase",
    "bf16@twophase",
    "fp16@twophase",
    "fp8@twophase",
    "mxfp4@twophase",
    "qsgd:bits=4@twophase",
    "natural@twophase",
    "topk:sparsity=0.99@allgather",
    "mask:sparsity=0.99,bits=2@twophase",
    "eden:bits=1@twophase",
    "polar:rate=0.25@twophase",
    "polar:rate=0.25,rank=0@twophase",
]
SMALL_TENSORS = 300
HALVES = (torch.float16, torch.bfloat16)


def path_of(method, gradients, ranks):
    """The MirroredPath of "SPEC@EXCHANGE"."""
    spec, _, exchange = method.partition("@")
    return MirroredPath(Policy(spec, exchange=exchange or "auto", min_numel=0), gradients, ranks)


def layers(count, side, device):
    """{name: matrix} as gradients are: a few strong directions, and noise."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number in range(count):
        directions = torch.randn(side, 8, generator=generator) * 0.7 ** torch.arange(8)
        noise = torch.randn(side, side, generator=generator)
        matrix = 1e-3 * (directions @ torch.randn(8, side, generator=generator) + noise)
        made[f"layer{number}"] = matrix.to(device)
    return made


def pays_up_to(seconds, nbytes, other_seconds, other_nbytes):
    """Gbit/s up to which a step of these seconds and bytes is faster than another one, as a text."""
    later, fewer = seconds - other_seconds, other_nbytes - nbytes
    if later <= 0 or fewer <= 0:
        return "all" if later <= 0 <= fewer else "none" if later >= 0 >= fewer else "above"
    return f"{8 * fewer / later / 1e9:.2f}"


def cast_back(gradients, dtype):
    for gradient in gradients.values():
        gradient.to(dtype).to(torch.float32)


def in_turns(repeat, device, step, functions):
    """The median seconds of what `step` returns, and of each function, called one after the other, `repeat` times."""
    rows = []
    for _ in range(repeat + 2):  # memory begins in the first two
        row = [step()]
        for function in functions:
            start = moment(device)
            function()
            row.append(moment(device) - start)
        rows.append(row)
    return [statistics.median(column) for column in zip(*rows[2:], strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="SPEC or SPEC@EXCHANGE (default: every method)")
    parser.add_argument("--ranks", type=int, default=4, help="how many there are (default 4)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where the gradients lie: cpu or cuda")
    parser.add_argument("--layers", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--side", type=int, default=1024, help="of a layer's matrix (default 1024)")
    parser.add_argument("--small", type=int, default=2048, help="entries of a small tensor (default 2048)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds of which the median counts (default 9)")
    arguments = parser.parse_args()
    if min(arguments.ranks, arguments.layers, arguments.side, arguments.small, arguments.repeat) < 1:
        parser.error("--ranks, --layers, --side, --small and --repeat: expected 1 or more")
    torch.set_num_threads(1)
    device = arguments.device
    gradients = layers(arguments.layers, arguments.side, device)
    small = {f"small{number}": torch.randn(arguments.small, device=device) for number in range(SMALL_TENSORS)}
    nbytes = sum(4 * gradient.numel() for gradient in gradients.values())
    out = [torch.empty_like(gradient) for gradient in gradients.values()]
    # What larger tensors that come and go do in training: the C library keeps the pages of those that are no larger.
    torch.zeros(31 << 20, dtype=torch.uint8)
    sixteen = 2 * (arguments.ranks - 1) / arguments.ranks * nbytes / 2  # of a ring's all-reduce

    def copy():
        for target, gradient in zip(out, gradients.values(), strict=True):
            target.copy_(gradient)

    print(
        f"{arguments.ranks} ranks, {arguments.layers} layers of {arguments.side} x {arguments.side}; "
        f"a copy by itself {nbytes / shortest(arguments.repeat, copy, device) / 1e9:.1f} GB/s"
    )
    print(f"{'method':42s} {'bits':>6s} {'path':>7s} {'codec':>7s} {'ratio':>6s} {'fp16':>6s} {'bf16':>6s} {'us':>8s}")
    for method in arguments.methods or with_every_method(METHODS):
        try:
            path = path_of(method, gradients, arguments.ranks)
            of_small = path_of(method, small, arguments.ranks)
        except ConfigError as error:
            parser.error(f"--methods: {error}")
        others = [path.codec, copy, *(functools.partial(cast_back, gradients, to) for to in HALVES)]
        seconds, codec, unit, *casts = in_turns(arguments.repeat, device, path.step, others)
        wire = path.wire_bytes()
        pays = [pays_up_to(seconds, wire, other, sixteen) for other in casts]
        each = 1e6 * of_small.seconds(max(1, arguments.repeat // 2)) / SMALL_TENSORS
        print(
            f"{method:42s} {8 * wire / (nbytes / 4):6.3f} {seconds / unit:7.1f} {codec / unit:7.1f} "
            f"{seconds / codec:6.1f} {pays[0]:>6s} {pays[1]:>6s} {each:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
