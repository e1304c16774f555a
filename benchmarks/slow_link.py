#!/usr/bin/env python3
"""Step time and bytes of Horovod training over a slow link, method against method in one run.

    python benchmarks/slow_link.py --rate 100mbit --ranks 4

Starts the ranks in a network namespace (Linux, root; see tools/slow_link.py) and trains a
model of --parameters million entries with each compressor in turn, the methods taking turns
step by step so that all meet the same noise. Prints the median step, the bytes a rank handed
to Horovod, what its report expects all ranks to send, and what the namespace's interface
counted: with TCP's headers and the messages Horovod's ranks exchange every cycle, whose rate
while idle is measured first.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = [
    "none",
    "fp16",
    "mask:sparsity=0.99,bits=2",
    "mask:sparsity=0.99,bits=1",
    "quantize:bits=4",
    "topk:sparsity=0.99",
]
COUNTER = pathlib.Path("/sys/class/net/lo/statistics/tx_bytes")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the link that all ranks share, as tc writes it (default: unlimited)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each method (default 5)")
    parser.add_argument("--parameters", type=float, default=8.4, help="model size in million entries (default 8.4)")
    parser.add_argument("--compressors", nargs="+", default=DEFAULT, metavar="SPEC")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(arguments):
    spec = importlib.util.spec_from_file_location("slow_link_tool", ROOT / "tools" / "slow_link.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    if tool.missing():
        sys.exit(f"slow_link.py: error: {tool.missing()}")
    command = [sys.executable, "-m", "horovod.runner.launch", "-np", str(arguments.ranks), "--gloo"]
    with tool.namespace(arguments.rate) as enter:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([*enter, *command, sys.executable, *sys.argv, "--rank"], env=environment).returncode)


def make_model(parameters):
    import torch

    width = max(8, round((parameters * 1e6 / 4) ** 0.5))
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)]), width


def make_step(spec, parameters):
    """A function that trains one step with one compressor, and its exchange."""
    import horovod.torch as hvd
    import torch

    import gcompress
    import gcompress.plugins.horovod as gcompress_hvd

    model, width = make_model(parameters)
    stock = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
    compression = stock[spec] if spec in stock else gcompress.from_spec(spec)
    named = [(f"{spec}.{name}", p) for name, p in model.named_parameters()]
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(base, named_parameters=named, compression=compression)

    def step():
        optimizer.zero_grad()
        model(torch.randn(8, width)).square().mean().backward()
        optimizer.step()

    return step, gcompress_hvd.exchange(optimizer)


def measure(arguments):
    import horovod.torch as hvd
    import torch

    hvd.init()
    runs = {spec: make_step(spec, arguments.parameters) for spec in arguments.compressors}
    for step, _ in runs.values():  # names are negotiated and memory is allocated
        step()
        step()
    idle = count(lambda: time.sleep(1))
    seconds, counted = {spec: [] for spec in runs}, dict.fromkeys(runs, 0)
    before = {spec: exchange.report.wire_bytes for spec, (_, exchange) in runs.items()}
    for _ in range(arguments.steps):
        for spec, (step, _) in runs.items():
            start = time.perf_counter()
            crossed = count(step)
            seconds[spec].append(time.perf_counter() - start)
            counted[spec] += crossed
    rows = []
    for spec, (_, exchange) in runs.items():
        total = torch.tensor(exchange.report.wire_bytes - before[spec], dtype=torch.float64)
        wire = hvd.allreduce(total, op=hvd.Sum)
        rows.append(
            {
                "compressor": spec,
                "median_step_seconds": statistics.median(seconds[spec]),
                "handed_over_bytes": exchange.report.last_step_bytes,
                "expected_wire_bytes": float(wire) / arguments.steps,
                "counted_wire_bytes": counted[spec] / arguments.steps,
            }
        )
    if hvd.rank() == 0:
        show(arguments, rows, idle)


def count(function):
    """Bytes that cross the namespace's loopback while all ranks run `function`."""
    import horovod.torch as hvd

    hvd.barrier()
    before = int(COUNTER.read_text())
    function()
    hvd.barrier()
    return int(COUNTER.read_text()) - before


def show(arguments, rows, idle):
    base = {row["compressor"]: row["median_step_seconds"] for row in rows}.get("fp16")
    rate = arguments.rate or "unlimited"
    print(
        f"\n{arguments.ranks} ranks, {arguments.parameters:g} M parameters, link {rate}, {arguments.steps} steps each"
    )
    print(f"{'compressor':30s} {'step s':>8s} {'vs fp16':>8s} {'bytes/rank':>12s} {'wire, all':>12s} {'counted':>12s}")
    for row in rows:
        speed = f"{base / row['median_step_seconds']:.2f}x" if base else "-"
        print(
            f"{row['compressor']:30s} {row['median_step_seconds']:8.3f} {speed:>8s} {row['handed_over_bytes']:12,d} "
            f"{row['expected_wire_bytes']:12,.0f} {row['counted_wire_bytes']:12,.0f}",
            flush=True,
        )
    print(f"idle ranks exchange {idle / 1e6:.2f} MB/s of control messages", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    options = parse()
    measure(options) if options.rank else launch(options)
