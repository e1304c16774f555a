"""A job of torchrun's loses a rank, and one of fewer ranks goes on; see outer_restart_ranks.py for what they do."""

import pytest
import torch

from tests.launching import launch_ddp

pytestmark = pytest.mark.ranks


def test_fewer_ranks_go_on_from_the_last_exchange_of_a_job_that_lost_one(tmp_path):
    code, _ = launch_ddp(3, "-m", "tests.outer_restart_ranks", tmp_path)
    assert code != 0 and (tmp_path / "state.pt").exists() and not list(tmp_path.glob("end-*.pt"))
    code, output = launch_ddp(2, "-m", "tests.outer_restart_ranks", tmp_path)
    assert code == 0, output[-4000:]
    ends = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("end-*.pt"))]
    assert [each["begun"] for each in ends] == [6, 6]
    assert torch.equal(ends[0]["weights"]["weight"], ends[1]["weights"]["weight"])
