"""Real ranks of torch's DistributedDataParallel on Gloo; see ddp_ranks.py for what each rank does."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no Gloo", allow_module_level=True)

pytestmark = pytest.mark.ranks

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from ddp_ranks import SCENARIOS  # noqa: E402


def launch(ranks, *arguments, timeout=120):
    """Run a Python script on `ranks` ranks; returns (exit code, output). No process outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun then ends its ranks
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"the ranks hang after {timeout} s:\n{output[-4000:]}")
    return process.returncode, output


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios that end well, in one launch of four ranks."""
    out = tmp_path_factory.mktemp("ddp") / "outcomes.json"
    _, output = launch(4, HERE / "ddp_ranks.py", out)
    if not out.exists():
        pytest.fail(f"the ranks wrote no outcomes:\n{output[-4000:]}")
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]


def failing(tmp_path, name, ranks):
    """Run a scenario that must end the job; returns {rank: (error type, message)} of the ranks that could tell."""
    out = tmp_path / "error"
    code, output = launch(ranks, HERE / "ddp_ranks.py", out, name)
    assert code != 0, output[-2000:]
    errors = {rank: out.with_name(f"error.{rank}") for rank in range(ranks)}
    return {rank: json.loads(path.read_text()) for rank, path in errors.items() if path.exists()}


def test_a_different_compressor_on_one_rank_is_refused_everywhere_with_both_named(tmp_path):
    errors = failing(tmp_path, "different_configurations", ranks=3)
    assert len(errors) == 3
    for kind, message in errors.values():
        assert kind == "ConfigMismatchError"
        assert '"topk"' in message and '"quantize"' in message and "ranks [0, 2]" in message


def test_a_rank_that_never_registers_is_told_within_the_groups_time_out(tmp_path):
    errors = failing(tmp_path, "one_rank_never_registers", ranks=3)
    # The launcher may end a rank before its own error is written, once another's is.
    told = [message for rank, (kind, message) in errors.items() if rank != 1 and kind == "ExchangeError"]
    assert told and all("not every rank called it" in message for message in told), errors
    assert not any(kind == "AssertionError" for kind, _ in errors.values()), errors


def test_another_ranks_state_is_refused(tmp_path):
    errors = failing(tmp_path, "another_ranks_state", ranks=2)
    assert any(kind == "ConfigError" and "of 2, expected one that rank" in message for kind, message in errors.values())


def test_a_killed_rank_ends_the_others(tmp_path):
    errors = failing(tmp_path, "killed_rank", ranks=3)
    assert 1 not in errors and all("Error" in kind for kind, _ in errors.values())
