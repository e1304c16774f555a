"""The C++ kernels (csrc/, plain C ABI) through ctypes, and which backend is in use.

`kernels(tensor)` returns them when they are built, wanted and can read the tensor (CPU);
otherwise None, and the caller runs its torch reference. `GCOMPRESS_BACKEND=reference` or
`use_backend("reference")` turns them off; `GCOMPRESS_ISA=portable|avx2|avx512`, or the
same names given to `use_backend`, choose an instruction set. All give the same bytes.
"""

import contextlib
import ctypes
import logging
import os
import pathlib

from ..errors import ConfigError
from . import gpu

ABI_VERSION = 3
ISAS = ("portable", "avx2", "avx512")
BACKENDS = ("native", "reference", *ISAS)

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Kernels(ctypes.Structure):
    """The function table `gc_kernels` of csrc/gcompress.h, in its order."""

    _fields_ = [
        (name, ctypes.CFUNCTYPE(result, *arguments))
        for name, result, arguments in (
            ("quantize_encode", None, (_POINTER, _SIZE, _INT, _SIZE, _INT, ctypes.c_uint32, _POINTER)),
            ("quantize_decode", None, (_POINTER, _SIZE, _INT, _SIZE, _INT, _POINTER)),
            ("mask_encode", None, (_POINTER, _SIZE, _SIZE, _INT, _INT, _INT, _POINTER, _SIZE, _POINTER)),
            ("mask_decode", _INT, (_POINTER, _SIZE, _SIZE, _INT, _INT, _INT, _POINTER)),
            ("topk_encode", None, (_POINTER, _SIZE, _SIZE, _INT, _INT, _POINTER, _SIZE, _POINTER)),
            ("topk_decode", _INT, (_POINTER, _SIZE, _SIZE, _INT, _INT, _INT, _POINTER)),
            ("polar_sums", None, (_POINTER, _SIZE, _SIZE, _POINTER, _POINTER)),
            ("polar_energies", None, (_POINTER,) * 4),
            ("polar_gather", None, (_POINTER,) * 5),
            ("polar_encode", None, (_POINTER, _SIZE, *(_POINTER,) * 3, _INT, *(_POINTER,) * 3)),
            ("polar_decode", None, (_POINTER, _SIZE, *(_POINTER,) * 3, _SIZE, _INT, *(_POINTER,) * 2)),
            ("polar_scatter", None, (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER)),
            ("sign_encode", None, (_POINTER, _SIZE, _SIZE, _INT, _POINTER)),
            ("sign_decode", None, (_POINTER, _SIZE, _SIZE, _INT, _INT, _POINTER)),
            ("cast_encode", None, (_POINTER, _SIZE, _INT, _SIZE, _POINTER)),
            ("cast_decode", None, (_POINTER, _SIZE, _INT, _SIZE, _INT, _POINTER)),
            ("bf16_encode", None, (_POINTER, _SIZE, _POINTER)),
            ("bf16_decode", None, (_POINTER, _SIZE, _INT, _POINTER)),
            ("randomk_encode", None, (_POINTER, _SIZE, _SIZE, _INT, ctypes.c_uint32, _POINTER)),
            ("randomk_decode", None, (_POINTER, _SIZE, _SIZE, _INT, _POINTER)),
            ("largest_key", ctypes.c_uint32, (_POINTER, _SIZE)),
            ("count_keys", _SIZE, (_POINTER, _SIZE, ctypes.c_uint32)),
            ("keys_encode", None, (_POINTER, _SIZE, _SIZE, ctypes.c_uint32, _INT, _INT, _POINTER)),
            ("entropy_encode", _SIZE, (_POINTER, _POINTER, _SIZE, _POINTER, _POINTER)),
            ("entropy_decode", _INT, (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER)),
            ("shared_scales", None, (_POINTER, _SIZE, _SIZE, _POINTER)),
            ("shared_encode", None, (_POINTER, _SIZE, _SIZE, _INT, _INT, _INT, ctypes.c_uint32, _POINTER, _POINTER)),
            ("shared_decode", None, (_POINTER, _SIZE, _SIZE, _INT, _INT, _POINTER, _INT, _POINTER)),
            ("lowrank_decode", None, (_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _INT, _POINTER)),
            ("hybrid_split", None, (_POINTER, _SIZE, _POINTER)),
            ("hybrid_merge", None, (_POINTER, _SIZE, _POINTER)),
            ("eden_encode", None, (_POINTER, _SIZE, _INT, *[_SIZE] * 3, _INT, ctypes.c_uint32, _POINTER, _POINTER)),
            ("eden_decode", None, (_POINTER, _SIZE, _INT, *[_SIZE] * 3, _POINTER, _INT, _POINTER)),
            ("qsgd_encode", None, (_POINTER, _SIZE, _INT, _SIZE, _INT, ctypes.c_uint32, _POINTER)),
            ("qsgd_decode", None, (_POINTER, _SIZE, _INT, _SIZE, _INT, _POINTER)),
            ("ternary_encode", None, (_POINTER, *[_SIZE] * 2, _INT, ctypes.c_double, ctypes.c_uint32, _POINTER)),
            ("ternary_decode", None, (_POINTER, _SIZE, _SIZE, _INT, _POINTER)),
            ("natural_encode", None, (_POINTER, _SIZE, ctypes.c_uint32, _POINTER)),
            ("natural_decode", None, (_POINTER, _SIZE, _INT, _POINTER)),
            (
                "polar_beyond",
                _SIZE,
                (_POINTER, _SIZE, _SIZE, _POINTER, _INT, _POINTER, _INT, *(ctypes.c_float,) * 3, _SIZE, _POINTER),
            ),
            ("polar_turn", None, (_POINTER, _SIZE, ctypes.c_uint32, _POINTER, _POINTER)),
            ("polar_turn_scales", None, (_POINTER, _POINTER, _SIZE, _POINTER, _POINTER)),
            ("polar_turn_back", None, (_POINTER, _SIZE, ctypes.c_uint32, _POINTER, _INT, _POINTER)),
            (
                "polar_encode_vector",
                None,
                (_POINTER, _SIZE, ctypes.c_float, _SIZE, *(_POINTER,) * 3, _INT, *(_POINTER,) * 3),
            ),
        )
    ]


def _load():
    """The shared library, or None with one warning that says why not."""
    path = pathlib.Path(__file__).parent.with_name("_native.so")
    try:
        if not path.exists():
            raise OSError("they were not built; install gcompress where there is a C++ compiler")
        library = ctypes.CDLL(str(path))
        if library.gc_abi_version() != ABI_VERSION:
            raise OSError(f"{path.name} has ABI {library.gc_abi_version()}, expected {ABI_VERSION}: rebuild it")
    except OSError as error:
        logging.getLogger(__name__).warning("C++ kernels are not in use, the slower torch reference is: %s", error)
        return None
    library.gc_select_kernels.argtypes = [ctypes.c_char_p]
    library.gc_select_kernels.restype = ctypes.POINTER(Kernels)
    library.gc_best_isa.restype = ctypes.c_char_p
    return library


_library = _load()


def _select(name):
    """The kernels for a name in BACKENDS, or None for the reference."""
    if name not in BACKENDS:
        raise ConfigError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "reference" or (name == "native" and _library is None):
        return None
    found = _library.gc_select_kernels(b"" if name == "native" else name.encode()) if _library else None
    if not found:
        raise ConfigError(f"backend: {name!r} is not built or this processor cannot run it")
    return found.contents


def available_backends():
    """The names that `use_backend` accepts here, the reference first."""
    names = ["reference"]
    if _library is not None:
        names += [isa for isa in ISAS if _library.gc_select_kernels(isa.encode())]
    return names


def backend():
    """What is in use for CPU tensors: "reference", or the instruction set of the C++ kernels."""
    if _kernels is None:
        return "reference"
    return _library.gc_best_isa().decode() if _name == "native" else _name


@contextlib.contextmanager
def use_backend(name):
    """Run a block with another backend (not thread-safe; for tests and benchmarks): its name, or a table of kernels."""
    global _kernels, _name
    before = _kernels, _name
    _kernels, _name = (_select(name) if isinstance(name, str) else name), name
    try:
        yield
    finally:
        _kernels, _name = before


_name = os.environ.get("GCOMPRESS_BACKEND") or os.environ.get("GCOMPRESS_ISA") or "native"
_kernels = _select(_name)


def kernels(tensor, method=None):
    """The kernels to use on `tensor` for a compressor's name, or None where the torch reference must run."""
    if tensor.device.type == "cpu":
        found = _kernels
    elif tensor.device.type == "cuda" and _name != "reference":
        found = gpu.kernels(tensor.device)
    else:
        return None
    return found if method is None or method in getattr(found, "methods", (method,)) else None
