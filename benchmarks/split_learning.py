#!/usr/bin/env python3
"""The comparison of the mask-sparsification paper, on Fashion-MNIST: accuracy and bytes of compressors at equal bytes.

    python benchmarks/split_learning.py --cuts shallow medium deep --plot runs/split-bytes.png

Trains `--arch` with its two halves as two processes, without compression, with 3-bit quantization, and with
top-k and the mask at the same number of bytes, gradients coming back in 4 bits in all but the first. Runs whose log is
in --folder already are not repeated, so a long comparison can be made in pieces (--cuts, --methods). Prints for each
cut the accuracy, the bytes that TCP carried for training in both directions, and those until the accuracy
first was that of uncompressed training less a point.

    python benchmarks/split_learning.py --rate 100mbit --steps 40     (Linux, root)

measures the time per step over a link of that rate instead, all methods in one run.
"""

import argparse
import importlib.util
import math
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "split_learning.py"
sys.path.insert(0, str(EXAMPLE.parent))

import split_report  # noqa: E402
from gcompress import from_spec, split  # noqa: E402
from split_models import ARCHS  # noqa: E402
from split_report import socket_bytes  # noqa: E402
from training_report import in_bytes, set_byte_axis  # noqa: E402

MASK = "mask:sparsity=0.99,bits=2,signed=false"
METHODS = ("none", "qu3", "sp", "ms")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, default="cnn_fashion")
    parser.add_argument("--cuts", nargs="+", default=["shallow", "medium", "deep"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/split-table"))
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--rate", help="of a slow link, as tc writes it: measure time per step")
    parser.add_argument("--steps", type=int, default=40, help="of each method over the slow link (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="train nothing, print what the logs have")
    parser.add_argument("rest", nargs="*", help="after --: arguments for split_learning.py")
    return parser.parse_args()


def up_spec(method, arch, cut):
    """The compressor of activations; top-k keeps as much as fits into the mask's bytes, by its best index."""
    if method in ("none", "qu3"):
        return {"none": "none", "qu3": "quantize:bits=3"}[method]
    if method == "ms":
        return MASK
    head, _ = split.cut(arch.build(), arch.cuts[cut])
    numel = arch.batch_size * math.prod(split.activation_shape(head, arch.image_shape))
    budget = from_spec(MASK).nbytes(numel)
    fits = (n for n in range(9000, 10000) if from_spec(f"topk:sparsity={n / 10000}").nbytes(numel) <= budget)
    return f"topk:sparsity={next(fits) / 10000}"


def command(arguments, method, cut, log):
    up = up_spec(method, ARCHS[arguments.arch], cut)
    down = "none" if method == "none" else "quantize:bits=4"
    fixed = ["--demo", "--arch", arguments.arch, "--cutlayer", cut, "--up", up, "--down", down, "--progress", "lines"]
    return [sys.executable, EXAMPLE, *fixed, "--log-file", log, *arguments.rest]


def log_of(arguments, method, cut):
    return arguments.folder / f"{arguments.arch}-{cut}-{method}.jsonl"


def train_all(arguments):
    for cut in arguments.cuts:
        for method in arguments.methods:
            log = log_of(arguments, method, cut)
            if arguments.dry or log.with_suffix(".done").exists():
                continue
            subprocess.run([str(part) for part in command(arguments, method, cut, log)], check=True)
            log.with_suffix(".done").touch()


def read_all(arguments):
    """{cut: {method: records}} of the runs that are complete."""
    found = {}
    for cut in arguments.cuts:
        logs = {method: log_of(arguments, method, cut) for method in arguments.methods}
        done = {m: split_report.read_log(log) for m, log in logs.items() if log.with_suffix(".done").exists()}
        if done:
            found[cut] = done
    return found


def table(found):
    lines = [
        "| cut | activations | gradients | top-1 | bytes up | bytes down | fewer, both | until less a point | fewer |"
    ]
    lines.append("|" + "---|" * 9)
    # Uncompressed training is the same wherever the cut is; only its bytes are not.
    whole = next((runs["none"] for runs in found.values() if "none" in runs), None)
    target = whole[-1]["test_top1"] - 0.01 if whole else math.inf
    for cut, runs in found.items():
        base = runs.get("none")
        for curve in runs.values():
            last = curve[-1]
            up, _, down = last["title"].partition(", up ")[2].partition(", down ")
            reached = next((socket_bytes(record) for record in curve if record["test_top1"] >= target), None)
            spent = next(socket_bytes(record) for record in base if record["test_top1"] >= target) if base else None
            cells = [cut, f"`{up}`", f"`{down}`", f"{100 * last['test_top1']:.2f} %"]
            cells += [in_bytes(last["socket_up"]), in_bytes(last["socket_down"])]
            cells.append(f"{socket_bytes(base[-1]) / socket_bytes(last):.2f}x" if base else "-")
            fewer = f"{spent / reached:.2f}x" if reached and spent else "-"
            cells += [in_bytes(reached) if reached else "never", fewer]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path, found):
    """Accuracy against bytes, one panel for each cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"none": "uncompressed", "qu3": "quantize 3 bit", "sp": "top-k, equal bytes", "ms": "mask 99 %, 2 bit"}
    colours = dict(zip(names, split_report.COLOURS, strict=False))
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    with pyplot.rc_context({**style, "font.size": 10, "axes.axisbelow": True}):
        size = (4.2 * len(found), 4)
        figure, panels = pyplot.subplots(1, len(found), figsize=size, sharey=True, layout="constrained", squeeze=False)
        for panel, (cut, runs) in zip(panels[0], found.items(), strict=True):
            for method, curve in runs.items():
                top1, spent = [100 * r["test_top1"] for r in curve], [socket_bytes(r) for r in curve]
                looks = {"color": colours[method], "label": names[method], "marker": "o", "markersize": 3.5}
                panel.plot(spent, top1, linewidth=1.8, **looks)
            panel.set(title=f"{cut} cut", xlabel="bytes up and down, at the socket")
            set_byte_axis(panel, [socket_bytes(record) for curve in runs.values() for record in curve])
        panels[0][0].set(ylabel="test top-1 (%)")
        fullest = max(panels[0], key=lambda panel: len(panel.lines))
        handles, labels = fullest.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=len(labels))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def slow_link(arguments):
    """Time per step of every method over one slow link, each in its own two processes, one after the other."""
    spec = importlib.util.spec_from_file_location("slow_link_tool", ROOT / "tools" / "slow_link.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    if tool.missing():
        sys.exit(f"split_learning.py: error: {tool.missing()}")
    images = arguments.steps * ARCHS[arguments.arch].batch_size
    arguments.rest += ["--epochs", "2", "--limit-train", str(images), "--limit-test", "500"]
    print(f"| cut | activations | gradients | ms per step at {arguments.rate} | times as fast | bytes per step |")
    print("|" + "---|" * 6)
    with tool.namespace(arguments.rate) as enter:
        for cut in arguments.cuts:
            base = None
            for method in arguments.methods:
                log = arguments.folder / f"slow-{arguments.arch}-{cut}-{method}.jsonl"
                run = [*enter, *[str(part) for part in command(arguments, method, cut, log)]]
                subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
                first, second = split_report.read_log(log)  # the first epoch warms up
                seconds = (second["seconds"] - first["seconds"]) / arguments.steps
                base = base or seconds
                up, _, down = second["title"].partition(", up ")[2].partition(", down ")
                per_step = in_bytes((socket_bytes(second) - socket_bytes(first)) / arguments.steps)
                cells = [cut, f"`{up}`", f"`{down}`", f"{1000 * seconds:.1f}", f"{base / seconds:.2f}x", per_step]
                print("| " + " | ".join(cells) + " |", flush=True)


def main():
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.rate:
        return slow_link(arguments)
    train_all(arguments)
    found = read_all(arguments)
    print(table(found))
    if arguments.plot:
        plot(arguments.plot, found)


if __name__ == "__main__":
    main()
