"""What a test left running, what processes make one at a time, and what ranks do in place of pytest."""

import contextlib
import fcntl
import os
import pathlib
import time


def processes_with(text):
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if text in command and folder.name != str(os.getpid()):
            found.append(command)
    return found


def wait_until_gone(text, seconds=10):
    """The processes with `text` in their command line that are there still after that many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(text)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@contextlib.contextmanager
def only_one(lock):
    """Of the processes that run tests side by side, one at a time."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def expect_error(kind, text, function):
    """On a rank, where pytest is not: the function must raise such an error with such a text."""
    try:
        function()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError(f"expected {kind.__name__}")
