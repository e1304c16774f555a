#!/usr/bin/env python3
"""Error against size: what each compressor loses, and the bits it really needs.

    python benchmarks/distortion.py                            # table, and runs/distortion.png
    python benchmarks/distortion.py --specs eden:bits=2 mask:sparsity=0.99,bits=2 --no-gradients

The error is the normalised mean squared error |x - x'|^2 / |x|^2 of one tensor of --numel entries drawn from a
distribution, or of all layers of 1024 entries and more of a network's gradient, each layer compressed for itself. Bits
are those of the payloads: 8 times their bytes over the entries. Gradients are those that tools/record_gradients.py
records; it is run, for some minutes, if there are none yet. Unbiased compressors are marked with *: their error is
larger, but averages out over ranks.
"""

import argparse
import pathlib
import sys

import torch
from example_specs import with_every_method

from gcompress import from_spec

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

import record_gradients  # noqa: E402

SPECS = [
    "polar:rate=0.1",
    "polar:rate=0.25",
    "polar:rate=0.5",
    "polar:rate=1.0",
    "polar:rate=2.0",
    "polar:rate=3.0",
    "polar:rate=1.0,unbiased=true",
    "eden:bits=0.1",
    "eden:bits=0.5",
    "eden:bits=1",
    "eden:bits=1,scale=unbiased",
    "eden:bits=2",
    "eden:bits=2,scale=unbiased",
    "eden:bits=3",
    "eden:bits=4",
    "eden:bits=6",
    "eden:bits=8",
    "sign",
    "sign:bucket=1024",
    "onebit",
    "ternary",
    "ternary:rounding=nearest,bucket=1024",
    "qsgd:bits=4",
    "qsgd:bits=4,norm=max",
    "natural",
    "quantize:bits=1",
    "quantize:bits=2",
    "quantize:bits=4",
    "quantize:bits=4,bucket=128",
    "quantize:bits=4,rounding=stochastic",
    "quantize:bits=8",
    "mxfp4",
    "fp8",
    "bf16",
    "fp16",
    "topk:sparsity=0.999",
    "topk:sparsity=0.99",
    "topk:sparsity=0.9",
    "mask:sparsity=0.99,bits=1",
    "mask:sparsity=0.99,bits=2",
    "mask:sparsity=0.99,bits=2,levels=lloyd",
    "mask:sparsity=0.99,bits=3",
    "randomk:sparsity=0.99",
    "threshold:threshold=0.3,relative=true",
    "chain:(topk:sparsity=0.99),(quantize:bits=4)",
    "hybrid:(topk:sparsity=0.999),(quantize:bits=2)",
    "entropy:(quantize:bits=4)",
    "shared:bits=4",
    "lowrank:rank=4",
]
SMALLEST_LAYER = 1024  # smaller ones go uncompressed, as with the default policy


def distributions(numel, seed=0):
    """{name: float32 tensor of numel entries}"""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(5, numel, generator=generator)
    uniform = torch.rand(numel, generator=generator, dtype=torch.float64) - 0.5
    return {
        "Gauss": gauss[0],
        "Laplace": (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float(),
        "Student-t3": gauss[1] / (gauss[2:].square().sum(0) / 3).sqrt(),
        "log-normal 1.5": torch.exp(1.5 * gauss[1]) * gauss[0].sign(),
    }


def measure(compressor, tensors, seed=1):
    """(bits per entry, normalised mean squared error) over a list of tensors, each compressed for itself."""
    size = error = power = entries = 0.0
    for number, tensor in enumerate(tensors):
        payload, ctx = compressor.compress(tensor, seed=seed + number)
        difference = compressor.decompress(payload, ctx).double() - tensor.double()
        size, entries = size + payload.numel(), entries + tensor.numel()
        error, power = error + float(difference.square().sum()), power + float(tensor.double().square().sum())
    return 8 * size / entries, error / power


def recorded_gradients(path):
    """{"network phase": layers of 1024 entries and more}"""
    if not path.exists():
        print(f"{path}: not there, recording gradients", file=sys.stderr, flush=True)
        record_gradients.write(path)
    return {
        f"{network} {phase}": [layer for layer in layers.values() if layer.numel() >= SMALLEST_LAYER]
        for network, phases in record_gradients.load(path).items()
        for phase, layers in phases.items()
    }


def print_table(sources, results):
    names = list(sources)
    print(f"| compressor | bits | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 2))
    for spec, row in results.items():
        figures = " | ".join(f"{row[name][1]:.2g}" if row[name][1] < 0.001 else f"{row[name][1]:.4f}" for name in names)
        print(f"| `{spec}`{' *' if from_spec(spec).unbiased else ''} | {row[names[0]][0]:.3f} | {figures} |")


def plot(path, sources, results):
    """One panel for each source; points of one method are joined."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20").colors
    columns = min(5, len(sources))
    rows = -(-len(sources) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.6 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(sources) :]:
        axis.axis("off")
    for axis, source in zip(axes.flat, sources, strict=False):
        curves = {}
        for spec, row in results.items():
            kind = spec.partition(":")[0] + (" (unbiased)" if from_spec(spec).unbiased else "")
            curves.setdefault(kind, []).append(row[source])
        for number, (kind, points) in enumerate(curves.items()):
            look = {"marker": "os^vD"[number % 5], "color": colours[number % len(colours)], "markersize": 4}
            axis.plot(*zip(*sorted(points), strict=True), label=kind, **look)
        if source == "Gauss":
            bits = torch.linspace(0, 9, 50)
            axis.plot(bits, 4.0**-bits, "k:", label="bound, 4^-bits")
        axis.set(title=source, xlabel="bits per entry, from packed bytes", xlim=(0, 9.2), yscale="log", ylim=(1e-5, 4))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("|x - x'|² / |x|²")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=8, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / rows if len(labels) > 16 else 0.2 / rows, 1, 1))
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=with_every_method(SPECS), metavar="SPEC", help="what to measure")
    parser.add_argument("--numel", type=int, default=2**20, help="entries drawn from a distribution (default 2^20)")
    parser.add_argument("--gradients", type=pathlib.Path, default=record_gradients.DEFAULT_PATH, metavar="FILE")
    parser.add_argument("--no-gradients", action="store_true", help="distributions only")
    parser.add_argument("--plot", default=REPOSITORY / "runs" / "distortion.png", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = {name: [tensor] for name, tensor in distributions(arguments.numel).items()}
    if not arguments.no_gradients:
        sources.update(recorded_gradients(arguments.gradients))
    results = {
        spec: {name: measure(from_spec(spec), tensors) for name, tensors in sources.items()} for spec in arguments.specs
    }
    print_table(sources, results)
    plot(arguments.plot, sources, results)
    print(f"plot: {arguments.plot}", file=sys.stderr)


if __name__ == "__main__":
    main()
