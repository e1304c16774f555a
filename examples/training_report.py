"""What train.py shows of a run: byte counts in words, the closing table, the JSON-lines log and the plot.

Of these train_lm.py takes the words, the bar, the table of bytes, the log and the plot's looks.
"""

import json
import math
import sys

RECORD = {"step", "sent_bytes", "test_accuracy", "compressor"}  # what a line of the log has at least
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "font.size": 10,
    "axes.axisbelow": True,
}


def in_bytes(count):
    """A number of bytes in the largest fitting decimal unit: `12.3 kB`."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} EB"


def in_ranks(count):
    return f"{count} rank" if count == 1 else f"{count} ranks"


def ratio(whole, part):
    return whole / part if part else math.inf


def progress_bar(engine, choice, title, total, done=0):
    """A tqdm bar on rank 0 if `choice`, of --progress, wants it; else one that shows nothing."""
    from tqdm import tqdm

    shown = engine.rank == 0 and (choice == "bar" or choice == "auto" and sys.stderr.isatty())
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit="step",
        disable=not shown,
        leave=False,
        # A launcher puts rank and stream before each line, and a line that wraps cannot be redrawn.
        ncols=110,
        mininterval=0.5,
    )


def table(record, world_size):
    """The closing table, from the last epoch's record.

    "Handed to Horovod" is what rank 0 gave to the engine's operations. "On the wire" is what one rank then
    sends over the network when these run in the usual rings: a payload of an all-gather goes round to each
    of the other N - 1 ranks, an all-reduce sends 2 (N - 1) / N of its tensor. To a server goes what was handed over.
    """
    rows = [
        ("this run", record["sent_bytes"], record["wire_bytes"]),
        ("the same gradients in fp16", record["fp16_bytes"], record["fp32_wire_bytes"] // 2),
        ("the same gradients in fp32", record["fp32_bytes"], record["fp32_wire_bytes"]),
    ]
    per_step = f"{1000 * record['seconds'] / max(record['step'], 1):.0f} ms each"
    lines = [
        f"compressor     {record['compressor']}",
        f"test accuracy  {100 * record['test_accuracy']:.2f} %",
        f"steps          {record['step']} ({per_step}, {record['seconds']:.1f} s of training)",
        "",
        *byte_lines(rows, record["gradient_steps"], record["engine"], world_size),
    ]
    return "\n".join(lines)


def byte_lines(rows, steps, engine, world_size):
    """A table of (name, bytes handed over, bytes on the wire) with ratios to the first row, in lines."""
    steps = max(steps, 1)
    handed_title = f"handed to {engine}"
    wire_title = f"on the wire, {in_ranks(world_size)}"
    lines = [
        f"{'bytes of one rank':<28}{handed_title:^32}{wire_title:^32}",
        f"{'':<28}" + f"{'per step':>11}{'in total':>11}{'ratio':>8}  " * 2,
    ]
    sent, wire = rows[0][1:]
    for name, handed, travelled in rows:
        line = f"{name:<28}"
        for count, reference in ((handed, sent), (travelled, wire)):
            # One rank alone sends nothing: a ratio of nothing says nothing.
            shown = f"{ratio(count, reference):.1f}x" if reference else "-"
            line += f"{in_bytes(count / steps):>11}{in_bytes(count):>11}{shown:>8}  "
        lines.append(line)
    return [line.rstrip() for line in lines]


class Log:
    """One JSON object a line: one for each record (of train.py: epoch), and a last one with `"final": true`."""

    def __init__(self, path, curve):
        """Begin a new file with the records so far, so that a resumed run's log has every one once."""
        self._file = open(path, "w", encoding="utf-8") if path else None
        for record in curve:
            self.write(record)

    def write(self, record):
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self):
        if self._file:
            self._file.close()


def read_log(path, needed=RECORD, program="train.py"):
    """The records of a program's log, oldest first. Raises ValueError, naming the file, if it is not one."""
    with open(path, encoding="utf-8") as file:
        try:
            records = [json.loads(line) for line in file if line.strip()]
            curve = [record for record in records if not record.get("final")]
            complete = curve and all(needed <= set(record) for record in curve)
        except (ValueError, AttributeError, TypeError):
            complete = False
    if not complete:
        raise ValueError(f"{path}: not a log written by {program} --log-file")
    return curve


def set_byte_axis(panel, counts):
    """Scale a panel's x axis, drawn over these byte counts, and label it in units, few enough to stay apart.

    matplotlib reckons with labels three times as wide as high; `250 MB` is wider.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    least, most = min(counts), max(counts)
    # Compressors differ by factors of ten to a thousand; one run alone reads better without logarithms.
    if 0 < 20 * least < most:
        panel.set_xscale("log")
        decades = math.log10(most / least)
        # Few decades have few powers of ten: what lies between them is labelled as well.
        labelled = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
        panel.xaxis.set_major_locator(LogLocator(subs=labelled, numticks=6))
    else:
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda count, _: in_bytes(count)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def looks(number, label):
    """How the run of a number is drawn."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": "o",
        "markersize": 4,
        "linewidth": 2,
        "label": label,
    }


def plot(path, curves, title):
    """Draw test accuracy against steps and against the bytes that rank 0 handed to the engine.

    Args:
        path: the image to write; its ending says the format (`.png`, `.svg`, `.pdf`).
        curves: lists of epoch records, one list for each run; the first is drawn on top.
        title: a line above both panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
        by_step, by_bytes = panels
        for number, curve in reversed(list(enumerate(curves))):
            accuracy = [100 * record["test_accuracy"] for record in curve]
            last = curve[-1]
            label = f"{last['compressor']}  ({accuracy[-1]:.1f} %, {in_bytes(last['sent_bytes'])})"
            by_step.plot([record["step"] for record in curve], accuracy, **looks(number, label))
            by_bytes.plot([record["sent_bytes"] for record in curve], accuracy, **looks(number, label))
        by_step.set(xlabel="steps", ylabel="test accuracy (%)", title="Accuracy by steps")
        by_step.set_xlim(left=0)
        by_step.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        by_bytes.set(xlabel="bytes handed to the engine by rank 0", title="Accuracy by bytes sent")
        set_byte_axis(by_bytes, [record["sent_bytes"] for curve in curves for record in curve])
        by_step.yaxis.set_major_locator(MaxNLocator(nbins=7))
        finish_figure(figure, by_step, path, title)


def finish_figure(figure, panel, path, title):
    """Put the legend of a panel below all, the title above, and write the file."""
    from matplotlib import pyplot

    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", frameon=False, ncols=1)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
