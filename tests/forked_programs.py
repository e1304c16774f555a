"""Runs Python programs in forks of one process, which imports torch once: importing takes longer than most programs.

`python -m tests.forked_programs` reads the path of a program from each line, runs it in its folder as if Python had
been started with it, and prints its exit code. It starts no thread and computes nothing, so that forks are as good as
new.
"""

import os
import pathlib
import signal
import subprocess
import sys
import threading

from tests.launching import PYTHON, REPOSITORY


class ForkedPrograms:
    """The process that forks; a context, at whose end nothing of it is left."""

    def __enter__(self):
        command = [PYTHON, "-W", "ignore", "-m", "tests.forked_programs"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=REPOSITORY, text=True, start_new_session=True, **pipes)
        return self

    def run(self, path, timeout):
        """Run a program; returns (exit code, output). One that takes longer ends all, with no exit code."""
        overdue = threading.Timer(timeout, self._kill)
        overdue.start()
        try:
            print(path, file=self._process.stdin, flush=True)
            code = self._process.stdout.readline().strip()
        finally:
            overdue.cancel()
        return int(code) if code else None, output_of(path).read_text(errors="replace")

    def _kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)

    def __exit__(self, *error):
        self._kill()
        self._process.communicate()


def output_of(path):
    return path.with_suffix(".output")


def main():
    import torch._dynamo  # noqa: F401 - which torch's optimizers and DistributedDataParallel import

    import gcompress  # noqa: F401

    for line in sys.stdin:
        path = pathlib.Path(line.rstrip("\n"))
        child = os.fork()
        if child == 0:
            return become(path)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(path):
    """Go on as the program: returning from `main` ends it, as it ends Python."""
    with open(os.devnull) as nothing, open(output_of(path), "w") as output:
        os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(path.parent)
    sys.path[0], sys.argv = str(path.parent), [path.name]
    exec(compile(path.read_text(), path.name, "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    main()
