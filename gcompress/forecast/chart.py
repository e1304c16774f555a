"""The picture of `gcompress plan`: step time against the speed of the link."""

from __future__ import annotations

import importlib.util
import pathlib

from ..errors import ConfigError
from ..units import in_bits
from .advice import ADVISED, PLAIN, Situation

MOST_CURVES = 9


def check_matplotlib() -> None:
    """ConfigError if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot: needs matplotlib, which is not installed: pip install matplotlib")


def rates_around(rate: float) -> list[float]:
    """Bits per second from a hundredth of a rate to a hundred times it, four in each decade."""
    return [rate * 10 ** (number / 4) for number in range(-8, 9)]


def curves_shown(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """The first MOST_CURVES: what may be advised, top-k, and the others in their order."""
    order = dict.fromkeys((*ADVISED, "topk:sparsity=0.99", *curves))
    return {name: curves[name] for name in [name for name in order if name in curves][:MOST_CURVES]}


def step_chart(path: str, rates: list[float], curves: dict[str, list[float]], situation: Situation) -> None:
    """Draw {method: seconds at each rate} to a file, whose ending is the format."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for number, (method, seconds) in enumerate(curves_shown(curves).items()):
        plain = method in PLAIN
        axis.plot(rates, seconds, "--" if plain else "-", marker="o", markersize=3, label=method, color=f"C{number}")
    if situation.computing.seconds:
        axis.axhline(situation.computing.seconds, color="black", linestyle=":", label="no exchange")
    axis.axvline(situation.network.rate, color="grey", linewidth=0.8, label="the link")
    axis.set(xscale="log", yscale="log", ylabel="seconds a step (predicted)")
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rate, _: in_bits(rate)))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axis.set_xlabel("rate of the link that all ranks share" if situation.network.shared else "rate of a machine's link")
    entries = sum(shape.numel() for shape in situation.shapes.values())
    axis.set_title(f"{situation.ranks} ranks, {entries / 1e6:.1f} M parameters")
    axis.grid(which="both", alpha=0.2)
    axis.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize="small")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except ValueError as error:
        raise ConfigError(f"plot: got {path}: {error}") from None
