"""What split_learning.py shows and writes: progress, JSON lines, TensorBoard, the closing table, the plot."""

import json
import os
import sys
import time

from gcompress import split
from training_report import COLOURS, in_bytes, ratio, set_byte_axis

COUNTED = ("up", "down", "evaluation", "socket_up", "socket_down", "socket_evaluation")


class Log:
    """One JSON object a line, and beside it TensorBoard's files if that is installed."""

    def __init__(self, path, append=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "a" if append else "w", encoding="utf-8")
        self._board = self._make_board()

    def _make_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(self.path.with_suffix(".tensorboard"))

    def write(self, record):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board:
            for name, value in record.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, record["step"])
            self._board.flush()

    def rewrite(self, records):
        """Make the file hold just these: after going back, every epoch is in it once."""
        with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(f"{self.path}.partial", self.path)
        self._file.close()
        self._file = open(self.path, "a", encoding="utf-8")
        if self._board and records:
            for name in ("train_loss", "test_top1", "test_top5", "up", "down"):
                self._board.add_scalar(name, records[-1][name], records[-1]["step"])
            self._board.flush()

    def close(self):
        self._file.close()
        if self._board:
            self._board.close()


def read_log(path):
    """The epoch records of a client's log."""
    with open(path, encoding="utf-8") as file:
        try:
            records = [json.loads(line) for line in file if line.strip()]
        except ValueError:
            records = []
    if not records or not all({"test_top1", "socket_up", "title"} <= set(record) for record in records):
        raise ValueError(f"--compare {path}: not a log that a client of split_learning.py wrote")
    return records


class History:
    """The client's epochs and counts so far: part of its checkpoint, so that a resumed run's log is whole.

    up, down: bytes of frames in training; evaluation: in evaluations. socket_…: what TCP
    carried at the same time. Bytes of steps that were lost with a half are not in them.
    """

    def __init__(self):
        self.curve, self._sums = [], [0.0, 0, 0, 0]
        self._totals = dict.fromkeys((*COUNTED, "seconds", "compression_seconds", "wait_seconds"), 0)
        self._base, self._memory_before = None, split.SplitClient.peak_memory()

    def state_dict(self):
        return {"curve": self.curve, "sums": self._sums, "totals": self._totals}

    def load_state_dict(self, state):
        self.curve, self._sums, self._totals = list(state["curve"]), list(state["sums"]), dict(state["totals"])

    def start(self, client):
        """Count from here."""
        self._base = self._now(client)

    def _now(self, client):
        sockets = client.link.sockets.read() or (0, 0)
        times = {"seconds": time.perf_counter(), "wait_seconds": client.wait_seconds}
        times["compression_seconds"] = client.compression_seconds
        return {**client.traffic, "socket_up": sockets[0], "socket_down": sockets[1], **times}

    def count(self, client, evaluation=False):
        """Add what was sent and spent since the last count, which was all training or all evaluation."""
        now, before = self._now(client), self._base
        self._base = now
        grown = {name: now[name] - before[name] for name in now}
        if evaluation:
            self._totals["evaluation"] += grown["evaluation"]
            self._totals["socket_evaluation"] += grown["socket_up"] + grown["socket_down"]
            return
        for name in self._totals.keys() - {"evaluation", "socket_evaluation"}:
            self._totals[name] += grown[name]

    def add(self, stats):
        """Note a training batch."""
        self._sums = _added(self._sums, stats)

    def progress_text(self):
        loss, top1, _, samples = self._sums
        return f"loss {loss / max(samples, 1):.3f}, top-1 {100 * top1 / max(samples, 1):.1f} %"

    def end_stretch(self, training, epoch, test):
        """The record after that many epochs, from the statistics of the test batches."""
        self.count(training.client, evaluation=True)
        total = [sum(s.loss * s.samples for s in test), *[sum(s[i] for s in test) for i in (1, 2, 3)]]
        record = {
            "epoch": round(epoch, 3),
            "step": training.client.step,
            **_rates("train", self._sums),
            **_rates("test", total),
            **{name: round(value, 3) for name, value in self._totals.items()},
            "peak_memory": training.client.peak_memory(),
            "memory_before": self._memory_before,
            "title": training.setting.title,
            "seed": training.arguments.seed,
        }
        self._sums = [0.0, 0, 0, 0]
        self.curve.append(record)
        return record


def _added(sums, stats):
    """[loss times samples, top-1, top-5, samples] with a batch's `Stats` added."""
    batch = (stats.loss * stats.samples, *stats[1:])
    return [total + part for total, part in zip(sums, batch, strict=True)]


def _rates(part, sums):
    loss, top1, top5, samples = sums
    count = max(samples, 1)
    return {f"{part}_loss": loss / count, f"{part}_top1": top1 / count, f"{part}_top5": top5 / count}


class ServerReport:
    """The server's own progress bar and JSON lines."""

    def __init__(self, title, arguments, log):
        from tqdm import tqdm

        self._title, self._log, self._sums, self._epochs = title, log, [0.0, 0, 0, 0], 0
        self._started = time.perf_counter()
        # Below the client's bar when both halves write to one terminal.
        self._bar = tqdm(
            desc="server",
            unit="step",
            disable=not shown(arguments),
            position=1,
            leave=False,
            ncols=110,
            mininterval=0.5,
        )

    def on_step(self, name, step, stats):
        self._sums = _added(self._sums, stats)
        self._bar.n = step
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {stats.loss:.3f}", refresh=False)
            self._bar.update(0)

    def on_epoch(self, step, server):
        self._epochs += 1
        self._log.write(self._record(step, server))
        self._sums = [0.0, 0, 0, 0]

    def _record(self, step, server):
        kinds = {kind.name.lower(): count for kind, count in server.frames.bytes.items()}
        sent, received = server.socket_bytes() or (0, 0)
        return {
            "epochs_seen": self._epochs,
            "step": step,
            **_rates("train", self._sums),
            "socket_sent": sent,
            "socket_received": received,
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_memory": split.SplitClient.peak_memory(),
            "frames": kinds,
            "title": self._title,
        }

    def finish(self, server):
        self._bar.close()
        record = self._record(self._bar.n, server)
        memory = in_bytes(record["peak_memory"])
        print(f"server: finished after step {record['step']}, {memory} of memory at most", flush=True)


def shown(arguments):
    """Whether a progress bar is wanted."""
    return arguments.progress == "bar" or arguments.progress == "auto" and sys.stderr.isatty()


def bar(training, epoch, first):
    from tqdm import tqdm

    return tqdm(
        total=training.data.steps_per_epoch,
        initial=first,
        desc=f"client epoch {epoch + 1}/{training.setting.arch.epochs}",
        unit="step",
        disable=not shown(training.arguments),
        leave=False,
        ncols=110,
        mininterval=0.5,
    )


def epoch_line(record, epochs):
    return (
        f"epoch {record['epoch']:>4g}/{epochs}  step {record['step']:>6}  loss {record['train_loss']:.4f}  "
        f"train {100 * record['train_top1']:.2f} %  test top-1 {100 * record['test_top1']:.2f} %  "
        f"top-5 {100 * record['test_top5']:.2f} %  up {in_bytes(record['up'])}  down {in_bytes(record['down'])}  "
        f"{record['seconds']:.1f} s"
    )


def table(record, others=()):
    """What the run cost: bytes of its training steps at the frame and at the socket, time, memory."""
    steps, seconds = max(record["step"], 1), max(record["seconds"], 1e-9)
    share = 100 * record["compression_seconds"] / seconds
    lines = [
        record["title"],
        f"test accuracy      top-1 {100 * record['test_top1']:.2f} %, top-5 {100 * record['test_top5']:.2f} %",
        f"steps              {record['step']}, {1000 * seconds / steps:.1f} ms each",
        f"this half's share  {share:.1f} % compressing, {100 * record['wait_seconds'] / seconds:.1f} % waiting for the "
        "server",
        f"memory             {in_bytes(record['peak_memory'])} at most, {in_bytes(record['memory_before'])} of it "
        "(torch, data set) before the first step",
        "",
        f"{'bytes of training':<28}{'up':>12}{'down':>12}{'both':>12}{'per step':>12}",
    ]
    for name, up, down in (("frames", "up", "down"), ("socket, with TLS and HTTP/2", "socket_up", "socket_down")):
        both = record[up] + record[down]
        counts = (record[up], record[down], both, both / steps)
        lines.append(f"{name:<28}" + "".join(f"{in_bytes(count):>12}" for count in counts))
    lines.append(f"evaluations besides         {in_bytes(record['socket_evaluation']):>12} at the socket")
    lines += [_comparison(record, other) for other in others]
    return "\n".join(lines)


def _comparison(record, other):
    points = 100 * (record["test_top1"] - other["test_top1"])
    mine, theirs = socket_bytes(record), socket_bytes(other)
    return (
        f"\nagainst {other['title']}:\n  {points:+.2f} points of top-1 after {record['step']} steps "
        f"(it: {other['step']}), {ratio(theirs, mine):.2f}x fewer bytes both directions together at the socket"
    )


def socket_bytes(record):
    """Bytes of training in both directions, as TCP counted them."""
    return record["socket_up"] + record["socket_down"]


def plot(path, curves, title):
    """Draw top-1 accuracy against epochs and against the bytes of both directions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    with pyplot.rc_context({**style, "font.size": 10, "axes.axisbelow": True}):
        figure, (by_epoch, by_bytes) = pyplot.subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
        for number, curve in reversed(list(enumerate(curves))):
            accuracy = [100 * record["test_top1"] for record in curve]
            spent = [socket_bytes(record) for record in curve]
            name = curve[-1]["title"].partition(", up ")[2]
            looks = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": "o",
                "markersize": 4,
                "linewidth": 2,
                "label": f"up {name}  ({accuracy[-1]:.1f} %, {in_bytes(spent[-1])})",
            }
            by_epoch.plot([record["epoch"] for record in curve], accuracy, **looks)
            by_bytes.plot(spent, accuracy, **looks)
        by_epoch.set(xlabel="epochs", ylabel="test top-1 (%)", title="Accuracy by epochs")
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_bytes.set(xlabel="bytes up and down, at the socket", title="Accuracy by bytes")
        set_byte_axis(by_bytes, [socket_bytes(record) for curve in curves for record in curve])
        handles, labels = by_epoch.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", frameon=False, ncols=1)
        figure.suptitle(title, fontsize=12)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
