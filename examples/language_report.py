"""What train_lm.py shows of a run: its lines, the closing table, and the plot."""

import training_report
from training_report import in_bytes, ratio

RECORD = {"step", "seconds", "wire_bytes", "validation_loss", "title"}  # what a line of the log has at least


def read_log(path):
    return training_report.read_log(path, RECORD, "train_lm.py")


def run_title(arguments):
    """A run's name in plots."""
    if arguments.sync == "gradients":
        return f"gradients, {arguments.compressor}, each step"
    steps = "each step" if arguments.every == 1 else f"every {arguments.every} steps"
    return f"outer, {arguments.compressor}, {steps}"


def record_line(record, steps):
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['train_loss']:.4f}  "
        f"validation {record['validation_loss']:.4f}  rounds {record['rounds']}  "
        f"sent {in_bytes(record['sent_bytes'])}  {record['seconds']:.1f} s"
    )


def all_reduce_bytes(record, entry_bytes):
    """(handed over, on the wire) by a rank that all-reduces all gradients in each step."""
    whole = entry_bytes * record["numel"] * record["step"]
    return whole, 2 * (record["world_size"] - 1) * whole // record["world_size"]


def summary(record):
    """The closing table, from the last record; ratios are to an all-reduce in each step."""
    per_step = f"{1000 * record['seconds'] / max(record['step'], 1):.0f} ms each"
    size, fp32_wire = record["world_size"], all_reduce_bytes(record, 4)[1]
    rows = [
        ("this run", record["sent_bytes"], record["wire_bytes"]),
        ("fp16 all-reduce each step", *all_reduce_bytes(record, 2)),
        ("fp32 all-reduce each step", *all_reduce_bytes(record, 4)),
    ]
    lines = [
        f"run              {record['title']}",
        f"validation loss  {record['validation_loss']:.4f} nats per byte",
        f"steps            {record['step']} ({per_step}, {record['seconds']:.1f} s of training), "
        f"{record['rounds']} exchanges",
        f"speed            {record['tokens_per_second']:,.0f} tokens/s, all ranks together",
        "",
        *training_report.byte_lines(rows, record["step"], record["engine"], size),
    ]
    if record["wire_bytes"]:
        fewer = f"{ratio(fp32_wire, record['wire_bytes']):.1f} times fewer than a float32 all-reduce in each step"
        lines += ["", f"a rank sent {in_bytes(record['wire_bytes'])}, {fewer}"]
    return "\n".join(lines)


def plot(path, curves, title):
    """Draw validation loss against steps, against the bytes that a rank sends and against the seconds of training.

    Args:
        path: the image to write; its ending says the format (`.png`, `.svg`, `.pdf`).
        curves: lists of records, one list for each run; the first is drawn on top.
        title: a line above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    with pyplot.rc_context(training_report.STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.5), sharey=True, layout="constrained")
        for number, curve in reversed(list(enumerate(curves))):
            loss, last = [record["validation_loss"] for record in curve], curve[-1]
            label = f"{last['title']}  ({loss[-1]:.3f}, {in_bytes(last['wire_bytes'])}, {last['seconds']:.0f} s)"
            for panel, key in zip(panels, ("step", "wire_bytes", "seconds"), strict=True):
                panel.plot([record[key] for record in curve], loss, **training_report.looks(number, label))
        by_step, by_bytes, by_seconds = panels
        by_step.set(xlabel="steps", ylabel="validation loss (nats per byte)", title="Loss by steps")
        by_bytes.set(xlabel="bytes that a rank sends", title="Loss by bytes sent")
        by_seconds.set(xlabel="seconds of training", title="Loss by seconds")
        for panel in (by_step, by_seconds):
            panel.set_xlim(left=0)
            panel.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
        training_report.set_byte_axis(by_bytes, [record["wire_bytes"] for curve in curves for record in curve])
        by_step.yaxis.set_major_locator(MaxNLocator(nbins=7))
        training_report.finish_figure(figure, by_step, path, title)
