"""Real ranks of torch's DistributedDataParallel on Gloo; see ddp_ranks.py for what each rank does."""

import pytest
import torch.distributed as dist

from tests.ddp_ranks import SCENARIOS
from tests.launching import launch_ddp, outcomes_of, told_by

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no Gloo", allow_module_level=True)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios that end well, in one launch of four ranks."""
    out = tmp_path_factory.mktemp("ddp") / "outcomes.json"
    return outcomes_of(out, launch_ddp(4, "-m", "tests.ddp_ranks", out, timeout=400))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]


def failing(tmp_path, name, ranks):
    """Run a scenario that must end the job; returns {rank: (error type, message)} of the ranks that could tell."""
    out = tmp_path / "error"
    code, output = launch_ddp(ranks, "-m", "tests.ddp_ranks", out, name)
    assert code != 0, output[-2000:]
    return told_by(out, ranks)


def test_a_rank_that_never_registers_is_told_within_the_groups_time_out(tmp_path):
    errors = failing(tmp_path, "one_rank_never_registers", ranks=3)
    # The launcher may end a rank before its own error is written, once another's is.
    told = [message for rank, (kind, message) in errors.items() if rank != 1 and kind == "ExchangeError"]
    assert told and all("not every rank called it" in message for message in told), errors
    assert not any(kind == "AssertionError" for kind, _ in errors.values()), errors


def test_a_killed_rank_ends_the_others(tmp_path):
    errors = failing(tmp_path, "killed_rank", ranks=3)
    assert 1 not in errors and all("Error" in kind for kind, _ in errors.values())
