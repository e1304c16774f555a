#!/usr/bin/env python3
"""Two ranks on this machine train a small network with and without compression: bytes, accuracy and a picture.

    gcompress demo                                             # half a minute; no data, no Horovod
    gcompress demo --compressors none quantize:bits=4 --ranks 4 --plot runs/demo.png

A network of 4 layers learns what a random network says of random points. Each method trains it from the same
start with the same batches, through `gcompress.plugins.ddp`; "none" is DistributedDataParallel as it is.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import gcompress

METHODS = ["none", "quantize:bits=4", "mask:sparsity=0.99,bits=2", "topk:sparsity=0.99", "polar:rate=0.25,rank=0"]
INPUTS, WIDTH, CLASSES, BATCH = 32, 256, 10, 64
TEST_POINTS, WARM_UP = 4000, 50


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="gcompress demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--compressors", nargs="+", default=METHODS, metavar="SPEC", help=f"in turn (default: {' '.join(METHODS)})")
    add("--ranks", type=int, default=2, help="processes (%(default)s)")
    add("--steps", type=int, default=400, help="of each method (%(default)s)")
    add("--plot", metavar="FILE", help="draw the losses over the bytes sent")
    options = parser.parse_args(arguments)
    for name in ("ranks", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    for spec in options.compressors:
        gcompress.as_policy(spec)
    if options.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'gcompress[examples]'")
    return options


def network(seed, widths):
    torch.manual_seed(seed)
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def points(teacher, count, seed):
    """(inputs, labels): what the teacher says of `count` random points."""
    inputs = torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return inputs, teacher(inputs).argmax(1)


def train(spec, steps):
    """Train with one method; returns what came of it: {method, loss: a list, bytes, accuracy, seconds}."""
    from gcompress.plugins import ddp

    rank, size = dist.get_rank(), dist.get_world_size()
    teacher, start = network(1, [INPUTS, 64, CLASSES]), time.monotonic()
    model = torch.nn.parallel.DistributedDataParallel(network(2, [INPUTS, WIDTH, WIDTH, WIDTH, CLASSES]))
    state = ddp.register(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    losses = []
    for step in range(steps):
        inputs, labels = points(teacher, BATCH, seed=step * size + rank + 10)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if rank == 0 and sys.stderr.isatty():
            print(f"\r{spec}: step {step + 1} of {steps}, loss {losses[-1]:.3f} ", end="", file=sys.stderr)
    inputs, labels = points(teacher, TEST_POINTS, seed=3)
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    sent = state.exchange.report.sent_bytes / steps
    return {
        "method": spec, "loss": losses, "bytes": sent, "accuracy": accuracy, "seconds": time.monotonic() - start
    }  # fmt: skip


def rank_main(options):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = []
    for spec in options.compressors:
        results.append(train(spec, options.steps))
        if dist.get_rank() == 0:
            print_row(results)
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0 and options.plot:
        draw(results, options.plot)
        print(f"drawn: {options.plot}")


def print_row(results):
    """The last method's row, with the table's head before the first."""
    first, last = results[0], results[-1]
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    if len(results) == 1:
        print(f"{clear}{'method':<28} {'bytes a step':>12} {'fewer':>8} {'accuracy':>9} {'seconds':>8}")
    fewer, clear = f"{first['bytes'] / last['bytes']:.1f}x", "" if len(results) == 1 else clear
    row = f"{last['method']:<28} {last['bytes']:>12,.0f} {fewer:>8} {last['accuracy']:>9.1%} {last['seconds']:>8.1f}"
    print(clear + row, flush=True)


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for result in results:
        window = max(1, len(result["loss"]) // 20)
        smooth = torch.tensor(result["loss"]).unfold(0, window, 1).mean(1)
        steps = torch.arange(window, len(result["loss"]) + 1)
        left.plot(steps, smooth, label=result["method"])
        right.plot(steps * result["bytes"] / 1e6, smooth)
    left.set(xlabel="steps", ylabel="training loss", title="The same steps …")
    right.set(xlabel="megabytes that a rank sent", xscale="log", title="… and what they cost")
    left.legend(fontsize=8)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    options = parse(sys.argv[1:])
    if "RANK" in os.environ:
        return rank_main(options)
    print(
        f"{options.ranks} ranks on this machine, {options.steps} steps each; a rank's bytes as handed over", flush=True
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run([*command, os.path.abspath(__file__), *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
