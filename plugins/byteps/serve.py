"""A scheduler or server process of BytePS, with our compressors: `python serve.py`.

DMLC_ROLE and the other variables of BytePS say which; `launch` sets them. It is run as a file
and imports neither torch nor gcompress unless a compressor needs them: a server's C++ libraries
do for most.
"""

import ctypes
import importlib.util
import os
import pathlib
import sys

from callback import codec  # beside this file


def folder_of(package):
    """Where an installed package lies; it is not imported."""
    return pathlib.Path(importlib.util.find_spec(package).origin).parent


def main():
    """Serve until the workers have left."""
    # `import byteps.server` would serve at once, before it knows our compressors.
    (path,) = (folder_of("byteps") / "server").glob("c_lib*.so")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    if os.environ.get("DMLC_ROLE") == "server":
        native = ctypes.CDLL(str(folder_of("gcompress") / "_native.so"))
        native.gc_select_kernels.restype = ctypes.c_void_p
        kernels = native.gc_select_kernels(os.environ.get("GCOMPRESS_ISA", "").encode())
        compressors = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_server.so")), mode=ctypes.RTLD_GLOBAL)
        native.gc_signatures.restype = ctypes.c_void_p
        signatures = ctypes.c_void_p(native.gc_signatures())
        if compressors.gcompress_byteps_use(ctypes.c_void_p(kernels), signatures, codec):
            sys.exit("gcompress.plugins.byteps: _server.so is of another release: run tools/build_byteps.py")
    library.byteps_server()
    # Its work is done; the destructors of its static objects free some memory twice.
    os._exit(0)


if __name__ == "__main__":
    main()
