"""What a process does that a launcher has started."""

import ctypes
import signal
import sys

PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def die_with_the_launcher() -> None:
    """Let the kernel kill this process when its parent dies (Linux; elsewhere it does nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
