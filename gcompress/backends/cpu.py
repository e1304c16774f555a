"""The C++ kernels (csrc/, plain C ABI) through ctypes, by the names that csrc/kernels.def gives them.

The library says itself which kernels it has and which parameters they take, so that nothing is listed twice. One that
was built from another list than the one beside it is not used.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import pathlib
import re
from collections.abc import Iterable

ISAS = ("portable", "avx2", "avx512")
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


class CpuKernels:
    """The kernels of one instruction set: an attribute for each.

    Args:
        table: the address of its gc_kernels (csrc/gcompress.h).
        signatures: {name: ctypes function type} of the table's fields, in order.
    """

    on_device = False

    def __init__(self, table: int, signatures: dict):
        self.table, self.names = table, frozenset(signatures)
        pointers = (ctypes.c_void_p * len(signatures)).from_address(table)
        for (name, kind), pointer in zip(signatures.items(), pointers, strict=True):
            setattr(self, name, kind(pointer))

    def has(self, names: Iterable[str]) -> bool:
        """Whether all kernels of these names are there."""
        return self.names.issuperset(names)


def _ctype(text):
    """The ctypes type of a result, or of a parameter with its name."""
    if "*" in text:
        return ctypes.c_void_p
    kind = text.replace("const ", "").split()[0]
    if kind not in TYPES:
        raise OSError(f"a kernel's parameter is {text!r}, expected a pointer or one of {', '.join(TYPES)}")
    return TYPES[kind]


def _function_type(result, parameters):
    return ctypes.CFUNCTYPE(_ctype(result), *map(_ctype, parameters.strip("()").split(", ")))


def _listed():
    """[(result, name, parameters)] of csrc/kernels.def in a checkout; None where only the library is installed."""
    path = PACKAGE.parent / "csrc" / "kernels.def"
    if not path.exists():
        return None
    found = re.findall(r"^GC_KERNEL\((\w+), (\w+), (\(.*?\))\)$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(result, name, " ".join(parameters.split())) for result, name, parameters in found]


def _load():
    """(The shared library, its kernels' {name: function type}), or (None, {}) with one warning that says why not."""
    path = PACKAGE / "_native.so"
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
        signatures = {name: _function_type(result, parameters) for result, name, parameters in found}
    except OSError as error:
        logging.getLogger(__name__).warning("C++ kernels are not in use, the slower torch reference is: %s", error)
        return None, {}
    library.gc_select_kernels.argtypes = [ctypes.c_char_p]
    library.gc_select_kernels.restype = ctypes.c_void_p
    library.gc_best_isa.restype = ctypes.c_char_p
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


def built() -> bool:
    """Whether there are C++ kernels at all."""
    return _library is not None


def best_isa() -> str:
    """The best instruction set that this processor runs."""
    return _library.gc_best_isa().decode()
