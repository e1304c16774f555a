"""`gcompress plan`: what it prints, draws and refuses, with costs that need no measuring."""

import json

import pytest

from gcompress import ConfigError, cli, cli_plan
from gcompress.forecast import chart
from gcompress.forecast.advice import ADVISED, every_method
from tests.test_forecast import QuickBench
from tests.test_pictures import assert_readable

COMMAND = ["--ranks", "8", "--link", "1gbit", "--shapes", "1024x1024*8,1024*8", "--step", "300ms", "--quiet"]


def plan(capsys, *arguments):
    cli_plan.plan([*COMMAND, *arguments], make_bench=QuickBench)
    return capsys.readouterr()


def test_the_table_is_sorted_and_the_advice_can_be_pasted(capsys):
    shown = plan(capsys).out
    blocks = shown.strip().split("\n\n")
    rows = [line.split() for line in blocks[0].splitlines()[1:]]
    assert {row[0] for row in rows} == set(every_method())
    assert blocks[1].startswith("Compress with ") or blocks[1].startswith("Do not compress")
    found = json.loads(plan(capsys, "--json").out)
    assert [each["method"] for each in found["methods"]] == [row[0] for row in rows]
    seconds = [each["seconds"] for each in found["methods"]]
    assert seconds == sorted(seconds)
    assert found["advice"] in ADVISED and found["code"] in blocks[2]
    assert found["entries"] == 8 * 1024 * 1025 and found["link"]["bits_per_second"] == 1e9
    assert "8,396,800 entries" in blocks[3] and "1gbit" in blocks[3] and "300ms" in blocks[3]


def test_do_not_compress_is_an_answer(capsys):
    assert "Do not compress" in plan(capsys, "--link", "1tbit").out
    slow = plan(capsys, "--link", "1mbit").out
    assert "Compress with polar:rate=0.25" in slow and 'register(model, "polar:rate=0.25")' in slow
    assert "No advice" in plan(capsys, "--methods", "sign").out


def test_machines_of_several_ranks_exchange_by_nodes_unless_a_method_says_otherwise(capsys):
    methods = ["quantize:bits=4", "quantize:bits=4; local_size=1"]
    for options, by_nodes in ((("--ranks-per-machine", "2"), True), (("--ranks-per-machine", "3"), False), ((), False)):
        found = json.loads(plan(capsys, "--json", *options, "--methods", *methods).out)["methods"]
        sent = {each["method"]: each["wire_bytes"] for each in found}
        assert (sent[methods[0]] < 0.7 * sent[methods[1]]) == by_nodes
        shown = plan(capsys, *options, "--methods", "sign").out
        assert ("summed within each machine first" in shown) == by_nodes


def seconds(capsys, *arguments):
    return json.loads(plan(capsys, "--json", "--methods", "none", *arguments).out)["methods"][0]["seconds"]


def test_every_option_of_the_situation_counts(capsys):
    base = seconds(capsys)
    for longer in (
        ("--shared",),
        ("--latency", "10ms"),
        ("--step", "5s"),
        ("--efficiency", "0.5"),
        ("--jitter", "0.5"),
        ("--ranks-per-machine", "8", "--cores", "1", "--shared"),
        ("--link", "100mbit"),
        ("--bucket", "1MB", "--latency", "20ms"),
    ):
        assert seconds(capsys, *longer) > base, longer
    assert seconds(capsys, "--burst", "100MB", "--link", "100mbit") < seconds(capsys, "--link", "100mbit")
    assert seconds(capsys, "--ranks-per-machine", "8", "--cores", "8") < base  # one machine: no link at all


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--link", "fast"], "link: got 'fast'"),
        (["--ranks", "1"], "ranks: got 1"),
        (["--step", "long"], "step: got 'long'"),
        (["--latency", "-1"], "latency: got"),
        (["--methods", "polka"], "polka"),
        (["--methods", "auto"], "yet to be chosen"),
        (["--cores", "0"], "cores: got 0"),
        (["--ranks-per-machine", "9"], "ranks-per-machine: got 9"),
        (["--efficiency", "3"], "efficiency: got 3"),
        (["--jitter", "-1"], "jitter: got -1"),
        (["--bucket", "0"], "bucket: got '0'"),
        (["--burst", "many"], "burst: got 'many'"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--device", "meta"], "device: got 'meta'"),
        (["--shapes", "8y8"], "shapes: got '8y8'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(cli_plan, "Bench", QuickBench)
    with pytest.raises(ConfigError) as caught:
        cli_plan.plan([*COMMAND, *arguments], make_bench=QuickBench)
    assert words in str(caught.value)
    if "--ranks" in arguments:
        assert cli.main(["plan", *COMMAND, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_help_suffices(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("--link", "100mbit", "--shared", "resnet50", "mymodule:make_model", "--plot", ".safetensors"):
        assert word in shown


def test_progress_is_shown_unless_unwanted(capsys):
    arguments = [word for word in COMMAND if word != "--quiet"]
    cli_plan.plan(arguments, make_bench=QuickBench)
    shown = capsys.readouterr()
    assert "methods done" in shown.err and "methods done" not in shown.out
    assert plan(capsys).err == ""


def test_a_picture_is_drawn_or_its_lack_is_named(capsys, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    path = tmp_path / "new" / "plan.png"
    assert str(path) in plan(capsys, "--plot", str(path)).out
    assert path.stat().st_size > 10_000
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *arguments, **options: saved.append(figure))
    for link in ("1gbit", "93.7mbit", "9600bit"):
        plan(capsys, "--plot", str(path), "--link", link)
    for figure in saved:
        assert_readable(figure)
        (axis,) = figure.axes
        labels = [line.get_label() for line in axis.get_lines()]
        assert "none" in labels and "no exchange" in labels and len(labels) <= chart.MOST_CURVES + 2
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="plot: got"):
        plan(capsys, "--plot", str(tmp_path / "plan.odt"))
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plan(capsys, "--plot", str(path))
