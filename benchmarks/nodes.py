#!/usr/bin/env python3
"""Two nodes of several ranks: bytes between them and step time, flat and by nodes (docs/NODES.md).

    python benchmarks/nodes.py --rate 100mbit
    python benchmarks/nodes.py --ranks 4 --methods quantize:bits=4@allgather quantize:bits=4@twophase

A method is a compressor's spec, `none`, or `fp16`, torch's own hook, which is flat. `@allgather` or `@twophase` names
the exchange; without it the plan chooses, for all ranks when flat, for nodes when by nodes.

Each node is a network namespace (Linux, root; see tools/two_nodes.py), whose only way to the other is one link of
--rate; ranks of DistributedDataParallel on Gloo are started by torchrun. Prints what the link's interfaces counted,
with TCP's headers, per node and step; beside it, by nodes, what the ranks' reports expect; and the median step.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = ["none", "fp16", "quantize:bits=4", "topk:sparsity=0.99"]
FLAT, BY_NODES = "flat", "by nodes"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="of the link, as tc writes it, or none (default 100mbit)")
    parser.add_argument("--ranks", type=int, default=2, help="of each node (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each method (default 5)")
    parser.add_argument("--parameters", type=float, default=4.2, help="model size in million entries (default 4.2)")
    parser.add_argument("--layers", type=int, default=4, help="square layers, each with a bias (default 4)")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, metavar="SPEC[@EXCHANGE]")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--rank", metavar="FILE", help=argparse.SUPPRESS)  # what a rank measures
    arguments = parser.parse_args()
    if min(arguments.ranks, arguments.steps, arguments.layers) < 1 or arguments.parameters <= 0:
        parser.error("--ranks, --steps, --layers, --parameters: expected more than 0")
    return arguments


def launch(arguments):
    sys.path.insert(0, str(ROOT / "tools"))
    import slow_link
    import two_nodes

    if slow_link.missing():
        sys.exit(f"nodes.py: error: {slow_link.missing()}")
    rate = None if arguments.rate == "none" else arguments.rate
    with tempfile.TemporaryDirectory() as folder, two_nodes.joined_nodes(rate) as nodes:
        figures = pathlib.Path(folder) / "figures.json"
        ended = two_nodes.torchrun(nodes, arguments.ranks, [*sys.argv, "--rank", figures], 1800)
        if any(code for code, _ in ended):
            sys.exit("\n".join(output[-3000:] for _, output in ended))
        rows = json.loads(figures.read_text())
    show(arguments, rows)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))


def make_step(method, topology, arguments):
    """(A function that trains one step, one that tells the bytes between nodes that this rank's report has)."""
    import gcompress.plugins.ddp
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    import gcompress

    width = max(8, round((arguments.parameters * 1e6 / arguments.layers) ** 0.5))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(arguments.layers)])
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    spec, _, exchange = method.partition("@")
    report = None
    if spec == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    else:
        local_size = 1 if topology == FLAT else "auto"
        policy = gcompress.Policy(spec, exchange=exchange or "auto", local_size=local_size)
        report = gcompress.plugins.ddp.register(parallel, policy).exchange.report
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        parallel(torch.randn(4, width)).square().mean().backward()
        optimizer.step()

    return step, lambda: report.wire_bytes if report else 0


def left_the_node():
    """Bytes that have left this rank's node."""
    return int(pathlib.Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def measure(arguments):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ways = [
        (method, way) for method in arguments.methods for way in (FLAT, BY_NODES) if (method, way) != ("fp16", BY_NODES)
    ]
    runs = {key: make_step(*key, arguments) for key in ways}
    for step, _ in runs.values():  # connections are made, and buckets are rebuilt
        for _ in range(2):
            step()
    seconds, counted = {key: [] for key in runs}, dict.fromkeys(runs, 0)
    before = {key: expected() for key, (_, expected) in runs.items()}
    for _ in range(arguments.steps):
        for key, (step, _) in runs.items():
            dist.barrier()
            start, sent = time.perf_counter(), left_the_node()
            step()
            dist.barrier()
            seconds[key].append(time.perf_counter() - start)
            counted[key] += left_the_node() - sent
    rows = []
    for (method, way), (_, expected) in runs.items():
        own = (counted[method, way], expected() - before[method, way])
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        nodes = 2 * arguments.steps
        rows.append(
            {
                "method": method,
                "way": way,
                "step_seconds": statistics.median(seconds[method, way]),
                "counted_bytes": sum(bytes_of for bytes_of, _ in found[:: arguments.ranks]) / nodes,
                "expected_bytes": sum(expects for _, expects in found) / nodes,
            }
        )
    if dist.get_rank() == 0:
        pathlib.Path(arguments.rank).write_text(json.dumps(rows))
    dist.destroy_process_group()


def show(arguments, rows):
    print(
        f"2 nodes of {arguments.ranks} ranks, {arguments.parameters:g} M parameters in {arguments.layers} layers, "
        f"link {arguments.rate}, {arguments.steps} steps each; bytes leave each node per step"
    )
    print(
        f"{'method':30s} {'flat, bytes':>14s} {'by nodes':>14s} {'(reports)':>14s} {'ratio':>6s} "
        f"{'flat, step s':>13s} {'by nodes':>9s} {'ratio':>6s}"
    )
    for method in arguments.methods:
        flat, nodes = (
            [row for row in rows if (row["method"], row["way"]) == (method, way)] for way in (FLAT, BY_NODES)
        )
        line = f"{method:30s} {flat[0]['counted_bytes']:14,.0f} "
        if not nodes:
            print(f"{line}{'-':>14s} {'-':>14s} {'-':>6s} {flat[0]['step_seconds']:13.3f}")
            continue
        bytes_ratio = nodes[0]["counted_bytes"] / flat[0]["counted_bytes"]
        time_ratio = nodes[0]["step_seconds"] / flat[0]["step_seconds"]
        print(
            f"{line}{nodes[0]['counted_bytes']:14,.0f} {nodes[0]['expected_bytes']:14,.0f} {bytes_ratio:6.2f} "
            f"{flat[0]['step_seconds']:13.3f} {nodes[0]['step_seconds']:9.3f} {time_ratio:6.2f}"
        )


if __name__ == "__main__":
    options = parse()
    measure(options) if options.rank else launch(options)
