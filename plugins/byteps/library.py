"""Our C++ compressors in a BytePS worker: `_worker.so` beside this file. For a server's see serve.py."""

import ctypes
import pathlib

from gcompress import backends
from gcompress.backends import cpu
from gcompress.errors import ConfigError

from .callback import codec

HERE = pathlib.Path(__file__).parent


def load() -> ctypes.CDLL:
    """Load a worker's compressors into BytePS's library, and give them the kernels."""
    path, kernels = HERE / "_worker.so", backends.cpu_kernels()
    if not path.exists():
        raise ConfigError(f"gcompress.plugins.byteps: {path.name} is not built: run tools/build_byteps.py")
    if kernels is None:
        raise ConfigError("gcompress.plugins.byteps: the C++ kernels are needed, got the reference backend")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    if library.gcompress_byteps_use(ctypes.c_void_p(kernels.table), cpu.signatures(), codec):
        raise ConfigError(f"gcompress.plugins.byteps: {path.name} is of another release: run tools/build_byteps.py")
    return library
