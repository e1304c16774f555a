#!/usr/bin/env python3
"""Step time and bytes of training over a slow link, method against method in one run.

    python benchmarks/slow_link.py --rate 100mbit --ranks 4
    python benchmarks/slow_link.py --rate 100mbit 1gbit 10gbit none --plot runs/slow_link.png
    python benchmarks/slow_link.py --rate 100mbit --methods fp16 quantize:bits=4@twophase ddp/fp16 \
        ddp/powersgd:rank=4 ddp/quantize:bits=4@twophase

A method is a compressor's spec, `none` or `fp16`, with Horovod, or behind `ddp/` with
DistributedDataParallel, which knows `bf16` and `powersgd:rank=R` as well: torch's own hooks.
`@allgather`, `@twophase` or `@summed` names the exchange; without it the plan chooses.

Starts the ranks in a network namespace (Linux, root; see tools/slow_link.py) and trains a model
of --parameters million entries with each method in turn, the methods taking turns step by step so
that all meet the same noise. Of several rates, each has a job of its own. Prints the median step
and beside it what computing alone takes and what the link alone would take for the bytes counted;
the bytes a rank handed over, what its report expects all ranks to send, and what the namespace's
interface counted: with TCP's headers and the messages Horovod's ranks exchange every cycle, whose
rate while idle is measured first (--json: what that makes in a step's time). With --batch, steps
are long enough to see the overlap: a step's time is printed beside that of its computation alone
and of its exchange alone (a batch of 1).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = [
    "fp16",
    "quantize:bits=4@allgather",
    "quantize:bits=4@twophase",
    "mask:sparsity=0.99,bits=2@allgather",
    "mask:sparsity=0.99,bits=2@twophase",
    "mask:sparsity=0.99,bits=1@twophase",
    "topk:sparsity=0.99@allgather",
    "topk:sparsity=0.99@twophase",
    "ddp/fp16",
    "ddp/bf16",
    "ddp/powersgd:rank=4",
    "ddp/quantize:bits=4@twophase",
]
COUNTER = pathlib.Path("/sys/class/net/lo/statistics/tx_bytes")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rate",
        nargs="+",
        type=rate_of,
        default=["none"],
        help="of the link that all ranks share, as tc writes it, one or several; none: unlimited (the default)",
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each method (default 5)")
    parser.add_argument("--parameters", type=float, default=8.4, help="model size in million entries (default 8.4)")
    parser.add_argument("--layers", type=int, default=4, help="square layers, each with a bias (default 4)")
    parser.add_argument("--methods", "--compressors", nargs="+", default=DEFAULT, metavar="[ddp/]SPEC[@EXCHANGE]")
    parser.add_argument("--batch", type=int, help="rows of a batch; measures the overlap (default 8, does not)")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw step time against rate, a curve for each method")
    parser.add_argument("--rank", nargs=2, metavar=("RATE", "FILE"), help=argparse.SUPPRESS)  # what a rank measures
    arguments = parser.parse_args()
    if min(arguments.ranks, arguments.steps, arguments.layers) < 1 or arguments.parameters <= 0:
        parser.error("--ranks, --steps, --layers, --parameters: expected more than 0")
    return arguments


UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rate_of(text):
    """tc's notation of a rate, or "none"."""
    if text == "none" or bits_per_second(text):
        return text
    raise argparse.ArgumentTypeError(f"got {text!r}, expected none or a number of {', '.join(UNITS)}, such as 100mbit")


def bits_per_second(rate):
    """Of a rate as tc writes it; None of "none", or if it is no rate."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    return float(found[1]) * UNITS[found[2]] if found and float(found[1]) > 0 else None


def link_tool():
    """tools/slow_link.py as a module."""
    spec = importlib.util.spec_from_file_location("slow_link_tool", ROOT / "tools" / "slow_link.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def launch(arguments):
    tool = link_tool()
    if tool.missing():
        sys.exit(f"slow_link.py: error: {tool.missing()}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("slow_link.py: error: --plot needs matplotlib: pip install matplotlib")
    rows = []
    for rate in arguments.rate:
        with tempfile.TemporaryDirectory() as folder, tool.namespace(None if rate == "none" else rate) as enter:
            figures = pathlib.Path(folder) / "figures.json"
            command = [sys.executable, "-m", "horovod.runner.launch", "-np", str(arguments.ranks), "--gloo"]
            rank = [sys.executable, *sys.argv, "--rank", rate, str(figures)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            ended = subprocess.run([*enter, *command, *rank], env=environment).returncode
            if ended:
                sys.exit(ended)
            rows += json.loads(figures.read_text())
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(arguments, rows)


def make_model(arguments):
    import torch

    width = max(8, round((arguments.parameters * 1e6 / arguments.layers) ** 0.5))
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(arguments.layers)]), width


def make_step(method, arguments):
    """A function that trains one step with one method, and a function that counts its bytes so far."""
    import torch

    model, width = make_model(arguments)
    make = make_ddp if method.startswith("ddp/") else make_horovod
    model, optimizer, bytes_so_far = make(method.removeprefix("ddp/"), model)

    def step(batch):
        optimizer.zero_grad()
        model(torch.randn(batch, width)).square().mean().backward()
        optimizer.step()

    return step, bytes_so_far


def make_policy(method):
    import gcompress

    spec, _, exchange = method.partition("@")
    return gcompress.Policy(spec, exchange=exchange or "auto")


def make_horovod(method, model):
    import gcompress.plugins.horovod as gcompress_hvd
    import horovod.torch as hvd
    import torch

    stock = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
    compression = stock[method] if method in stock else make_policy(method)
    named = [(f"{method}.{name}", p) for name, p in model.named_parameters()]
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(base, named_parameters=named, compression=compression)
    report = gcompress_hvd.exchange(optimizer).report
    return model, optimizer, lambda: (report.sent_bytes, report.wire_bytes)


def make_ddp(method, model):
    """DistributedDataParallel with a hook of torch's, whose bytes are those of the tensors it all-reduces, or ours."""
    import gcompress.plugins.ddp
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    name, _, rank = method.partition(":rank=")
    # PowerSGD's hook waits within callbacks on Gloo's two threads: two buckets under way would wait for ever.
    bucket_cap_mb = 10_000 if name == "powersgd" else None
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if name not in ("none", "fp16", "bf16", "powersgd"):
        report = gcompress.plugins.ddp.register(model, make_policy(method)).exchange.report
        return model, optimizer, lambda: (report.sent_bytes, report.wire_bytes)
    shapes, steps, sizes = [p.shape for p in model.parameters()], [0], {"none": 4, "fp16": 2, "bf16": 2}
    if name == "powersgd":
        # From the second step on; before it torch's hook needs two plain ones.
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=int(rank or 1), start_powerSGD_iter=2)
        hook = powerSGD_hook.powerSGD_hook
        per_step = 4 * sum(int(rank or 1) * sum(s) if len(s) > 1 else s.numel() for s in shapes)
    else:
        state = None
        hook = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
        hook = hook.get(name, default_hooks.allreduce_hook)
        per_step = sizes[name] * sum(s.numel() for s in shapes)

    def counted(given, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        steps[0] += bucket.is_last()
        return hook(given, bucket)

    model.register_comm_hook(state, counted)
    others = dist.get_world_size() - 1
    return (
        model,
        optimizer,
        lambda: (
            steps[0] * per_step,
            steps[0] * 2 * others * per_step // dist.get_world_size(),
        ),
    )


def start_torch_distributed():
    """Among the ranks that horovodrun started."""
    import horovod.torch as hvd
    import torch.distributed as dist

    address = hvd.broadcast_object(tempfile.mktemp(prefix="gcompress-store-"), root_rank=0)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=hvd.rank(), world_size=hvd.size())


def computation_seconds(arguments, batch):
    """What a step takes without any exchange, while all ranks compute."""
    import torch

    model, width = make_model(arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seconds = []
    for _ in range(4):
        barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        model(torch.randn(batch, width)).square().mean().backward()
        optimizer.step()
        barrier()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(arguments):
    import horovod.torch as hvd

    hvd.init()
    if any(method.startswith("ddp/") for method in arguments.methods):
        start_torch_distributed()
    batch = arguments.batch or 8
    computing = computation_seconds(arguments, batch)
    runs = {method: make_step(method, arguments) for method in arguments.methods}
    for step, _ in runs.values():  # names are negotiated, memory is allocated and buckets are rebuilt
        for _ in range(3):
            step(1)
    idle = count(lambda: time.sleep(1))
    rate, figures = arguments.rank
    rows = [{"rate": rate, **row, "computation_seconds": computing} for row in measure_methods(arguments, runs, batch)]
    for row in rows:
        row["idle_wire_bytes"] = idle * row["mean_step_seconds"]
    if hvd.rank() == 0:
        show(arguments, rate, rows)
        print(f"idle ranks exchange {idle / 1e6:.2f} MB/s of control messages", flush=True)
        pathlib.Path(figures).write_text(json.dumps(rows))


def measure_methods(arguments, runs, batch):
    """A row of figures for each method."""
    import horovod.torch as hvd
    import torch

    seconds, counted = {method: [] for method in runs}, dict.fromkeys(runs, 0)
    exchanging = {method: [] for method in runs}
    before = {method: bytes_so_far() for method, (_, bytes_so_far) in runs.items()}
    for _ in range(arguments.steps):
        for method, (step, _) in runs.items():
            start = time.perf_counter()
            counted[method] += count(lambda step=step: step(batch))
            seconds[method].append(time.perf_counter() - start)
    after = {method: bytes_so_far() for method, (_, bytes_so_far) in runs.items()}
    for _ in range(arguments.steps if arguments.batch else 0):
        for method, (step, _) in runs.items():
            start = time.perf_counter()
            count(lambda step=step: step(1))
            exchanging[method].append(time.perf_counter() - start)
    rows = []
    for method in runs:
        sent, wire = ((a - b) / arguments.steps for a, b in zip(after[method], before[method], strict=True))
        rows.append(
            {
                "method": method,
                "median_step_seconds": statistics.median(seconds[method]),
                "mean_step_seconds": statistics.mean(seconds[method]),
                "exchange_seconds": statistics.median(exchanging[method]) if arguments.batch else None,
                "handed_over_bytes": sent,
                "expected_wire_bytes": float(hvd.allreduce(torch.tensor(wire, dtype=torch.float64), op=hvd.Sum)),
                "counted_wire_bytes": counted[method] / arguments.steps,
            }
        )
    return rows


def barrier():
    """Wait for all ranks, sleeping: Horovod's own barrier spins, and takes the cores from ranks that still work."""
    import horovod.torch as hvd
    import torch
    from gcompress.plugins.horovod.collectives import patient_synchronize

    patient_synchronize(hvd.allreduce_async(torch.zeros(1), name="benchmark.barrier"))


def count(function):
    """Bytes that cross the namespace's loopback while all ranks run `function`."""
    barrier()
    before = int(COUNTER.read_text())
    function()
    barrier()
    return int(COUNTER.read_text()) - before


def show(arguments, rate, rows):
    base = {row["method"]: row["median_step_seconds"] for row in rows}
    limit = bits_per_second(rate)
    print(
        f"\n{arguments.ranks} ranks, {arguments.parameters:g} M parameters in {arguments.layers} layers, link {rate}, "
        f"{arguments.steps} steps each, "
        f"computing alone {rows[0]['computation_seconds']:.3f} s"
    )
    print(
        f"{'method':38s} {'step s':>7s} {'link s':>7s} {'vs fp16':>8s} {'vs ddp/fp16':>11s} {'handed over':>12s} "
        f"{'wire, all':>12s} {'counted':>12s}{'  computing + exchange s' * bool(arguments.batch)}"
    )
    for row in rows:
        speeds = [f"{base[m] / row['median_step_seconds']:.2f}x" if m in base else "-" for m in ("fp16", "ddp/fp16")]
        link = f"{8 * row['counted_wire_bytes'] / limit:.3f}" if limit else "-"
        line = (
            f"{row['method']:38s} {row['median_step_seconds']:7.3f} {link:>7s} {speeds[0]:>8s} {speeds[1]:>11s} "
            f"{row['handed_over_bytes']:12,.0f} {row['expected_wire_bytes']:12,.0f} {row['counted_wire_bytes']:12,.0f}"
        )
        if arguments.batch:
            alone = row["computation_seconds"], row["exchange_seconds"]
            line += f"  {alone[0]:.3f} + {alone[1]:.3f} = {sum(alone):.3f}"
        print(line, flush=True)


def plot(arguments, rows):
    """Step time against rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({row["rate"] for row in rows}, key=lambda rate: bits_per_second(rate) or float("inf"))
    colours = pyplot.get_cmap("tab20").colors
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for number, method in enumerate(arguments.methods):
        times = {row["rate"]: row["median_step_seconds"] for row in rows if row["method"] == method}
        look = {"linestyle": "--" if method.startswith("ddp/") else "-", "color": colours[number % len(colours)]}
        axis.plot(range(len(rates)), [times[rate] for rate in rates], marker="o", label=method, **look)
    axis.axhline(rows[0]["computation_seconds"], color="black", linestyle=":", label="computing alone")
    axis.set(yscale="log", ylabel="seconds a step", xlabel="rate of the link that all ranks share")
    axis.set_xticks(range(len(rates)), rates)
    axis.set_title(f"{arguments.ranks} ranks, {arguments.parameters:g} M parameters")
    axis.grid(axis="y", which="both", alpha=0.3)
    axis.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize="small")
    path = pathlib.Path(arguments.plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"the curves are drawn in {path}")


if __name__ == "__main__":
    options = parse()
    measure(options) if options.rank else launch(options)
