"""Lightning, Fabric, Accelerate and Transformers' Trainer, for real; see framework_ranks.py for what each rank does."""

import functools
import importlib.util
import logging
import re
import subprocess

import pytest
import torch
import torch.distributed as dist

import gcompress
from gcompress.exchange import GradientExchange
from gcompress.exchange.rank_files import read_rank_file, write_rank_file
from tests import accelerate_scenarios, lightning_scenarios, trainer_scenarios  # noqa: F401
from tests.framework_tools import ALONE, SCENARIOS
from tests.launching import PYTHON, REPOSITORY, launch_ddp, outcomes_of, quick_python, run

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no Gloo", allow_module_level=True)

NEEDS = {
    "lightning": ("lightning",),
    "fabric": ("lightning",),
    "accelerate": ("accelerate",),
    "trainer": ("transformers", "accelerate"),
}


def missing(name):
    """The packages that a scenario needs and that are not installed."""
    return [package for package in NEEDS[name.split("_")[0]] if importlib.util.find_spec(package) is None]


def installed(scenarios):
    return [name for name in scenarios if not missing(name)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios whose packages are there, in one launch of two ranks and one of one process."""
    folder, log, found = tmp_path_factory.mktemp("frameworks"), logging.getLogger(__name__), {}
    alone = functools.partial(launch_alone, folder / "one.json")
    two = functools.partial(launch_ddp, 2, "-m", "tests.framework_ranks", folder / "two.json", timeout=240)
    for launch, scenarios, out in ((two, SCENARIOS, "two.json"), (alone, ALONE, "one.json")):
        names = installed(scenarios)
        if names:
            launched = launch(*names)
            log.info("%s", launched[1][-2000:])
            found.update(outcomes_of(folder / out, launched))
    return found


def launch_alone(out, *names):
    return run([*quick_python(), "-m", "tests.framework_ranks", out, *names], 120, None, {})


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*SCENARIOS, *ALONE])
def test_scenario_of_frameworks(outcomes, name):
    if missing(name):
        pytest.skip(f"not installed: {', '.join(missing(name))}")
    assert outcomes[name] == "ok", outcomes[name]


EXAMPLES = {"ddp": (), "accelerate_training": NEEDS["accelerate"], "trainer": NEEDS["trainer"]}
EXAMPLES["lightning_training"] = NEEDS["lightning"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_framework_learns_and_sends_less(name):
    lacks = [package for package in EXAMPLES[name] if importlib.util.find_spec(package) is None]
    if lacks:
        pytest.skip(f"not installed: {', '.join(lacks)}")
    code, output = launch_ddp(2, f"examples/frameworks/{name}.py", timeout=240, PYTHONPATH=str(REPOSITORY))
    assert code == 0, output[-4000:]
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?(\d\.\d+)", output)]
    assert losses[-1] < losses[0] / 2, losses
    (last,) = [line for line in output.strip().splitlines() if "times fewer" in line][-1:]
    assert float(re.search(r": ([\d.]+) times fewer", last)[1]) > 7


def test_a_plugin_says_what_to_install():
    """In a process where no framework can be imported."""
    plugins = {"lightning": "pip install lightning", "accelerate": "pip install accelerate"}
    plugins["transformers"] = "pip install transformers accelerate"
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(["lightning", "lightning.pytorch", "pytorch_lightning", "accelerate", "transformers"]))
for name, expected in {plugins!r}.items():
    try:
        importlib.import_module("gcompress.plugins." + name)
    except ImportError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(name)
"""
    ran = subprocess.run([PYTHON, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def state_of(rank, world_size, steps=3):
    """A rank's state with a residual of its number."""
    exchange = GradientExchange("topk:sparsity=0.9", Lonely(rank, world_size))
    exchange.prepare({"w": torch.Size([2000])})
    exchange.steps = steps
    state = exchange.state_dict()
    return {**state, "feedback": {"w": torch.full((2000,), 1.0 + rank)}}


class Lonely:
    in_order = True

    def __init__(self, rank, world_size):
        self.rank, self.world_size = lambda: rank, lambda: world_size


def test_rank_files_are_each_ranks_own_or_merged(tmp_path):
    for rank in range(3):
        path = write_rank_file(tmp_path / "new" / "folder", state_of(rank, 3))
        assert path.name == f"gcompress-rank-{rank}-of-3.pt"
    folder = tmp_path / "new" / "folder"
    assert len(list(folder.iterdir())) == 3, "nothing unfinished is left"
    own = read_rank_file(folder, 1, 3)
    assert own["rank"] == 1 and torch.equal(own["feedback"]["w"], torch.full((2000,), 2.0))
    merged = read_rank_file(folder, 1, 2)
    assert merged["world_size"] == 3 and "rank" not in merged
    assert torch.equal(merged["sums"]["residual/w"], torch.full((2000,), 6.0))
    assert read_rank_file(folder, 0, 3, "other") is None and read_rank_file(tmp_path / "none", 0, 3) is None


def test_rank_files_of_several_runs_are_refused(tmp_path):
    write_rank_file(tmp_path, state_of(0, 2))
    torch.save(state_of(1, 3), tmp_path / "gcompress-rank-1-of-3.pt")
    with pytest.raises(gcompress.ConfigError, match="2 and 3 ranks"):
        read_rank_file(tmp_path, 0, 2)
    write_rank_file(tmp_path, state_of(1, 2))  # a later run of two ranks in the same folder
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"gcompress-rank-{rank}-of-2.pt" for rank in range(2)]
    write_rank_file(tmp_path, state_of(1, 2, steps=4))
    with pytest.raises(gcompress.ConfigError, match="differ in steps"):
        read_rank_file(tmp_path, 0, 3)


def test_missing_and_damaged_rank_files_are_named(tmp_path):
    path = write_rank_file(tmp_path, state_of(0, 2))
    for rank, world_size in ((1, 2), (0, 3)):
        with pytest.raises(gcompress.ConfigError, match=r"no gcompress-rank-1-of-2\.pt"):
            read_rank_file(tmp_path, rank, world_size)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(damaged)
        with pytest.raises(gcompress.ConfigError, match="rank-0-of-2.pt cannot be read"):
            read_rank_file(tmp_path, 0, 2)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = write_rank_file(tmp_path, state_of(0, 1))
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_rank_file(tmp_path, state_of(0, 1))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
