"""Kernels of another processor, or of another compiler: the library is built for it, and its kernels run as if here.

A foreign processor's kernels run in an emulator (tests/foreign/serve_kernels.cc) on this process's memory, of which the
emulated one fetches the pages that they touch. So everything that tests do with kernels they can do with these.
"""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sys

from gcompress.backends import cpu
from tests.launching import REPOSITORY
from tests.processes import only_one

SOURCES = ("csrc/**/*.h", "csrc/*.cc", "csrc/kernels.def", "tests/foreign/*.cc", "setup.py")
PAGE = 4096


def cached(name, build):
    """The path build/foreign/NAME-DIGEST, made by `build(path)` unless these sources have made it before."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(REPOSITORY.glob(pattern)):
            digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    folder = REPOSITORY / "build" / "foreign"
    target = folder / f"{name}-{digest.hexdigest()[:16]}"
    with only_one(folder / f"{name}.lock"):
        if not target.exists():
            for old in folder.glob(f"{name}[-.]*"):
                if old.suffix != ".lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            made = folder / f"{name}.new"
            build(made)
            made.rename(target)
    return target


def built_with(compiler):
    """The path of the library that another compiler (its command for C++) makes of this checkout."""

    def build(made):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", made, "--build-temp", made / "objects"]
        environment = {**os.environ, "CC": compiler, "CXX": compiler, "GCOMPRESS_REQUIRE_NATIVE": "1"}
        subprocess.run(list(map(str, command)), cwd=REPOSITORY, env=environment, check=True)
        shutil.rmtree(made / "objects")

    return cached(os.path.basename(compiler), build) / "gcompress" / "_native.so"


def built_for(compiler, isas):
    """The path of a program that serves the kernels of other instruction sets.

    Args:
        compiler: the command of a C++ compiler for that processor.
        isas: {name: its flags beside those of setup.py}.
    """

    def build(made):
        flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
        flags += ["-fno-rtti", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
        parts = {"dispatch": ["csrc/dispatch.cc"], "serve": ["tests/foreign/serve_kernels.cc"]}
        parts |= {isa: ["csrc/kernels.cc", f"-DGC_ISA={isa}", *more] for isa, more in isas.items()}
        objects = [f"{made}.{name}.o" for name in parts]
        running = [
            subprocess.Popen([compiler, *flags, "-c", *part, "-o", target], cwd=REPOSITORY)
            for part, target in zip(parts.values(), objects, strict=True)
        ]
        assert [each.wait() for each in running] == [0] * len(running), "the cross build failed"
        subprocess.run([compiler, "-static", *objects, "-o", made], check=True)
        for target in objects:
            os.unlink(target)

    return cached(os.path.basename(compiler), build)


class ForeignKernels(cpu.CpuKernels):
    """The kernels of one instruction set that another process runs; for `gcompress.backends.use_backend`.

    Args:
        command: of that process, with the instruction set's name.
    """

    def __init__(self, command):
        self.calls, self.pages = 0, 0
        self._process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        super().__init__(None, cpu._signatures)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def functions(self):
        for number, signature in enumerate(self.signatures.values()):
            yield lambda *arguments, n=number, s=signature: self._call(n, s, arguments)

    def _call(self, number, signature, arguments):
        words = [number]
        for (kind, _), value in zip(signature.parameters, arguments, strict=True):
            if kind is ctypes.c_float:
                words.append(struct.unpack("<I", struct.pack("<f", value))[0])
            elif kind is ctypes.c_double:
                words.append(struct.unpack("<q", struct.pack("<d", value))[0])
            else:
                words.append(address_of(value) if kind is ctypes.c_void_p else int(value))
        result, kind = self._result(words), signature.kind._restype_
        return None if kind is None else kind(result).value

    def _result(self, words):
        self.calls += 1
        self._process.stdin.write(struct.pack(f"<{1 + len(words)}q", len(words), *words))
        self._process.stdin.flush()
        while True:
            what, value, size = struct.unpack("<3q", self._read(24))
            if what == ord("R"):
                return value
            if what == ord("P"):
                self.pages += 1
                self._process.stdin.write(ctypes.string_at(value, PAGE))
                self._process.stdin.flush()
            else:
                ctypes.memmove(value, self._read(size), size)

    def _read(self, size):
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise OSError(f"the process that runs the kernels ended with {self._process.wait()}")
        return data

    def run(self, calls, count, width):
        for number in range(count):
            words = (ctypes.c_int64 * width).from_address(calls + 8 * number * width)
            signature = list(self.signatures.values())[words[0]]
            result = self._result(list(words[: 1 + len(signature.parameters)]))
            if signature.kind._restype_ is not None and result != 0:
                return number
        return count


def address_of(value):
    """The address in what ctypes takes for a pointer."""
    if value is None or isinstance(value, int):
        return value or 0
    return ctypes.addressof(value._obj) if hasattr(value, "_obj") else ctypes.cast(value, ctypes.c_void_p).value or 0
