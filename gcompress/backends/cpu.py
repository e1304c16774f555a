"""The C++ kernels (csrc/, plain C ABI) through ctypes, by the names that csrc/kernels.def gives them.

The library says itself which kernels it has and which parameters they take, so that nothing is listed twice. One that
was built from another list than the one beside it is not used.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError

ISAS = ("portable", "neon", "avx2", "avx512")
MOST_MORE = 63  # GC_MOST_MORE of csrc/gcompress.h
LARGE = 1 << 19  # entries from which on kernels start threads: two shares of csrc/cpu/threads.h
# Where launchers say how many ranks there are on this machine: torchrun, Horovod, Open MPI, BytePS.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "BYTEPS_LOCAL_SIZE")
PACKAGE = pathlib.Path(__file__).resolve().parents[1]
TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class _Signature(ctypes.Structure):
    """gc_signature of csrc/gcompress.h."""

    _fields_ = [(name, ctypes.c_char_p) for name in ("result", "name", "parameters")]


class _Memory(ctypes.Structure):
    """gc_memory of csrc/gcompress.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("residual", "fresh", "poisoned")]


class _More(ctypes.Structure):
    """gc_more of csrc/gcompress.h."""

    _fields_ = [
        ("payloads", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("factor", ctypes.c_float),
        ("again", ctypes.c_int32),
    ]


class CpuKernels:
    """The kernels of one instruction set: an attribute for each.

    A kernel that takes a number of threads is called without it: that of `with_threads`, else one. One that takes a
    gc_memory or a gc_more is called without it, too: what `remembering` and `adding` return passes one.

    Args:
        table: the address of its gc_kernels (csrc/gcompress.h).
        signatures: {name: Signature} of the table's fields, in order.
    """

    on_device, memory, adds = False, None, False

    def __init__(self, table: int, signatures: dict[str, Signature]):
        self.table, self.names, self.signatures = table, frozenset(signatures), signatures
        self.numbers = {name: number for number, name in enumerate(signatures)}
        self._functions = list(self.functions())
        self._by_threads = {1: self}
        self._bind(1)

    def _bind(self, threads):
        self.threads = threads
        self.taking: dict[str, dict] = {"gc_memory": {}, "gc_more": {}}  # {name: function} of those that take one
        for (name, signature), function in zip(self.signatures.items(), self._functions, strict=True):
            if signature.threaded:
                function = functools.partial(function, threads)
            if signature.extra:
                self.taking[signature.extra][name] = function
                function = functools.partial(function, None)
            setattr(self, name, function)

    def with_threads(self, threads: int) -> CpuKernels:
        """These kernels, which encode and decode a large tensor by up to so many threads, with the same bytes."""
        if threads not in self._by_threads:
            found = copy.copy(self)
            found._bind(threads)
            self._by_threads[threads] = found
        return self._by_threads[threads]

    def functions(self) -> Iterable[Callable]:
        """The kernels in the order of the table's fields, as Python calls them."""
        pointers = (ctypes.c_void_p * len(self.signatures)).from_address(self.table)
        return [signature.kind(pointer) for signature, pointer in zip(self.signatures.values(), pointers, strict=True)]

    def keeps_residual_with(self, names: Iterable[str]) -> bool:
        """Whether one of these kernels is an encoder that keeps what is lost, too: see `remembering`."""
        return not self.taking["gc_memory"].keys().isdisjoint(names)

    def remembering(self, residual: int, fresh: int, poisoned: int) -> BoundKernels:
        """These kernels with error feedback in the encoders; the arguments of `DeviceKernels.remembering`."""
        return BoundKernels(self, "gc_memory", _Memory(residual or None, fresh, poisoned))

    def adds_with(self, names: Iterable[str]) -> bool:
        """Whether one of these kernels is a decoder that adds several payloads: see `adding`."""
        return not self.taking["gc_more"].keys().isdisjoint(names)

    def adding(self, payloads: list[int], factor: float, again: bool) -> BoundKernels:
        """These kernels, whose decoders add other payloads to the one that they are given, then multiply, in one pass.

        Args:
            payloads: addresses, at most MOST_MORE.
            factor: a float32.
            again: whether what is decoded is read again at once, and had better stay in the cache.
        """
        addresses = (ctypes.c_void_p * len(payloads))(*payloads)
        more = _More(ctypes.addressof(addresses), len(payloads), factor, again)
        return BoundKernels(self, "gc_more", more, addresses)

    def run(self, calls: int, count: int, width: int) -> int:
        """gc_run of csrc/gcompress.h."""
        return _library.gc_run(self.table, calls, count, width)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all kernels of these names are there."""
        return self.names.issuperset(names)


class BoundKernels:
    """Kernels of which those that take a structure get one.

    Args:
        kernels: a CpuKernels.
        extra: the structure's name.
        value: the structure.
        held: what it points to, kept as long as these.
    """

    def __init__(self, kernels: CpuKernels, extra: str, value: ctypes.Structure, held: object = None):
        self._kernels, self._taking, self._value, self._held = kernels, kernels.taking[extra], ctypes.byref(value), held
        self.memory, self.adds = value if extra == "gc_memory" else None, extra == "gc_more"

    def __getattr__(self, name):
        if name in self._taking:
            return functools.partial(self._taking[name], self._value)
        return getattr(self._kernels, name)


def _ctype(text):
    """The ctypes type of a result, or of a parameter with its name."""
    if "*" in text:
        return ctypes.c_void_p
    kind = text.replace("const ", "").split()[0]
    if kind not in TYPES:
        raise OSError(f"a kernel's parameter is {text!r}, expected a pointer or one of {', '.join(TYPES)}")
    return TYPES[kind]


class Signature(NamedTuple):
    """What kernels.def says of a kernel."""

    kind: Any  # ctypes' type of the function
    threaded: bool  # whether its first parameter is a number of threads
    extra: str  # the structure that its first or next parameter points to, gc_memory or gc_more, or ""
    parameters: list[tuple[Any, str]]  # (ctypes' type, name)


def _signature(result, parameters):
    parameters = parameters.strip("()").split(", ")
    threaded = parameters[0] == "int threads"
    extra = re.match(r"(?:const )?(gc_\w+)\*", parameters[threaded])
    named = [(_ctype(each), re.findall(r"\w+", each)[-1]) for each in parameters]
    kind = ctypes.CFUNCTYPE(_ctype(result), *(each for each, _ in named))
    return Signature(kind, threaded, extra[1] if extra else "", named)


def _listed():
    """[(result, name, parameters)] of csrc/kernels.def in a checkout; None where only the library is installed."""
    path = PACKAGE.parent / "csrc" / "kernels.def"
    if not path.exists():
        return None
    found = re.findall(r"^GC_KERNEL\((\w+), (\w+), (\(.*?\))\)$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(result, name, " ".join(parameters.split())) for result, name, parameters in found]


def _load():
    """(The shared library, its kernels' {name: function type}), or (None, {}) with one warning that says why not.

    GCOMPRESS_LIBRARY names another library than that of the package: what another compiler made, for instance.
    """
    chosen = os.environ.get("GCOMPRESS_LIBRARY")
    path = pathlib.Path(chosen or PACKAGE / "_native.so")
    try:
        if not path.exists():
            raise OSError("they were not built; install gcompress where there is a C++ compiler")
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "gc_signatures"):
            raise OSError(f"{path.name} is of another release: build it again")
        library.gc_signatures.restype = ctypes.POINTER(_Signature)
        found = []
        for line in library.gc_signatures():
            if line.name is None:
                break
            found.append((line.result.decode(), line.name.decode(), line.parameters.decode()))
        if _listed() not in (None, found):
            raise OSError(f"{path.name} has other kernels than csrc/kernels.def lists: build it again")
        signatures = {name: _signature(result, parameters) for result, name, parameters in found}
    except OSError as error:
        if chosen:
            raise ConfigError(f"GCOMPRESS_LIBRARY: got {chosen!r}, which cannot be used: {error}") from error
        logging.getLogger(__name__).warning("C++ kernels are not in use, the slower torch reference is: %s", error)
        return None, {}
    library.gc_select_kernels.argtypes = [ctypes.c_char_p]
    library.gc_select_kernels.restype = ctypes.c_void_p
    library.gc_best_isa.restype = ctypes.c_char_p
    library.gc_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.gc_run.restype = ctypes.c_int64
    return library, signatures


_library, _signatures = _load()


@functools.cache
def kernels(isa: str) -> CpuKernels | None:
    """The kernels for a name in ISAS, or for the best set of this processor if it is empty; None if there are none."""
    found = _library.gc_select_kernels(isa.encode()) if _library else None
    return CpuKernels(found, _signatures) if found else None


def signatures() -> ctypes.c_void_p:
    """The address of the library's list of kernels (gc_signatures of csrc/gcompress.h)."""
    return ctypes.cast(_library.gc_signatures(), ctypes.c_void_p)


def thread_count() -> int:
    """How many threads a large tensor gets: as many as torch uses, and no more than this rank's part of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(int(size) if (size := os.environ.get(name, "")).isdecimal() else 1 for name in LOCAL_SIZES)
    return max(1, min(torch.get_num_threads(), cores // max(1, ranks)))


def built() -> bool:
    """Whether there are C++ kernels at all."""
    return _library is not None


def best_isa() -> str:
    """The best instruction set that this processor runs."""
    return _library.gc_best_isa().decode()
