"""The pictures that examples and benchmarks draw over bytes: their labels can be read, however much was sent."""

import importlib.util
import itertools
import sys

import pytest

from tests.launching import REPOSITORY

agg = pytest.importorskip("matplotlib.backends.backend_agg", reason="matplotlib is not installed")
figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: pip install -e .[examples]")
pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")


def load(folder, name):
    """Import a file of a folder that is not on the path of tests, under a name that no other file has."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", REPOSITORY / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


training_report = load("examples", "training_report")
split_report = load("examples", "split_report")
language_report = load("examples", "language_report")
split_comparison = load("benchmarks", "split_learning")

SENT = {"1 MB": 10**6, "100 MB": 10**8, "200 MB": 2 * 10**8, "2 GB": 2 * 10**9, "1 TB": 10**12}


def training_curve(total, steps=2340):
    """What train.py logs in ten epochs."""
    return [
        {"step": steps * k // 10, "sent_bytes": total * k // 10, "test_accuracy": 0.08 * k, "compressor": "none"}
        for k in range(1, 11)
    ]


def split_curve(total):
    """What a client of split_learning.py logs in ten epochs."""
    part = {"title": "cnn_fashion, up none, down none"}
    return [
        {"epoch": k, "socket_up": total * k // 20, "socket_down": total * k // 20, "test_top1": 0.08 * k, **part}
        for k in range(1, 11)
    ]


def language_curve(total, steps=300):
    """What train_lm.py logs of ten validations."""
    run = {"title": "outer, polar:rate=0.25,floor=0, every 15 steps"}
    return [
        {
            "step": steps * k // 10,
            "seconds": steps * k / 100,
            "wire_bytes": total * k // 10,
            "validation_loss": 6 - k / 3,
            **run,
        }
        for k in range(1, 11)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved meanwhile."""
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *arguments, **options: saved.append(figure))
    return saved


def tick_labels(axis):
    """(text, bounding box in pixels) of the labels within an axis, from low to high."""
    low, high = sorted(axis.get_view_interval())
    return [
        (label.get_text(), label.get_window_extent())
        for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if label.get_text() and low <= place <= high
    ]


def assert_readable(figure):
    """Every x axis has labels, and they neither touch each other nor leave the picture."""
    agg.FigureCanvasAgg(figure).draw()
    page = figure.bbox
    for panel in figure.axes:
        labels = tick_labels(panel.xaxis)
        assert len(labels) >= 2, f"{panel.get_title()}: only {labels} to read a scale from"
        for (left, left_box), (right, right_box) in itertools.pairwise(labels):
            space = 3 * figure.dpi / 72  # that of a blank
            assert left_box.x1 + space <= right_box.x0, f"{panel.get_title()}: {left!r} runs into {right!r}"
        assert page.x0 <= labels[0][1].x0 and labels[-1][1].x1 <= page.x1, panel.get_title()


# What the least of several runs sent, as a fraction of the most.
FRACTIONS = ((1,), (1, 1 / 10), (1, 1 / 100), (1, 1 / 3000))


@pytest.mark.parametrize(
    "total, fractions",
    [*zip(SENT.values(), itertools.cycle(FRACTIONS)), *((SENT["100 MB"], each) for each in FRACTIONS)],
    ids=str,
)
def test_labels_of_bytes_stay_apart(drawn, tmp_path, total, fractions):
    totals = [round(total * fraction) for fraction in fractions]
    training_report.plot(tmp_path / "train.png", [training_curve(each) for each in totals], "runs")
    split_report.plot(tmp_path / "split.png", [split_curve(each) for each in totals], "runs")
    language_report.plot(tmp_path / "lm.png", [language_curve(each) for each in totals], "runs")
    methods = dict(zip(split_comparison.METHODS, [split_curve(each) for each in totals], strict=False))
    split_comparison.plot(tmp_path / "cuts.png", {cut: methods for cut in ("shallow", "medium", "deep")})
    assert len(drawn) == 4
    for figure in drawn:
        assert_readable(figure)


def test_labels_of_many_steps_stay_apart(drawn, tmp_path):
    for steps in (10, 2340, 800_000):
        training_report.plot(tmp_path / "train.png", [training_curve(10**8, steps)], "runs")
        language_report.plot(tmp_path / "lm.png", [language_curve(10**8, steps)], "runs")
    for figure in drawn:
        assert_readable(figure)


def test_a_run_that_sent_nothing_is_drawn(drawn, tmp_path):
    """One rank alone has nobody to send to."""
    training_report.plot(tmp_path / "train.png", [training_curve(0)], "runs")
    language_report.plot(tmp_path / "lm.png", [language_curve(0)], "runs")
    assert len(drawn) == 2


WORDS = {0: "0 B", 999: "999 B", 1000: "1 kB", 999_600: "1 MB", 12_345 * 10**12: "12.3 PB", 10**18: "1 EB"}


@pytest.mark.parametrize("sent", WORDS)
def test_bytes_in_words_are_short(sent):
    assert training_report.in_bytes(sent) == WORDS[sent]
