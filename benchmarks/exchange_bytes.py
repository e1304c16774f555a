#!/usr/bin/env python3
"""Bytes per worker and step of every exchange as the ranks grow, counted by a network interface.

    python benchmarks/exchange_bytes.py                     # 2, 4 and 8 ranks, one table

Runs benchmarks/slow_link.py (Linux, root) for each number of ranks, on a link without limit,
and divides what the namespace's interface counted by the ranks. Everything is real: Horovod,
or torch's DistributedDataParallel behind `ddp/`, TCP with its headers, control messages.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

SLOW_LINK = pathlib.Path(__file__).with_name("slow_link.py")
METHODS = [
    "fp16",
    "quantize:bits=4@allgather",
    "quantize:bits=4@twophase",
    "topk:sparsity=0.99@allgather",
    "topk:sparsity=0.99@twophase",
    "randomk:sparsity=0.99@summed",
    "ddp/quantize:bits=4@twophase",
]


def counted(ranks, arguments):
    """{method: (counted, expected) bytes per worker and step}."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, SLOW_LINK, "--ranks", ranks, "--parameters", arguments.parameters]
        command += ["--steps", arguments.steps, "--json", out, "--methods", *arguments.methods]
        # Control messages every 20 ms instead of every 1: they are not what is counted here.
        environment = {**os.environ, "HOROVOD_CYCLE_TIME": "20"}
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=900)
        if result.returncode or not out.exists():
            sys.exit(f"exchange_bytes.py: error: {ranks} ranks failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        rows = json.loads(out.read_text())
    return {row["method"]: (row["counted_wire_bytes"] / ranks, row["expected_wire_bytes"] / ranks) for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--parameters", type=float, default=4.0, help="model size in million entries (default 4)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="see slow_link.py")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = {ranks: counted(ranks, arguments) for ranks in arguments.ranks}
    print(f"bytes per worker and step, {arguments.parameters:g} M parameters: counted (expected by the reports)")
    print(f"{'method':34s}" + "".join(f"{f'{ranks} ranks':>25s}" for ranks in arguments.ranks))
    for method in arguments.methods:
        cells = (figures[ranks][method] for ranks in arguments.ranks)
        print(f"{method:34s}" + "".join(f"{f'{found:,.0f} ({sent:,.0f})':>25s}" for found, sent in cells))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
