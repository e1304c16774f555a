"""Many calls of C++ kernels by one call from Python (gc_run of csrc/gcompress.h): small tensors cost little else."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..errors import PayloadError
from . import cpu
from .cpu import CpuKernels

WORDS = 20  # of a call: the kernel's number and up to 19 arguments
# Parameters that differ from call to call, by their names in csrc/kernels.def. `workspace` has `capacity` 32-bit words.
# The `threads` of large tensors are asked for anew each time.
ROLES = ("memory", "more", "x", "payload", "seed", "out", "add", "workspace", "threads")
TABLES = ("tables", "levels")  # pointers to what `made_once` made
_local = threading.local()


def made_once(function: Callable) -> Callable:
    """`function`, whose results are kept for good; of threads that come first together all get the same one."""
    found: dict = {}

    @functools.wraps(function)
    def of(*arguments):
        return found[arguments] if arguments in found else found.setdefault(arguments, function(*arguments))

    of.cache_clear = found.clear  # type: ignore[attr-defined]
    return of


def workspace(words: int) -> tuple[int, int]:
    """(address, 32-bit words) of this thread's scratch memory, kept because fresh memory costs more than its use."""
    memory = getattr(_local, "memory", None)
    if memory is None or len(memory) < words:
        _local.memory = memory = None  # gone before there is more
        _local.memory = memory = np.empty(words, np.uint32)
    return memory.ctypes.data, len(memory)


class Call(NamedTuple):
    """A kernel's call without what its ROLES stand for."""

    words: tuple[int, ...]  # as gc_run takes them; 0 for the roles
    places: dict[str, int]  # {role: which word}
    capacity: int  # of its workspace


class _Recorder:
    """Kernels that note how they are called."""

    on_device, memory, adds, threads = False, None, False, 1

    def __init__(self, kernels):
        self._kernels, self.calls = kernels, []

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._kernels.names:
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, arguments))


def recorded(kernels: CpuKernels, code: Callable, structure: str) -> Call | None:
    """The call that `code` makes, given kernels.

    None if it makes none or several, or of a kernel that does not take a `structure` ("gc_memory", "gc_more"), or one
    with a pointer that is none of ROLES and TABLES.
    """
    recorder = _Recorder(kernels)
    code(recorder)
    if len(recorder.calls) != 1:
        return None
    ((name, arguments),) = recorder.calls
    signature = kernels.signatures[name]
    if signature.extra != structure:
        return None
    words, places, capacity = [kernels.numbers[name]], {}, 0
    values = (*(1,) * signature.threaded, None, *arguments)
    given = dict(zip((parameter for _, parameter in signature.parameters), values, strict=True))
    for (kind, parameter), value in zip(signature.parameters, values, strict=True):
        if parameter == "threads" and given["n"] < cpu.LARGE:
            words.append(1)
        elif parameter in ROLES:
            places[parameter] = len(words)
            words.append(0)
        elif kind is ctypes.c_void_p and parameter not in TABLES:
            return None
        else:
            words.append(_word(kind, value))
            capacity = value if parameter == "capacity" else capacity
    return Call(tuple(words), places, capacity) if len(words) <= WORDS else None


def _word(kind, value):
    if kind is ctypes.c_float:
        return struct.unpack("<i", struct.pack("<f", value))[0]
    if kind is ctypes.c_double:
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return int(value)


class CallList:
    """Calls that are made in turn, again and again with other arguments.

    Args:
        kernels: that all are of.
        calls: Calls.
    """

    def __init__(self, kernels: CpuKernels, calls: Iterable[Call]):
        calls = list(calls)
        self._kernels, self._words = kernels, np.zeros((len(calls), WORDS), np.int64)
        self._flat = self._words.reshape(-1)
        self._where: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # {role: (calls that have it, their words)}
        for row, call in zip(self._words, calls, strict=True):
            row[: len(call.words)] = call.words
        for role in ROLES:
            having = [number for number, call in enumerate(calls) if role in call.places]
            words = [number * WORDS + calls[number].places[role] for number in having]
            self._where[role] = np.array(having, np.int64), np.array(words, np.int64)
        self._capacity = max((call.capacity for call in calls), default=0)

    def has(self, role: str) -> bool:
        """Whether a call has this role."""
        return len(self._where[role][0]) > 0

    def set(self, role: str, values: np.ndarray | int) -> None:
        """The argument of all calls that have this role: one for all, or int64 of as many as there are calls."""
        having, words = self._where[role]
        self._flat[words] = values[having] if isinstance(values, np.ndarray) else values

    def run(self) -> None:
        """Make the calls; PayloadError if one meets bad data, or needs a larger workspace than it had when recorded."""
        if self.has("threads"):
            self.set("threads", cpu.thread_count())
        if self.has("workspace"):
            self.set("workspace", workspace(self._capacity)[0])
        done = self._kernels.run(self._words.ctypes.data, len(self._words), WORDS)
        if done != len(self._words):
            raise PayloadError("payload: its index does not mark what was kept")
