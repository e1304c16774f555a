"""NVRTC without a driver, by its C interface: which architectures each library that is installed here compiles for."""

import ctypes
import importlib.util
import pathlib

from gcompress.backends.gpu import sources

PATTERNS = ("cu1*/lib/libnvrtc.so.1*", "cuda_nvrtc/lib/libnvrtc.so.1*")  # of NVIDIA's wheels
TOOLKITS = ("/usr/local/cuda*/lib64/libnvrtc.so.1?", "/usr/local/cuda*/targets/*/lib/libnvrtc.so.1?")


class Nvrtc:
    """One library.

    Attributes:
        version: such as (13, 0).
        architectures: compute capabilities that it compiles for, such as 90.
    """

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._do("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value
        count = ctypes.c_int()
        self._do("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._do("nvrtcGetSupportedArchs", found)
        self.architectures = tuple(found)

    def _do(self, name, *arguments):
        error = getattr(self._library, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: NVRTC error {error}")

    def compile(self, module, architecture):
        """The cubin of a module of csrc/cuda/; RuntimeError with the compiler's words if it does not compile."""
        program = ctypes.c_void_p()
        text = sources.source(module).encode()
        self._do("nvrtcCreateProgram", ctypes.byref(program), text, f"{module}.cu".encode(), 0, None, None)
        options = [option.encode() for option in (*sources.OPTIONS, f"--gpu-architecture=sm_{architecture}")]
        try:
            array = (ctypes.c_char_p * len(options))(*options)
            if self._library.nvrtcCompileProgram(program, len(options), array):
                raise RuntimeError(f"{module} for sm_{architecture}:\n{self._text(program, 'ProgramLog').decode()}")
            return self._text(program, "CUBIN")
        finally:
            self._do("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, program, what):
        size = ctypes.c_size_t()
        self._do(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._do(f"nvrtcGet{what}", program, text)
        return text.raw


def preload(library):
    """Let CuPy find a library where only this file looks (it looks into its own environment)."""
    for path in library.path.parent.glob("libnvrtc-builtins.so.*"):
        if ".alt." not in path.name:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library.path), mode=ctypes.RTLD_GLOBAL)


def installed():
    """One Nvrtc for each version that is installed, the newest first."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    paths = [path for root in roots for pattern in PATTERNS for path in pathlib.Path(root).glob(pattern)]
    paths += [path for pattern in TOOLKITS for path in pathlib.Path("/").glob(pattern[1:])]
    found = {}
    for path in paths:
        if ".alt." not in path.name:
            library = Nvrtc(path)
            found.setdefault(library.version, library)
    return [found[version] for version in sorted(found, reverse=True)]
