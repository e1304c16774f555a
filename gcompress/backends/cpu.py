"""The C++ kernels (csrc/, plain C ABI) through ctypes: one table of them for each instruction set."""

import ctypes
import functools
import logging
import pathlib

ABI_VERSION = 3
ISAS = ("portable", "avx2", "avx512")

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


class CpuKernels:
    """The kernels of one instruction set, attributes by their names."""

    on_device = False

    def __init__(self, table):
        self.names = frozenset(name for name, _ in Kernels._fields_)
        for name in self.names:
            setattr(self, name, getattr(table, name))
        self.table = table

    def has(self, names):
        """Whether all kernels of these names are there."""
        return self.names.issuperset(names)


@functools.cache
def kernels(isa):
    """The kernels for a name in ISAS, or for the best set of this processor if it is empty; None if there are none."""
    found = _library.gc_select_kernels(isa.encode()) if _library else None
    return CpuKernels(found.contents) if found else None


def built():
    """Whether there are C++ kernels at all."""
    return _library is not None


def best_isa():
    """The best instruction set that this processor runs."""
    return _library.gc_best_isa().decode()
