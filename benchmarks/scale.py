#!/usr/bin/env python3
"""A step among 4 to 4096 ranks, predicted: how exchanges grow with the ranks, and what of them grows.

    python benchmarks/scale.py --model resnet50 --step 300ms --link 10gbit --plot docs/scale.png
    python benchmarks/scale.py --check                       # against real ranks over a slow link (Linux, root)

Every exchange has a real Plan for that many ranks, payload sizes by `nbytes`, encoders and decoders measured here among
as many ranks (gcompress/forecast/path_costs.py), the library's own schedule, and a link of --link for every node. On a
node are --local ranks. Times of computing differ between ranks by --jitter, and all wait for the slowest.

ring      float16 in an all-reduce: a ring through all ranks, which leaves a node once.
flat      every rank exchanges with every other; a node's ranks share its link.
levels    the ranks of a node add up their gradients in float32 and share the result out; each exchanges its part,
          compressed, with the ranks of the same place on other nodes; then the node's ranks hand each other the means.

Beside step times: what grows. The table's columns are of the flat two-phase exchange of --method: bytes that a rank
sends; the owners' fan-in, the payloads that one rank receives and adds up; pieces in the plan and the seconds it takes
to make; and the bytes of text that each rank reads when the ranks compare their configurations.

With --check: DistributedDataParallel on Gloo, 2, 4, 8 and 16 ranks on one slow link, by benchmarks/plan_check.py.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

import plan_check
import torch

from gcompress.exchange.plan import Plan
from gcompress.forecast.advice import Bench, Situation, forecast, method_policy
from gcompress.forecast.gloo_costs import NO_COSTS
from gcompress.forecast.model_shapes import shapes_named
from gcompress.forecast.network import Network
from gcompress.forecast.step_bytes import step_bytes
from gcompress.forecast.timeline import Computing
from gcompress.units import duration, in_seconds, link_rate

RANKS = [4, 16, 64, 256, 1024, 4096]
METHODS = ["quantize:bits=4@twophase", "topk:sparsity=0.99@allgather", "topk:sparsity=0.99@twophase"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=RANKS, help="default: %(default)s")
    add("--methods", nargs="+", default=METHODS, metavar="METHOD", help="default: %(default)s")
    add("--model", default="resnet50", help="as for gcompress plan (%(default)s)")
    add("--step", default="300ms", help="without exchange (%(default)s)")
    add("--link", default="10gbit", help="of a node (%(default)s)")
    add("--latency", default="50us", help="one way (%(default)s)")
    add("--local", type=int, default=4, help="ranks of a node (%(default)s)")
    add("--local-rate", default="100GB/s", help="of what joins them (%(default)s)")
    add("--jitter", type=float, default=0.03, help="deviation of computing times, as a part (%(default)s)")
    add("--plot", metavar="FILE", help="draw step time against ranks")
    add("--json", metavar="FILE", help="write the figures")
    add("--check", action="store_true", help="compare with real ranks instead")
    return parser.parse_args()


class RanksOfMachines(Bench):
    """A Bench for ranks whose engine sums on devices of its own: Gloo's processor time is not theirs."""

    def gloo(self):
        return NO_COSTS


def local_shapes(shapes, local):
    """What a rank has of each tensor, once the `local` ranks of its node have shared them out."""
    return {name: torch.Size((-(-shape.numel() // local),)) for name, shape in shapes.items()}


def step_times(arguments, shapes, ranks):
    """{(way, method): Forecast} among that many ranks."""
    local = min(arguments.local, ranks)
    network = Network(link_rate(arguments.link), duration(arguments.latency), local=local)
    computing = Computing(duration(arguments.step), 0.0, arguments.jitter)
    computing = computing._replace(share=1 / 8)  # cores enough for each rank
    flat, bench = Situation(shapes, ranks, network, computing), RanksOfMachines(shapes, ranks, repeat=2)
    found = {("ring", "fp16"): forecast("fp16", flat, bench)}
    for method in arguments.methods:
        found["flat", method] = forecast(method, flat, bench)
    if ranks <= local:
        return found
    nodes, parts = ranks // local, local_shapes(shapes, local)
    entries = sum(shape.numel() for shape in shapes.values())
    inside = 2 * 8 * 4 * entries * (local - 1) / local / link_rate(arguments.local_rate)  # both ways through the node
    share = Network(network.rate / local, network.latency)
    levels, bench = Situation(parts, nodes, share, computing), RanksOfMachines(parts, nodes, repeat=2)
    for method in arguments.methods:
        each = forecast(method, levels, bench)
        found["levels", method] = each._replace(seconds=each.seconds + inside)
    return found


def growth(arguments, shapes, ranks):
    """What grows with the ranks in the first method's exchange, none of it time on the link."""
    policy = dataclasses.replace(method_policy(arguments.methods[0]), exchange="twophase")
    start = time.perf_counter()
    plan = Plan(policy, shapes, ranks)
    seconds = time.perf_counter() - start
    pieces = [len(entry.pieces) for entry in plan.entries.values()]
    owned = [0] * ranks
    for entry in plan.entries.values():
        for piece in entry.pieces:
            owned[piece.owner] += piece.numel
    text = json.dumps({"format": 3, "compression": policy.to_dict(), "plan": plan.digest(), "step": 0})
    return {
        "sent": step_bytes(policy, shapes, ranks)[1],
        "fan_in": (ranks - 1) * sum(1 for count in owned if count) / ranks,
        "most_owned": max(owned) / (sum(owned) / ranks),
        "pieces": sum(pieces),
        "plan_seconds": seconds,
        "text_bytes": ranks * len(text),
    }


def simulate(arguments):
    shapes = shapes_named(arguments.model)
    rows = []
    print(
        f"{arguments.model}, {sum(s.numel() for s in shapes.values()) / 1e6:.1f} M parameters, a step of "
        f"{arguments.step} without exchange, nodes of {arguments.local} ranks with a link of {arguments.link}\n"
    )
    ways = [("ring", "fp16"), *((way, method) for method in arguments.methods for way in ("flat", "levels"))]
    print("| ranks | " + " | ".join(f"{way} `{method}`" for way, method in ways) + " |")
    print("|---" * (len(ways) + 1) + "|", flush=True)
    for ranks in arguments.ranks:
        times = step_times(arguments, shapes, ranks)
        cells = [in_seconds(times[way].seconds) if way in times else "-" for way in ways]
        print(f"| {ranks} | " + " | ".join(cells) + " |", flush=True)
        rows += [{"ranks": ranks, "way": way, **each._asdict()} for (way, _), each in times.items()]
    print("\n| ranks | sent by a rank | owners' fan-in | largest share | pieces | plan made in | texts read |")
    print("|---|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        row = growth(arguments, shapes, ranks)
        rows.append({"ranks": ranks, **row})
        print(
            f"| {ranks} | {row['sent'] / 1e6:.2f} MB | {row['fan_in']:.0f} payloads "
            f"| {row['most_owned']:.2f} of the mean | {row['pieces']:,} | {in_seconds(row['plan_seconds'])} "
            f"| {row['text_bytes'] / 1e6:.2f} MB |",
            flush=True,
        )
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))
    if arguments.plot:
        plot(arguments, [row for row in rows if "way" in row])


def plot(arguments, rows):
    """Step time against ranks."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    curves = list(dict.fromkeys((row["way"], row["method"]) for row in rows))
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(method for _, method in curves))}
    for way, method in curves:
        points = [(row["ranks"], row["seconds"]) for row in rows if (row["way"], row["method"]) == (way, method)]
        look = {"ring": ":", "flat": "--", "levels": "-"}[way]
        axis.plot(*zip(*points, strict=True), look, marker="o", color=colours[method], label=f"{way}: {method}")
    axis.axhline(duration(arguments.step), color="black", linewidth=0.8, label="no exchange")
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="seconds a step (predicted)")
    axis.set_xticks(arguments.ranks, [str(ranks) for ranks in arguments.ranks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axis.set_title(f"{arguments.model}, nodes of {arguments.local} ranks on {arguments.link}")
    axis.grid(which="both", alpha=0.2)
    axis.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize="small")
    pathlib.Path(arguments.plot).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.plot, dpi=110, bbox_inches="tight")
    print(f"\nthe curves are drawn in {arguments.plot}")


def check():
    """Real ranks: few entries on a link that is slow enough to decide, whatever the cores do."""
    sys.argv = ["plan_check.py", "--rate", "100mbit", "--ranks", "2", "4", "8", "16"]
    sys.argv += ["--parameters", "1", "--steps", "5", "--batch", "8", "--methods", "fp16", "quantize:bits=4@twophase"]
    sys.argv += ["topk:sparsity=0.9@allgather"]
    plan_check.check(plan_check.parse())


if __name__ == "__main__":
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check() if options.check else simulate(options)
