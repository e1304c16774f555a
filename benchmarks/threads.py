#!/usr/bin/env python3
"""How much faster two threads encode and decode a large tensor than one, in one run.

    python benchmarks/threads.py                       # 2^24 normal entries, one thread and two
    python benchmarks/threads.py --threads 4 --repeat 31

Milliseconds by the clock into memory that is there: the median of --repeat runs, which one thread and several take in
turns; and how many times as fast several are, the median over the pairs of runs. The first row is what memory gives:
torch reads all entries (a sum), and writes them (a fill). It tells of cores only while nothing else uses them: the load
of the machine before and after is printed, too.
"""

import argparse
import os
import statistics
import time

import torch

from gcompress import from_spec
from gcompress.backends import cpu

SPECS = [
    "quantize:bits=4",
    "sign",
    "mask:sparsity=0.99,bits=2",
    "topk:sparsity=0.99",
    "polar:rate=0.25",
    "fp16",
    "fp8",
    "mxfp4",
]


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(call, threads, repeat):
    """(seconds by one thread, by several, how many times as fast those are)."""
    times = {1: [], threads: []}
    for run in range(repeat + 1):
        for count, taken in times.items():
            torch.set_num_threads(count)
            elapsed = seconds(call)
            if run:  # the first one finds its memory
                taken.append(elapsed)
    ratios = [one / several for one, several in zip(times[1], times[threads], strict=True)]
    return statistics.median(times[1]), statistics.median(times[threads]), statistics.median(ratios)


def calls_of(spec, values, out):
    """A function that encodes, and one that decodes."""
    compressor = from_spec(spec)
    payload = torch.empty(compressor.nbytes(values.numel()), dtype=torch.uint8)
    return (lambda: compressor.encode_into(values, payload)), (lambda: compressor.decode_into(payload, out))


def row(name, calls, threads, repeat):
    cells = []
    for call in calls:
        one, several, ratio = medians(call, threads, repeat)
        cells += [f"{1e3 * one:.1f}", f"{1e3 * several:.1f}", f"{ratio:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", metavar="SPEC", default=SPECS)
    parser.add_argument("--numel", type=int, default=1 << 24, help="entries (default 2^24)")
    parser.add_argument("--threads", type=int, default=2, help="of several (default 2)")
    parser.add_argument("--repeat", type=int, default=21, help="runs of each (default 21)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if cpu.thread_count() < arguments.threads:
        raise SystemExit(f"--threads: got {arguments.threads}, expected at most {cpu.thread_count()} on these cores")
    values = torch.randn(arguments.numel, generator=torch.Generator().manual_seed(0))
    out, head = torch.empty_like(values), f"{arguments.threads} threads"
    print(f"{arguments.numel} entries, load {os.getloadavg()[0]:.1f}\n")
    print(f"| spec | encode ms, 1 thread | {head} | times as fast | decode ms, 1 thread | {head} | times as fast |")
    print("|---|---|---|---|---|---|---|")
    rows = {"to read; to write": (values.sum, lambda: out.fill_(1.0))}
    rows |= {f"`{spec}`": calls_of(spec, values, out) for spec in arguments.specs}
    for name, calls in rows.items():
        print(row(name, calls, arguments.threads, arguments.repeat), flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
