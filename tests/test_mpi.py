"""Real MPI ranks push to and pull from real servers; see mpi_ranks.py for what each rank does."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.launching import MPIRUN, launch_mpi, outcomes_of, told_by
from tests.processes import wait_until_gone

pytest.importorskip("mpi4py", reason="mpi4py is not installed: python tools/install_mpi.py")
pytestmark = [pytest.mark.mpi, pytest.mark.ranks]

HERE = pathlib.Path(__file__).parent
# Read, not imported: importing mpi4py in this process would start MPI here.
SCENARIOS = re.findall(r"^@(?:scenario|of_all)\ndef (\w+)", (HERE / "mpi_ranks.py").read_text(), re.MULTILINE)
if MPIRUN is None:
    pytest.skip("there is no mpirun: python tools/install_mpi.py", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios that end well, in one launch of three workers and two servers."""
    out = tmp_path_factory.mktemp("mpi") / "outcomes.json"
    return outcomes_of(out, launch_mpi(5, "-m", "tests.mpi_ranks", out))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]


RANKS = 4  # three workers and a server


def run(tmp_path, name, *options, **environment):
    """Run one scenario alone; returns (exit code, {rank: what it returned or [error type, message]}, output)."""
    out = tmp_path / "outcome"
    code, output = launch_mpi(RANKS, "-m", "tests.mpi_ranks", out, name, options=options, plain=True, **environment)
    assert not wait_until_gone(str(out))
    return code, told_by(out, RANKS), output


def test_a_killed_worker_ends_the_job_and_is_reported(tmp_path):
    code, told, output = run(tmp_path, "killed_worker")
    assert code != 0 and not any(outcome == "finished" for outcome in told.values())
    assert re.search(r"rank 1\b.*(\n.*)?signal 9", output), output[-2000:]


def needs_ulfm():
    probe = "import os; raise SystemExit(0 if os.environ.get('OMPI_MCA_mpi_ft_enable') else 1)"
    command = [MPIRUN, "--with-ft", "ulfm", "-np", "1", sys.executable, "-c", probe]
    if subprocess.run(command, capture_output=True, timeout=60).returncode:
        pytest.skip("this mpirun has no `--with-ft ulfm` (Open MPI 5): a death ends all its ranks")
    return ("--with-ft", "ulfm")


@pytest.mark.parametrize("name", ["killed_worker_continue", "killed_worker_stale", "killed_at_sum", "failing_worker"])
def test_the_rest_go_on_when_a_worker_dies(tmp_path, name):
    code, told, output = run(tmp_path, name, *needs_ulfm())
    assert told.get(0) == told.get(2) == "finished", (told, output[-4000:])
    assert code == 0 and "worker 1 died: going on with 2 workers" in output
    assert name != "failing_worker" or told[1] == ["ValueError", "this worker has had enough"]


def test_a_dead_server_ends_all_with_its_name(tmp_path):
    code, told, _ = run(tmp_path, "killed_server", *needs_ulfm())
    assert code != 0 and told and all("server 0 (rank 3) died" in message for _, message in told.values()), told


@pytest.mark.parametrize("name", ["hanging_worker", "hanging_worker_continue"])
def test_a_worker_that_hangs_is_reported_by_name(tmp_path, name):
    options = needs_ulfm() if "continue" in name else ()
    code, told, output = run(tmp_path, name, *options, GCOMPRESS_TIMEOUT="10")
    assert re.search(r"nothing came within \S+ s from worker 1 \(gradient 'w'\)", output), output[-4000:]
    assert code != 0
    if "continue" in name:
        assert told[0] == told[2] == "finished" and "worker 1 never came back" in output
    else:
        assert "finished" not in told.values()
