"""A Python that starts at once: `python -S -E tests/quick_python.py ARGUMENTS` is `python ARGUMENTS`, run by a fork of
a process that has imported torch (tests/forker.py). Tests start hundreds of processes, and most of them took longer to
import torch than for all the rest.

This process stands in for the fork towards whoever started it: both have the same input, output and environment, it
hands on signals, ends as the fork ends, and when it is killed the fork is killed, too. But the fork's parent is the
forker. What is tested about parents needs a plain Python.
"""

import contextlib
import json
import os
import signal
import socket
import sys

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORKER = "GCOMPRESS_TESTS_FORKER"  # in the environment: the forker's socket
# What has its effect when Python starts, or torch is imported, and cannot be changed afterwards.
AT_START = ("LD_PRELOAD", "OMP_NUM_THREADS", "PYTHONWARNINGS", "PYTHONHASHSEED")
AT_START += ("GCOMPRESS_BACKEND", "GCOMPRESS_ISA", "GCOMPRESS_LIBRARY")


def at_start(environment):
    return [environment.get(name) for name in AT_START]


def main():
    arguments = sys.argv[1:]
    if FORKER not in os.environ:
        os.execv(sys.executable, [sys.executable, *arguments])
    forker = socket.socket(socket.AF_UNIX)
    forker.connect(os.environ[FORKER])
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode("utf-8", "surrogateescape")
    socket.send_fds(forker, [len(request).to_bytes(4, "little")], [0, 1, 2])
    forker.sendall(request)
    pid = int.from_bytes(forker.recv(4), "little")
    if not pid:  # it was started in another environment
        os.execv(sys.executable, [sys.executable, *arguments])

    def hand_on(number, _):
        with contextlib.suppress(ProcessLookupError):  # it has just ended, too
            os.kill(pid, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    status = forker.recv(4)
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "little")) if status else 1
    if code < 0:
        if -code in HANDED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
