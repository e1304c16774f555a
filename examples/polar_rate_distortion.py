#!/usr/bin/env python3
"""The polar quantizer beside what other codes reach at best and what no code can: error against rate.

    python examples/polar_rate_distortion.py                 # tables, and runs/polar_rate_distortion.png
    python examples/polar_rate_distortion.py --quick         # fewer entries, half a minute
    python examples/polar_rate_distortion.py --bits          # PolarCode: fair bits, Hamming distortion

Sources are N(0, 1), Laplace, Student's t of 3 degrees of freedom, and gradients that
tools/record_gradients.py recorded, if the file is there. The error is the NMSE: sum of
(x - decoded)^2 over sum of x^2. Polar's rate is that of the bytes that compress() returned, scales
and all; the others are calculated, the better for them (ideal_codes.py):

    EDEN        random rotation, Lloyd-Max levels of a Gaussian; below 1 bit a share of the entries
    trellis     random rotation, trellis-coded quantization with 256 states
    top-k       positions and signs at their entropy, kept magnitudes by Lloyd-Max levels, best k
    QSGD        quantize:bits=…,rounding=stochastic, a scale for 1024 entries; at 1 and 2 bits (and .04 more)
    scalar      uniform with a dead zone, centroids, at its entropy
    + scales    the same, its entropy coder knowing row and column scales as Polar does, and paying for them
    low rank    the best product of thin matrices in float16
    rank 0      polar:rank=0, which sends no product of thin matrices apart
    bound       of a memoryless source of this histogram (Blahut, Arimoto), which a Gaussian's is 2^(-2 rate);
                for gradients of independent Gaussian entries whose row and column scales are known for nothing;
                layers of low rank are none of that, and below it there is much to be had
"""

import argparse
import math
import pathlib
import sys
import time

import numpy as np
import torch

from gcompress import Polar, Quantize
from gcompress.compressors.polar.bits import PolarCode
from ideal_codes import (
    Trellis,
    bound_given_scales,
    lloyd_max_rotated,
    low_rank,
    memoryless_bound,
    scalar,
    scalar_with_scales,
    top_k,
)
from training_report import COLOURS

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RATES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
LAYER_RATES = (0.25, 0.5, 1.0, 2.0)
LARGE = 100_000  # entries of a layer in the tables
COLUMNS = ("polar", "rank 0", "EDEN", "trellis", "QSGD", "top-k", "low rank", "scalar", "+ scales", "bound")
STYLES = {  # colour, line, width
    "polar": (COLOURS[1], "o-", 2.2),
    "rank 0": (COLOURS[1], ":", 1.6),
    "EDEN": (COLOURS[3], "v--", 1.2),
    "trellis": (COLOURS[2], "D:", 1.2),
    "top-k": (COLOURS[4], "^--", 1.2),
    "low rank": ("#777777", "P--", 1.2),
    "scalar": (COLOURS[0], "s--", 1.2),
    "+ scales": (COLOURS[5], "x-.", 1.2),
    "bound": (COLOURS[6], "-", 1.2),
}


def progress(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def polar_point(tensor, rate, options):
    """(bits per entry, NMSE) by the public interface."""
    compressor = Polar(rate=rate, **options)
    payload, ctx = compressor.compress(tensor)
    error = (compressor.decompress(payload, ctx) - tensor).double().square().sum() / tensor.double().square().sum()
    return 8 * payload.numel() / tensor.numel(), float(error)


def qsgd_errors(tensor):
    """{bits: NMSE} of uniform levels with unbiased rounding."""
    errors = {}
    for bits in (1, 2):
        compressor = Quantize(bits=bits, rounding="stochastic")
        error = compressor.decompress(*compressor.compress(tensor, seed=1)) - tensor
        errors[float(bits)] = float(error.double().square().sum() / tensor.double().square().sum())
    return errors


def trellis_errors(quick):
    """{rate: NMSE} on rotated entries, whatever the source."""
    generator, errors = np.random.default_rng(1), {}
    sequences, iterations = (48, 4) if quick else (128, 8)
    for bits, size in ((1, 2), (1, 1), (2, 1)):
        trellis = Trellis(bits, size)
        trellis.train(generator.standard_normal((sequences, 256, size)).astype(np.float32), iterations)
        errors[trellis.rate] = trellis.error(generator.standard_normal((sequences // 2, 512, size)).astype(np.float32))
        progress(f"trellis, {trellis.rate:g} bits: {errors[trellis.rate]:.4f}")
    return errors


def sources(numel):
    generator = torch.Generator().manual_seed(1)
    gauss = torch.randn(4, numel, generator=generator)
    uniform = torch.rand(numel, generator=generator, dtype=torch.float64) - 0.5
    laplace = (-torch.sign(uniform) * torch.log1p(-2 * uniform.abs())).float()
    return {
        "Gauss": torch.randn(numel, generator=generator),
        "Laplace": laplace,
        "Student t, 3 degrees": gauss[0] / (gauss[1:].square().mean(0)).sqrt(),
    }


def source_errors(tensor, rates, trellis, options):
    """{column: {rate: NMSE}} for entries without order."""
    x = tensor.double().numpy()
    return {
        "polar": dict(polar_point(tensor, rate, options) for rate in rates),
        "EDEN": {rate: lloyd_max_rotated(rate) for rate in rates},
        "trellis": trellis,
        "QSGD": qsgd_errors(tensor),
        "top-k": dict(zip(rates, top_k(x, rates), strict=True)),
        "scalar": dict(zip(rates, scalar(x, rates), strict=True)),
        "bound": dict(zip(rates, memoryless_bound(x, rates), strict=True)),
    }


def layer_errors(tensor, rates, trellis, options):
    """The same for a layer's gradient, with scales."""
    matrix = tensor.double().flatten(1).numpy()
    return {
        "polar": dict(polar_point(tensor, rate, options) for rate in rates),
        "rank 0": {rate: polar_point(tensor, rate, {**options, "rank": 0})[1] for rate in rates},
        "EDEN": {rate: lloyd_max_rotated(rate) for rate in rates},
        "trellis": trellis,
        "QSGD": qsgd_errors(tensor),
        "low rank": dict(zip(rates, low_rank(matrix, rates), strict=True)),
        "top-k": dict(zip(rates, top_k(matrix.ravel(), rates), strict=True)),
        "scalar": dict(zip(rates, scalar(matrix.ravel(), rates), strict=True)),
        "+ scales": dict(zip(rates, scalar_with_scales(matrix, rates), strict=True)),
        "bound": {rate: bound_given_scales(matrix, rate) for rate in rates},
    }


def large_layers(path, quick):
    """{key: tensor} of the file's layers of LARGE entries and more; of the last step alone with `quick`."""
    with np.load(path) as file:
        layers = {key: torch.from_numpy(file[key]).float() for key in file.files}
    return {
        key: layer
        for key, layer in layers.items()
        if layer.numel() >= LARGE and layer.dim() > 1 and layer.any() and (not quick or "/late/" in key)
    }


def mean_errors(of_layers):
    """Column by column and rate by rate the mean over layers, whose rates are the same but for a few bytes."""
    return {
        column: dict(zip(rates, np.mean([list(errors[column].values()) for errors in of_layers], 0), strict=True))
        for column, rates in of_layers[0].items()
    }


def table(title, errors, rates, gap_to):
    """Lines of NMSE by rate; `gap_to` is what Polar's distance in dB is measured from."""
    columns = [column for column in COLUMNS if column in errors]
    lines = ["", title, "  rate" + "".join(f"{column:>10}" for column in columns) + f"{'polar over ' + gap_to:>24}"]
    for rate, polar in zip(rates, errors["polar"].values(), strict=True):
        cells = [polar if column == "polar" else errors[column].get(rate) for column in columns]
        shown = "".join(f"{'-':>10}" if cell is None else f"{cell:10.4f}" for cell in cells)
        lines.append(f"{rate:6g}{shown}{10 * math.log10(polar / errors[gap_to][rate]):21.2f} dB")
    return "\n".join(lines)


def layer_table(of_layers):
    """Per layer and rate a line, what is least but for the bound with a star; and how often Polar is."""
    width = max(map(len, of_layers))
    lines, wins = [], 0
    lines += ["", f"recorded layers of {LARGE} entries and more, NMSE (*: the least; the bound is no code)"]
    lines += [f"{'layer':<{width}}  rate" + "".join(f"{column:>10}" for column in COLUMNS)]
    for key, errors in of_layers.items():
        for rate, polar in zip(errors["bound"], errors["polar"].values(), strict=True):
            if rate not in LAYER_RATES:
                continue
            cells = {column: polar if column == "polar" else errors[column].get(rate) for column in COLUMNS}
            least = min(cells[column] for column in COLUMNS if cells[column] and column not in ("rank 0", "bound"))
            wins += polar == least
            marks = [f"{cell:.4f}{'*' if cell == least else ' '}" if cell else "- " for cell in cells.values()]
            lines.append(f"{key:<{width}}{rate:6g}" + "".join(f"{mark:>10}" for mark in marks))
    lines.append(f"Polar errs least in {wins} of {len(LAYER_RATES) * len(of_layers)} cases.")
    return "\n".join(lines)


def draw(panels, path):
    """Above the NMSE of every panel, below its distance to the panel's bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(panels), figsize=(4.6 * len(panels), 8.4), sharex=True, squeeze=False)
    handles = {}
    for (title, errors), (upper, lower) in zip(panels.items(), axes.T, strict=True):
        rates = list(errors["bound"])
        for column in COLUMNS:
            if column not in errors or column not in STYLES:
                continue
            points = sorted(errors[column].items())
            x, decibels = [rate for rate, _ in points], [10 * math.log10(error) for _, error in points]
            bound = np.interp(x, rates, 10 * np.log10([errors["bound"][rate] for rate in rates]))
            colour, style, thickness = STYLES[column]
            line = dict(color=colour, linewidth=thickness, markersize=4.5, zorder=3 if column == "polar" else 2)
            handles[column] = upper.plot(x, decibels, style, **line)[0]
            lower.plot(x, decibels - bound, style, **line)
        upper.set_title(title)
        lower.set_xlabel("rate (bits per entry)")
        below = min(
            10 * math.log10(a / b) for a, b in zip(errors["polar"].values(), errors["bound"].values(), strict=True)
        )
        lower.set_ylim(min(-0.2, below - 0.5), 4.2)
        for axis in (upper, lower):
            axis.set_xlim(0, 3.05)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("NMSE (dB)")
    axes[1, 0].set_ylabel("NMSE over the bound (dB)")
    names = {
        "polar": "polar (packed bytes, all charged)",
        "rank 0": "polar:rank=0",
        "EDEN": "EDEN: rotation, Lloyd-Max",
        "trellis": "rotation, trellis of 256 states",
        "top-k": "top-k, ideal index coding",
        "low rank": "low rank, float16",
        "scalar": "uniform scalar, ideal entropy coding",
        "+ scales": "the same, given row and column scales",
        "bound": "bound",
    }
    figure.legend(handles.values(), [names[column] for column in handles], loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.075, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    progress(f"drawn: {path}")


def real_valued(arguments):
    options = {"block": arguments.block, "list_size": arguments.list_size}
    trellis, panels = trellis_errors(arguments.quick), {}
    for name, tensor in sources(2**17 if arguments.quick else arguments.entries).items():
        progress(f"{name}: {tensor.numel()} entries")
        panels[name] = source_errors(tensor, RATES, trellis, options)
        print(table(f"{name}, {tensor.numel()} entries, NMSE", panels[name], RATES, "bound"), flush=True)
    if arguments.gradients.exists():
        of_layers = {}
        for key, layer in large_layers(arguments.gradients, arguments.quick).items():
            progress(f"{key}: {tuple(layer.shape)}")
            rates = LAYER_RATES if arguments.quick else RATES
            of_layers[key] = layer_errors(layer, rates, trellis, options)
        if of_layers:
            name = f"recorded gradients, mean of {len(of_layers)} layers"
            panels[name] = mean_errors(list(of_layers.values()))
            print(table(f"{name}, NMSE", panels[name], rates, "bound"))
            print(layer_table(of_layers))
        else:
            progress(f"{arguments.gradients} has no layer of {LARGE} entries: left out")
    else:
        progress(f"no file {arguments.gradients}: recorded gradients left out (tools/record_gradients.py makes it)")
    draw(panels, arguments.out)


def inverse_entropy(bits):
    """h^-1: the p of at most 1/2 with -p log2 p - (1 - p) log2(1 - p) = bits."""
    low, high = 0.0, 0.5
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if -p * math.log2(p) - (1 - p) * math.log2(1 - p) < bits else (low, p)
    return low


def fair_bits(quick):
    """PolarCode's share of wrong bits beside the least possible."""
    numel, blocks = (2**18, (256, 1024, 4096, 16384)) if quick else (2**21, (256, 1024, 4096, 16384, 65536))
    bits = torch.randint(0, 2, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rates = [k / 10 for k in range(1, 10)]
    print(f"share of wrong bits, {numel} fair bits; information = round(block rate)")
    print(f"{'rate':<14}" + "".join(f"{rate:8g}" for rate in rates))
    for block in blocks:
        progress(f"blocks of {block}")
        line = f"block {block:<8}"
        for rate in rates:
            code = PolarCode(block, round(block * rate))
            line += f"{float((code.decompress(code.compress(bits), numel) != bits).double().mean()):8.4f}"
        print(line, flush=True)
    print(f"{'h^-1(1 - rate)':<14}" + "".join(f"{inverse_entropy(1 - rate):8.4f}" for rate in rates))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer entries, recorded layers of the last step alone")
    parser.add_argument("--bits", action="store_true", help="only PolarCode on fair bits")
    parser.add_argument("--entries", type=int, default=2**19, metavar="N", help="of every source (%(default)s)")
    parser.add_argument("--block", type=int, default=4096, metavar="N", help="Polar's longest block (%(default)s)")
    parser.add_argument("--list-size", type=int, default=1, metavar="L", help="Polar's: 1, 2, 4 or 8 (%(default)s)")
    parser.add_argument(
        "--gradients", type=pathlib.Path, default=REPOSITORY / "runs" / "gradients.npz", metavar="FILE",
        help="what tools/record_gradients.py wrote (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=pathlib.Path, default=REPOSITORY / "runs" / "polar_rate_distortion.png", metavar="PNG",
        help="the picture (%(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.entries < 1000:
        parser.error(f"--entries: got {arguments.entries}, expected at least 1000")
    fair_bits(arguments.quick) if arguments.bits else real_valued(arguments)


if __name__ == "__main__":
    main()
