#!/usr/bin/env python3
"""What `gcompress plan` predicts beside what steps really take (Linux, root; see tools/slow_link.py).

    python benchmarks/plan_check.py                                     # 4 ranks, 100mbit and 1gbit
    python benchmarks/plan_check.py --rate 100mbit --ranks 2 4 8 16 --parameters 2

Starts DistributedDataParallel on Gloo on each number of ranks, in a network namespace whose loopback all of them share
at the given rate, and trains a model of --parameters million entries with each method in turn, so that all meet the
same noise. In the same turns each rank measures its own way of the gradients (gcompress/forecast/path_costs.py), all
ranks at the same time, since they and whatever else runs share the cores.

The prediction is made of these, of the rate, of how long a step takes without exchange, of how much longer that is than
the processor's own time for it, by which torch's and Gloo's costs are lengthened, of the time of a small message, and
of the burst of the namespace's token bucket, which fills in a pause before each measured step. Prints predicted and
measured seconds of the median step (of two, if they are long), and their quotient.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from gcompress.plugins.launched import die_with_the_launcher

from gcompress.forecast.advice import PLAIN, Bench, Situation, forecast, method_policy
from gcompress.forecast.gloo_costs import GlooCosts, measure_gloo
from gcompress.forecast.model_shapes import shapes_of
from gcompress.forecast.network import MESSAGE_SECONDS, Network
from gcompress.forecast.path_costs import PathCosts, PathMeter, measure_torch
from gcompress.forecast.timeline import Computing
from gcompress.units import link_rate
from slow_link import link_tool, make_ddp, make_model, rate_of

METHODS = ["none", "fp16", "quantize:bits=4", "topk:sparsity=0.99"]
LONG_STEP = 3  # seconds; of such steps two are measured
BURST_BYTES = 512 << 10  # of tools/slow_link.py
PAUSE = 0.06  # seconds before a measured step, in which so many pass again at 100 Mbit/s


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", nargs="+", type=rate_of, default=["100mbit", "1gbit"], help="of the shared link")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4], help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="default: %(default)s")
    parser.add_argument("--parameters", type=float, default=4.2, help="million entries (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="square ones, each with a bias (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows: how long a step computes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="of each method (default %(default)s)")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--job", nargs=2, metavar=("STORE", "FILE"), help=argparse.SUPPRESS)  # of all ranks
    return parser.parse_args()


def start_ranks(arguments):
    """Fork the ranks, which so import torch once, and wait for them; returns the exit code."""
    children = []
    for rank in range(arguments.ranks[0]):
        child = os.fork()
        if child == 0:
            code = 1
            die_with_the_launcher()  # no rank outlives a job that is ended
            try:
                train(arguments, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def train(arguments, rank):
    """One rank: measure; rank 0 writes what it found."""
    store, figures = arguments.job
    ranks = arguments.ranks[0]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model, width = make_model(arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(arguments.batch, width)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    runs, slower, empty, meters = {"alone": (model, optimizer)}, [], [], {}
    for method in arguments.methods:
        made, optimizer, _ = make_ddp(method, make_model(arguments)[0])
        runs[method] = made, optimizer
        if method not in PLAIN:
            meters[method] = PathMeter(method_policy(method), shapes_of(made.module), ranks, beside_others=True)
        for _ in range(2):  # buckets are rebuilt, memory is allocated
            step(made, optimizer)
    seconds = {method: [] for method in runs}
    slow: set[str] = set()
    for number in range(arguments.steps):
        if number == 2:
            slow = {method for method, times in seconds.items() if of_rank_0(min(times)) > LONG_STEP}
        for method, run in runs.items():
            if method in slow:
                continue
            time.sleep(PAUSE)
            own = time.process_time()
            seconds[method].append(timed(step, *run))
            if method in meters:
                timed(meters[method].step)
            if method == "alone":
                slower.append(seconds[method][-1] / (time.process_time() - own))
        empty += [timed(dist.all_reduce, torch.zeros(1)) for _ in range(5)]
    if rank == 0:
        measured = {method: statistics.median(times) for method, times in seconds.items()}
        found = {"alone": measured.pop("alone"), "measured": measured, "empty": statistics.median(empty)}
        found["paths"] = {method: meter.costs() for method, meter in meters.items()}
        pathlib.Path(figures).write_text(json.dumps({**found, "slower": statistics.median(slower)}))
    dist.barrier()
    dist.destroy_process_group()


def of_rank_0(value):
    """The value that rank 0 has, on all ranks."""
    shared = torch.tensor([value])
    dist.broadcast(shared, 0)
    return float(shared)


def timed(function, *arguments):
    """Seconds of a call that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(arguments, ranks, rate):
    """What rank 0 of a real job finds."""
    with tempfile.TemporaryDirectory() as folder, link_tool().namespace(None if rate == "none" else rate) as enter:
        figures = pathlib.Path(folder) / "figures.json"
        command = [*enter, sys.executable, str(pathlib.Path(__file__).resolve()), "--ranks", str(ranks)]
        command += ["--methods", *arguments.methods]
        for option in ("parameters", "layers", "batch", "steps"):
            command += [f"--{option}", str(getattr(arguments, option))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        code = subprocess.run([*command, "--job", f"{folder}/store", str(figures)], env=environment).returncode
        if code:
            sys.exit(f"plan_check.py: error: a rank ended with {code}")
        return json.loads(figures.read_text())


class BenchBesideRanks(Bench):
    """What the ranks measured of their own ways, all at the same time, and torch and Gloo as slow as their cores were.

    Args:
        found: rank 0's figures.
    """

    def __init__(self, found):
        super().__init__({}, 0)
        self._found = {method_policy(method): PathCosts(*each) for method, each in found["paths"].items()}
        slower = found["slower"]
        torch_costs, gloo = measure_torch(), measure_gloo()
        self._torch = torch_costs._replace(
            copies=slower * torch_costs.copies, casts={key: slower * each for key, each in torch_costs.casts.items()}
        )
        self._gloo = GlooCosts(
            {key: slower * each for key, each in gloo.allreduce.items()},
            slower * gloo.allgather,
            slower * gloo.alltoall,
        )

    def path(self, policy, ranks=None):
        return self._found[policy]


def predict(arguments, ranks, rate, found):
    """{method: Forecast} for the same."""
    bench = BenchBesideRanks(found)
    latency = max(0.0, found["empty"] / (2 * max(1, ranks - 1)) - MESSAGE_SECONDS)
    network = Network(link_rate(rate if rate != "none" else "1tbit"), latency, True, 1, 1.0, BURST_BYTES)
    computing = Computing(found["alone"], 0.0, 0.0, max(0.0, ranks / (os.cpu_count() or 1) - 1), PAUSE)
    situation = Situation(shapes_of(make_model(arguments)[0]), ranks, network, computing)
    return {method: forecast(method, situation, bench) for method in arguments.methods}


def check(arguments):
    """The rows of every number of ranks and rate."""
    if link_tool().missing():
        sys.exit(f"plan_check.py: error: {link_tool().missing()}")
    rows = []
    print(
        f"{arguments.parameters:g} M parameters in {arguments.layers} layers, batches of {arguments.batch}, "
        f"{os.cpu_count()} cores, median of {arguments.steps} steps\n"
    )
    print("| ranks | link | computing, x processor | method | predicted | measured | quotient | link busy |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for ranks in arguments.ranks:
        for rate in arguments.rate:
            found = measure(arguments, ranks, rate)
            for method, each in predict(arguments, ranks, rate, found).items():
                measured = found["measured"][method]
                rows.append({"ranks": ranks, "rate": rate, **found, **each._asdict(), "step": measured})
                print(
                    f"| {ranks} | {rate} | {found['alone']:.3f} s, {found['slower']:.1f} | `{method}` "
                    f"| {each.seconds:.3f} s | {measured:.3f} s | {each.seconds / measured:.2f} "
                    f"| {each.link_seconds:.3f} s |",
                    flush=True,
                )
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))
    worst = max(max(row["seconds"] / row["step"], row["step"] / row["seconds"]) for row in rows)
    print(f"\nfarthest from what was measured: a factor of {worst:.2f}")
    return rows


if __name__ == "__main__":
    options = parse()
    sys.exit(start_ranks(options)) if options.job else check(options)
