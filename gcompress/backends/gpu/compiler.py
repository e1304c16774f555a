"""From the kernels' sources to code for a device: by NVRTC through CuPy, which needs no driver.

CuPy's own `RawModule(code=…)` adds --ftz=true behind whatever options it is given, and a flushed denormal is another
byte. So NVRTC is asked here, and CuPy loads the result, which is kept in ~/.cache/gcompress (XDG_CACHE_HOME).
"""

import hashlib
import os
import pathlib
import tempfile

from . import sources


def cubin(module, architecture):
    """The machine code of a module of csrc/cuda/.

    Args:
        module: one of `sources.modules()`.
        architecture: compute capability times ten, such as 90.

    Returns:
        bytes; RuntimeError with the compiler's words if it does not compile.
    """
    from cupy.cuda import nvrtc

    if architecture not in nvrtc.getSupportedArchs():
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(f"NVRTC {version} does not compile for compute capability {architecture / 10}")
    program = nvrtc.createProgram(sources.source(module), f"{module}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*sources.OPTIONS, f"--gpu-architecture=sm_{architecture}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{module}.cu: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def cached_cubin(module, architecture):
    """The path of a file with `cubin(module, architecture)`, made once for each text, compiler and architecture."""
    from cupy.cuda import nvrtc

    key = repr((sources.source(module), sources.OPTIONS, nvrtc.getVersion(), architecture))
    name = f"{module}-sm{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gcompress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="gcompress-"))
    if not (folder / name).exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(cubin(module, architecture))
        os.replace(file.name, folder / name)
    return folder / name
