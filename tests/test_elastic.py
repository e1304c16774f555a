"""Elastic Horovod kills a rank and adds one; see elastic_ranks.py and elastic_outer_ranks.py for what each does."""

import pytest
import torch

from tests.launching import launch_horovod

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run `make setup`")
pytestmark = [pytest.mark.horovod, pytest.mark.ranks]

# Two names of this machine: Horovod never again uses a host on which a rank died.
DISCOVERY = """#!/bin/sh
if [ -e {folder}/enlarge ]; then echo localhost:3; else echo localhost:2; echo 127.0.0.1:1; fi
"""


def elastic_job(folder, ranks, last):
    """{kind and step: {world size: {process: what it wrote}}} of a job that loses a rank and gets another."""
    script = folder / "discover.sh"
    script.write_text(DISCOVERY.format(folder=folder))
    script.chmod(0o755)
    options = ["--min-np", 2, "--max-np", 3, "--host-discovery-script", script, "--slots-per-host", 3]
    options += ["--elastic-timeout", 60]
    _, output = launch_horovod(3, "-m", ranks, folder, options=options, timeout=150)
    found = {}
    for path in folder.glob("*.pt"):
        kind, size, pid = path.stem.split("-")
        found.setdefault(kind, {}).setdefault(int(size), {})[pid] = torch.load(path, weights_only=True)
    assert len(found.get(last, {}).get(3, {})) == 3, output[-6000:]
    return found


@pytest.fixture(scope="module")
def residuals(tmp_path_factory):
    return elastic_job(tmp_path_factory.mktemp("elastic"), "tests.elastic_ranks", "end14")


@pytest.fixture(scope="module")
def outer(tmp_path_factory):
    return elastic_job(tmp_path_factory.mktemp("outer"), "tests.elastic_outer_ranks", "end21")


def owners_vector(states):
    """The residuals of the weight's pieces, put together."""
    whole = torch.zeros(18000)
    for state in states:
        for key, residual in state["owner_feedback"].items():
            start, stop = map(int, key.removeprefix("weight[").removesuffix("]").split(":"))
            assert not whole[start:stop].any(), "a piece has two owners"
            whole[start:stop] = residual
    return whole


def check_handed_on(before, after):
    """Every new rank has the mean of the old ones' residuals; the pieces went to their new owners."""
    mean = sum(state["feedback"]["weight"] for state in before) / len(before)
    assert mean.norm() > 0
    for state in after:
        torch.testing.assert_close(state["feedback"]["weight"], mean)
        assert state["steps"] == before[0]["steps"] == state["step"]
    assert torch.equal(owners_vector(before), owners_vector(after))
    assert owners_vector(after).norm() > 0


def test_a_killed_rank_leaves_the_mean_of_the_others_to_them(residuals):
    """What they committed together, less what was the killed rank's: its residual, and its pieces'."""
    committed, entered = residuals["commit4"][3], residuals["enter4"][2]
    assert len(committed) == 3 and len(entered) == 2
    check_handed_on([committed[process] for process in entered], list(entered.values()))


def test_an_added_rank_gets_the_mean_and_its_pieces(residuals):
    committed, entered = residuals["commit8"][2], residuals["enter8"][3]
    assert sorted(state["rank"] for state in entered.values()) == [0, 1, 2]
    check_handed_on(list(committed.values()), list(entered.values()))


def test_the_ranks_train_on_with_residuals_of_their_own(residuals):
    ends = list(residuals["end14"][3].values())
    assert not torch.equal(ends[0]["feedback"]["weight"], ends[1]["feedback"]["weight"])


def same_anchors(states):
    states = list(states)
    return all(
        torch.equal(each["weights"][name], states[0]["weights"][name]) for each in states for name in each["weights"]
    )


def mean_residual(states):
    return sum(state["feedback"]["weight"] for state in states) / len(states)


def test_outer_steps_go_on_from_the_last_exchange_when_a_rank_is_killed(outer):
    committed, entered = outer["commit6"][3], outer["enter6"][2]
    assert len(entered) == 2 and same_anchors([*committed.values(), *entered.values()])
    mean = mean_residual([committed[process] for process in entered])
    assert mean.norm() > 0
    for state in entered.values():
        torch.testing.assert_close(state["feedback"]["weight"], mean)


def test_a_rank_that_joins_outer_steps_late_starts_from_the_anchors(outer):
    (step, entered), *_ = [
        (kind[5:], sizes[3]) for kind, sizes in outer.items() if kind[:5] == "enter" and 3 in sizes and kind != "enter0"
    ]
    committed = outer[f"commit{step}"][2]
    assert same_anchors([*committed.values(), *entered.values()])
    assert torch.equal(owners_vector(committed.values()), owners_vector(entered.values()))
    for state in entered.values():
        torch.testing.assert_close(state["feedback"]["weight"], mean_residual(committed.values()))


def test_outer_steps_end_with_the_same_weights(outer):
    assert same_anchors(outer["end21"][3].values())
