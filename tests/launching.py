"""Starts the ranks of an engine as a user would, and leaves none behind."""

import atexit
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from tests.quick_python import FORKER

REPOSITORY = pathlib.Path(__file__).parent.parent
MPIRUN = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
PYTHON = sys.executable
SMALL_PARTITIONS = "65536"  # of BytePS, in bytes, so that tensors of a test have several


@functools.cache
def quick_python():
    """The command of a Python that has imported torch already, see quick_python.py."""
    path = os.path.join(tempfile.mkdtemp(prefix="forker-"), "socket")
    command = [PYTHON, "-m", "tests.forker", path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if MPIRUN:  # which tells ranks where MPI is by a variable that is read when a process starts
        told = subprocess.run([MPIRUN, "-np", "1", "printenv", "LD_LIBRARY_PATH"], capture_output=True, text=True)
        environment["LD_LIBRARY_PATH"] = told.stdout.strip()
    forker = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)
    atexit.register(lambda: (forker.communicate(), shutil.rmtree(os.path.dirname(path))))
    assert forker.stdout.readline() == b"ready\n"
    os.environ[FORKER] = path
    return [PYTHON, "-S", "-E", REPOSITORY / "tests" / "quick_python.py"]


def python_for(plain):
    return [PYTHON] if plain else quick_python()


def launch_ddp(ranks, *arguments, timeout=120, plain=False, **environment):
    """Run a Python script or module on `ranks` ranks; returns (exit code, output).

    plain: by Pythons of their own, for what is about how processes end; so below.
    """
    python = python_for(plain)
    command = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    command += [*python, "-u", *arguments]
    # torchrun ends its ranks when it is told to end.
    return run(command, timeout, signal.SIGTERM, environment)


def launch_horovod(ranks, *arguments, timeout=240, options=(), plain=False, **environment):
    """Run a Python command line on `ranks` ranks; returns (exit code, output)."""
    python = python_for(plain)
    command = [*python, "-m", "horovod.runner.launch", "-np", ranks, "--gloo", *options, *python, *arguments]
    return run(command, timeout, signal.SIGINT, {"GCOMPRESS_TIMEOUT": "60", **environment})


def launch_mpi(ranks, *arguments, timeout=150, options=(), plain=False, **environment):
    """Run a Python command line on `ranks` ranks; returns (exit code, output)."""
    command = [MPIRUN, *options, "-np", ranks, *python_for(plain), *arguments]
    # Its ranks have sessions of their own: mpirun must end them.
    return run(command, timeout, signal.SIGTERM, {"GCOMPRESS_TIMEOUT": "60", **environment})


def launch_byteps(workers, *arguments, servers=2, timeout=120, plain=False, **environment):
    """Run a Python command line on BytePS workers; returns (exit code, output)."""
    command = [PYTHON, "-m", "gcompress.plugins.byteps.launch", "-np", workers, "--servers", servers]
    return run(
        [*command, *python_for(plain), *arguments],
        timeout,
        None,
        {"BYTEPS_PARTITION_BYTES": SMALL_PARTITIONS, **environment},
    )


def outcomes_of(out, launched):
    """{scenario: "ok" or its errors} that rank 0 of a launch wrote to a file (tests/scenarios.py)."""
    _, output = launched
    if not out.exists():
        pytest.fail(f"the ranks wrote no outcomes:\n{output[-4000:]}")
    return json.loads(out.read_text())


def told_by(out, ranks):
    """{rank: what it wrote to OUT.RANK} of those that could."""
    files = {rank: out.with_name(f"{out.name}.{rank}") for rank in range(ranks)}
    return {rank: json.loads(path.read_text()) for rank, path in files.items() if path.exists()}


def run(command, timeout, interrupt, environment, folder=REPOSITORY):
    """Run a launcher in a folder, the repository's root; fails the test if it does not end in time.

    Args:
        interrupt: the signal at which the launcher ends its ranks; None: all of them are killed.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(interrupt) if interrupt else os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"the ranks hang after {timeout} s:\n{output[-4000:]}")
    return process.returncode, output
