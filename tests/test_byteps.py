"""Real BytePS workers and servers run our kernels; see byteps_workers.py for what each worker does."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import byteps_edits
from tests.launching import REPOSITORY, launch_byteps
from tests.processes import processes_with

PLUGIN = REPOSITORY / "plugins" / "byteps"
SCENARIOS = re.findall(r"^@scenario\ndef (\w+)", (REPOSITORY / "tests" / "byteps_workers.py").read_text(), re.MULTILINE)
BUILT = importlib.util.find_spec("byteps") is not None and (PLUGIN / "_server.so").exists()
pytestmark = [pytest.mark.byteps, pytest.mark.ranks]
needs_byteps = pytest.mark.skipif(not BUILT, reason="BytePS is not built: python tools/build_byteps.py says why not")


def outcomes_of(path, workers):
    """[{scenario: outcome}] of the workers."""
    files = [path.with_name(f"{path.name}.{rank}") for rank in range(workers)]
    return [dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {} for file in files]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All scenarios that end well, in one job of two workers and two servers."""
    out = tmp_path_factory.mktemp("byteps") / "outcomes"
    code, output = launch_byteps(2, "-m", "tests.byteps_workers", out)
    found = outcomes_of(out, 2)
    if code or not all(found):
        print(output[-6000:])
    return found


@needs_byteps
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes, name):
    for worker, found in enumerate(outcomes):
        assert found.get(name) == "ok", f"worker {worker}:\n{found.get(name, 'did not come so far')}"


@needs_byteps
def test_a_failing_worker_ends_all(tmp_path):
    code, output = launch_byteps(
        2, "-m", "tests.byteps_workers", tmp_path / "error", "failing_worker", servers=1, plain=True
    )
    assert code == 1 and "worker 1 ended with exit code 1" in output, output[-3000:]
    assert json.loads((tmp_path / "error.1").read_text()) == ["ValueError", "this worker has had enough"]


@needs_byteps
def test_a_worker_that_hangs_is_told_by_the_others(tmp_path):
    out = tmp_path / "error"
    code, _ = launch_byteps(
        2, "-m", "tests.byteps_workers", out, "hanging_worker", servers=1, plain=True, GCOMPRESS_TIMEOUT="5"
    )
    kind, message = json.loads((tmp_path / "error.0").read_text())
    assert code == 1 and kind == "ExchangeError" and "no answer within 5 s" in message


@needs_byteps
def test_a_killed_worker_ends_all_and_nothing_is_left(tmp_path):
    before = set(os.listdir("/dev/shm"))
    code, output = launch_byteps(
        2, "-m", "tests.byteps_workers", tmp_path / "error", "killed_worker", servers=1, plain=True
    )
    assert code == 128 + signal.SIGKILL and "worker 1 ended with exit code -9" in output, output[-3000:]
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("BytePS")}
    assert not processes_with(str(tmp_path))


@needs_byteps
def test_what_is_counted_is_what_the_servers_receive(tmp_path):
    """BytePS's servers can log each push with its size: their sum is the report's."""
    script = tmp_path / "count.py"
    script.write_text(
        "import os, pathlib, torch, byteps.torch as bps, gcompress.plugins.byteps as g\n"
        "g.init()\n"
        "p = torch.nn.Parameter(torch.zeros(40000))\n"
        "o = g.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [('p', p)], 'mask:sparsity=0.99,bits=2')\n"
        "for _ in range(3):\n"
        "    o.zero_grad(); (p * torch.randn(40000)).sum().backward(); o.step()\n"
        # To a file: the key log of another process may break a printed line.
        "report = pathlib.Path(__file__).with_name('sent.' + os.environ['DMLC_WORKER_ID'])\n"
        "report.write_text(str(g.exchange(o).report.sent_bytes))\n"
    )
    code, output = launch_byteps(2, script, servers=1, PS_KEY_LOG="1")
    assert code == 0, output[-3000:]
    sent = sum(int((tmp_path / f"sent.{worker}").read_text()) for worker in range(2))
    pushes = [int(size) for size in re.findall(r"push key=\d+\s+sender=\d+\s+size=(\d+)", output)]
    # Once per key and worker whole, to begin with, and once the compressor's parameters: both before the first step.
    lengths = [16384, 16384, 7232]
    from gcompress import MaskSparse

    sizes = [MaskSparse(sparsity=0.99, bits=2).nbytes(length) + 1 for length in lengths]  # one tells what was applied
    assert sent == 2 * 3 * sum(sizes)
    for size in set(sizes):
        assert pushes.count(size) == 2 * 3 * sizes.count(size)


@needs_byteps
def test_the_launcher_refuses_nothing_to_do():
    code, output = launch_byteps(2, "-c", "raise SystemExit(7)", servers=1)
    assert code == 7 and "ended with exit code 7" in output
    command = [sys.executable, "-m", "gcompress.plugins.byteps.launch", "-np", "0", "true"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 2


def test_a_release_that_looks_different_is_not_built_half_adjusted(tmp_path):
    (tmp_path / "file.cc").write_text("one two two")
    byteps_edits.apply(tmp_path, [("file.cc", "two", "three", 2)])
    assert (tmp_path / "file.cc").read_text() == "one three three"
    with pytest.raises(byteps_edits.EditError, match="file.cc: expected 1 of 'two', found 0"):
        byteps_edits.apply(tmp_path, [("file.cc", "two", "four", 1)])
