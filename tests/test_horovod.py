"""Real Horovod ranks exchange packed gradients; see horovod_ranks.py for what each rank does."""

import pytest
import torch

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run `make setup`")
pytestmark = [pytest.mark.horovod, pytest.mark.ranks]

from tests.horovod_ranks import SCENARIOS  # noqa: E402
from tests.launching import launch_horovod, outcomes_of, told_by  # noqa: E402


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios that end well, in one launch of four ranks."""
    out = tmp_path_factory.mktemp("horovod") / "outcomes.json"
    return outcomes_of(out, launch_horovod(4, "-m", "tests.horovod_ranks", out, HOROVOD_DYNAMIC_PROCESS_SETS="1"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]


def failing(tmp_path, name, ranks=3):
    """Run a scenario that must end the job; returns {rank: (error type, message)} of the ranks that could tell."""
    out = tmp_path / "error"
    code, output = launch_horovod(ranks, "-m", "tests.horovod_failures", out, name, timeout=120)
    assert code != 0, output[-2000:]
    return told_by(out, ranks)


@pytest.mark.parametrize("how", ["train", "train_in_two_phases", "train_something_uncompressed", "take_outer_steps"])
def test_join_while_another_rank_trains_ends_with_an_error_on_all(tmp_path, how):
    errors = failing(tmp_path, f"join_while_others_{how}", ranks=2)
    assert any(kind == "MismatchedExchangeError" for kind, _ in errors.values())
    # A rank may also hear of the other's end before its own.
    assert all("join" in message or "shut down" in message for _, message in errors.values()), errors


def test_a_killed_rank_ends_the_others(tmp_path):
    errors = failing(tmp_path, "killed_rank")
    assert all(kind == "HorovodInternalError" for kind, _ in errors.values())


def test_without_the_plugin_horovod_refuses_packed_bytes():
    script = (
        "import horovod.torch as hvd, torch, gcompress; hvd.init();"
        "p = torch.nn.Parameter(torch.zeros(4096));"
        "o = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), named_parameters=[('p', p)],"
        " compression=gcompress.MaskSparse(sparsity=0.99, bits=2));"
        "p.sum().backward(); o.step(); print('SUMMED', flush=True)"
    )
    code, output = launch_horovod(2, "-c", script, timeout=120, plain=True)
    assert code != 0
    assert "expected `import gcompress.plugins.horovod`" in output
    assert "SUMMED" not in output


def test_a_single_process_needs_no_launcher_and_sends_nothing():
    import gcompress.plugins.horovod as gcompress_hvd
    import horovod.torch as hvd

    import gcompress

    hvd.init()
    model = torch.nn.Linear(40, 40)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression="topk:sparsity=0.9"
    )
    model(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    assert gcompress_hvd.exchange(optimizer).report.sent_bytes == 0
    with pytest.raises(gcompress.ConfigError, match="SGD"):
        gcompress_hvd.exchange(torch.optim.SGD(model.parameters(), lr=0.1))
