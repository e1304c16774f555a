"""What a test left running."""

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
    """The processes with `text` in their command line that are there still after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_with(text)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
