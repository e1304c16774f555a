"""`gcompress plan`: which compression pays on a link, by measuring here and predicting the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence

import torch

from .checks import check_integer, check_number
from .errors import ConfigError
from .forecast.advice import (
    ADVISED,
    PLAIN,
    WORTH_IT,
    Bench,
    Forecast,
    Situation,
    code_line,
    every_method,
    forecast,
    truest,
)
from .forecast.model_shapes import BUILT_IN, shapes_listed, shapes_named
from .forecast.network import EFFICIENCY, Network
from .forecast.step_bytes import BUCKET_BYTES
from .forecast.timeline import AFTER, BACKWARD, Computing
from .policy import Policy
from .units import byte_count, duration, in_bits, in_seconds, link_rate

DESCRIPTION = """\
Which compression pays on a link? Measures here what encoding, adding up and decoding a model's gradients takes, for
every method, and predicts a step of data-parallel training among RANKS ranks: computation, link, and what of the
exchange hides behind the backward pass. Takes about a second a method. Nothing is sent.

  gcompress plan --ranks 8 --link 1gbit --model resnet50 --step 300ms
  gcompress plan --ranks 4 --link 100mbit --shared --ranks-per-machine 4 --shapes 1449x1449*4,1449*4 --step 80ms
  gcompress plan --ranks 16 --link 10Gb/s --model mymodule:make_model --plot plan.png
"""
EPILOG = f"""\
models: {", ".join(BUILT_IN)}; those of torchvision, if it is installed; module:function that returns a module;
a saved state dict (.pt, .pth, .safetensors).
methods: a compressor's spec, SPEC@EXCHANGE (allgather, twophase, summed), or a policy's text; `none`, `fp16` and `bf16`
are the engine's own all-reduce.
advice: among {", ".join(ADVISED)}: the first in this order whose step is at most {WORTH_IT - 1:.0%} longer than the
shortest. The others lose accuracy on some models unless they are set with care: choose them knowing that.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `gcompress plan`."""
    made = argparse.ArgumentParser(
        prog="gcompress plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--ranks", type=int, required=True, help="how many train")
    add("--link", required=True, metavar="RATE", help="of each machine's link: 100mbit, 1gbit, 10Gb/s, 125MB/s")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="whose gradients: a name, module:function or a file, see below")
    what.add_argument("--shapes", metavar="LIST", help="or their shapes: 512x512*12,768, or a JSON object")
    add(
        "--step",
        default="0",
        metavar="TIME",
        help="what a step takes without exchange: 300ms (default: 0, exchange alone)",
    )
    add("--shared", action="store_true", help="all ranks share the one link; otherwise each machine has its own")
    add("--latency", default="100us", metavar="TIME", help="of the link, one way (%(default)s)")
    add("--ranks-per-machine", type=int, default=1, metavar="N", help="that share its link and cores (%(default)s)")
    add("--cores", type=int, metavar="N", help="of a machine (those of this one)")
    add(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="PART",
        help="of the rate, left for data (TCP: %(default).3f)",
    )
    add("--burst", default="1", metavar="BYTES", help="that pass at once after a pause, as with tc's tbf (none)")
    add("--bucket", default=str(BUCKET_BYTES), metavar="BYTES", help="of DistributedDataParallel's buckets (25MiB)")
    add(
        "--jitter",
        type=float,
        default=0.0,
        metavar="PART",
        help="deviation of the ranks' computing times (%(default)s)",
    )
    add("--device", default="cpu", help="where gradients lie and are encoded: cpu or cuda (%(default)s)")
    add("--methods", nargs="+", metavar="METHOD", help="instead of every method")
    add("--plot", metavar="FILE", help="draw step time against the link's rate")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--quiet", action="store_true", help="show no progress")
    return made


def plan(arguments: Sequence[str], make_bench: Callable = Bench) -> None:
    """which compression pays: gcompress plan --ranks 8 --link 1gbit --model resnet50 --step 300ms"""
    options = parser().parse_args(arguments)
    if options.plot:
        from .forecast.chart import check_matplotlib

        check_matplotlib()
    shapes = shapes_named(options.model) if options.model else shapes_listed(options.shapes)
    situation, device = situation_of(options, shapes), device_of(options.device)
    methods = list(dict.fromkeys(options.methods or every_method()))
    bench = make_bench(shapes, situation.ranks, device)
    forecasts = sorted(measured(methods, situation, bench, options.quiet), key=lambda each: each.seconds)
    advised = truest(forecasts) if any(each.method in ADVISED for each in forecasts) else None
    if options.json:
        print(json.dumps(as_json(options, situation, forecasts, advised), indent=1))
    else:
        print(
            "\n".join([*table(forecasts), "", *advice(forecasts, advised, situation), "", *assumed(options, situation)])
        )
    if options.plot:
        draw(options.plot, [each.method for each in forecasts], situation, bench, options.json)


def situation_of(options: argparse.Namespace, shapes: dict[str, torch.Size]) -> Situation:
    """The Situation that the arguments describe; ConfigError names the one that does not fit."""
    check_integer("ranks", options.ranks, 2)
    check_integer("ranks-per-machine", options.ranks_per_machine, 1, options.ranks)
    cores = options.cores if options.cores is not None else os.cpu_count() or 1
    check_integer("cores", cores, 1)
    check_number("jitter", options.jitter, 0, 10)
    network = Network(
        link_rate(options.link),
        duration(options.latency, "latency"),
        options.shared,
        1 if options.shared else options.ranks_per_machine,
        options.efficiency,
        byte_count(options.burst, "burst"),
    )
    computing = Computing(duration(options.step, "step"), options.ranks_per_machine / cores, options.jitter)
    return Situation(shapes, options.ranks, network, computing, byte_count(options.bucket, "bucket"))


def device_of(name: str) -> torch.device:
    """The device of a name; ConfigError if there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: got {name!r}, expected cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch sees no GPU here, expected cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {name!r}, expected cpu or cuda")
    return device


def measured(methods: Sequence[str], situation: Situation, bench: Bench, quiet: bool) -> list[Forecast]:
    """A Forecast of each method; says on stderr which one is being measured."""
    show = not quiet and sys.stderr.isatty()
    found = []
    for number, method in enumerate(methods, 1):
        if show:
            print(f"\r\033[K{number} of {len(methods)}: {method}", end="", file=sys.stderr, flush=True)
        elif not quiet and number in (1, 1 + len(methods) // 2):
            print(f"measuring: {number - 1} of {len(methods)} methods done", file=sys.stderr, flush=True)
        found.append(forecast(method, situation, bench))
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return found


def table(forecasts: Sequence[Forecast]) -> list[str]:
    """The lines of a table, in the forecasts' order."""
    base = next((each.seconds for each in forecasts if each.method == "none"), None)
    width = max(6, *(len(each.method) for each in forecasts))
    lines = [f"{'method':{width}s} {'step':>9s} {'x none':>7s} {'sent':>10s} {'link busy':>10s} {'processor':>10s}"]
    for each in forecasts:
        times = f"{base / each.seconds:.2f}" if base else "-"
        lines.append(
            f"{each.method:{width}s} {in_seconds(each.seconds):>9s} {times:>7s} {each.wire_bytes / 1e6:>7.2f} MB "
            f"{in_seconds(each.link_seconds):>10s} {in_seconds(each.codec_seconds):>10s}"
        )
    return lines


def advice(forecasts: Sequence[Forecast], advised: Forecast | None, situation: Situation) -> list[str]:
    """What to do, in a sentence, and the line of code."""
    if advised is None:
        return [f"No advice: none of {', '.join(ADVISED)} is among the methods."]
    by_name = {each.method: each for each in forecasts}
    takes = f"a step is predicted to take {in_seconds(advised.seconds)}"
    others = [
        f"{in_seconds(by_name[name].seconds)} with {name}"
        for name in PLAIN
        if name in by_name and name != advised.method
    ]
    against = f", against {', '.join(others)}" if others else ""
    if advised.method == "none":
        why = (
            " The exchange hides behind the backward pass."
            if advised.seconds < 1.1 * situation.computing.seconds
            else ""
        )
        lines = [f"Do not compress: {takes} without{against}.{why}"]
    elif advised.method in PLAIN:
        lines = [f"Send {advised.method}, no compressor is worth more: {takes}{against}."]
    else:
        lines = [f"Compress with {advised.method}: {takes}{against}."]
    return [*lines, "", f"    {code_line(advised.method)}"]


def assumed(options: argparse.Namespace, situation: Situation) -> list[str]:
    """What the prediction rests on."""
    network, entries = situation.network, sum(shape.numel() for shape in situation.shapes.values())
    share = situation.computing.share
    cores = f"{share:g} ranks for each core" if share > 1 else "a core for each rank"
    where = "that all ranks share" if network.shared else f"for each machine of {options.ranks_per_machine} rank(s)"
    step = in_seconds(situation.computing.seconds)
    by_nodes = situation.topology(Policy(None)).by_nodes
    return [
        f"Assumed: {len(situation.shapes)} tensors, {entries:,} entries; {situation.ranks} ranks; a link of "
        f"{in_bits(network.rate)} {where}, {network.efficiency:.0%} of it for data, "
        f"{in_seconds(network.latency)} one way;",
        *(["compressed gradients summed within each machine first (docs/NODES.md);"] if by_nodes else []),
        f"a step of {step} without exchange, {BACKWARD:.0%} of it the backward pass, in which gradients come evenly, "
        f"{AFTER:.0%} the optimizer; {cores};",
        f"DistributedDataParallel's buckets of {situation.bucket_bytes / 2**20:g} MiB on Gloo. Encoders, decoders and "
        f"copies were measured here, on {options.device}, with one thread.",
    ]


def as_json(
    options: argparse.Namespace, situation: Situation, forecasts: Sequence[Forecast], advised: Forecast | None
) -> dict:
    """Everything as JSON-able values: seconds, bytes, bits per second."""
    network, computing = situation.network, situation.computing
    return {
        "ranks": situation.ranks,
        "entries": sum(shape.numel() for shape in situation.shapes.values()),
        "link": {
            "bits_per_second": network.rate,
            "latency": network.latency,
            "shared": network.shared,
            "efficiency": network.efficiency,
        },
        "step": computing.seconds,
        "ranks_per_core": computing.share,
        "advice": advised.method if advised else None,
        "code": code_line(advised.method) if advised else None,
        "methods": [each._asdict() for each in forecasts],
    }


def draw(path: str, methods: Sequence[str], situation: Situation, bench: Bench, quiet: bool) -> None:
    """Step time against the link's rate, of the methods worth a curve."""
    from .forecast.chart import rates_around, step_chart

    rates = rates_around(situation.network.rate)
    curves: dict[str, list[float]] = {method: [] for method in methods}
    for rate in rates:
        there = situation.on(_faster(situation.network, rate))
        for method in methods:
            curves[method].append(forecast(method, there, bench).seconds)
    step_chart(path, rates, curves, situation)
    if not quiet:
        print(f"\nthe curves are drawn in {path}")


def _faster(network, rate):
    return dataclasses.replace(network, rate=rate)
