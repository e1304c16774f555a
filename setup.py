"""Builds gcompress/_native.so from csrc; everything else about the package is in pyproject.toml.

The library has a plain C ABI and links neither Python nor torch, so one build serves all of
them. kernels.cc is compiled once per instruction set, chosen among at run time. Without a C++
compiler the package installs all the same and runs on its torch reference.

GCOMPRESS_REQUIRE_NATIVE=1 makes a build without the library an error, GCOMPRESS_WERROR=1 a compiler's warning.
docs/PLATFORMS.md has the instruction sets and the wheels.
"""

import glob
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if sys.platform == "darwin":  # one processor a wheel: a universal Python would compile for two at once
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
# What is built for, which on macOS need not be what builds.
MACHINE = os.environ.get("ARCHFLAGS", "").replace("-arch", "").strip() or platform.machine()
# -ffp-contract=off: a fused multiply-add rounds differently, and bytes must not depend on
# the instruction set. No -ffast-math for the same reason.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
# gcc 12 warns of its own AVX-512 header (gcc bug 105593); clang does not know the first of these. Of vectors that no
# other library is given, how they would be passed to it does not matter.
FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
ISAS = {"portable": []}
if MACHINE.lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISAS["avx512"] += ["-mprefer-vector-width=512"]
elif MACHINE.lower() in ("aarch64", "arm64"):
    ISAS["neon"] = ["-DGC_NEON"]


def wanted(variable):
    """Whether an environment variable is set to something that is not off."""
    return os.environ.get(variable, "0") not in ("", "0")


class BuildNative(build_ext):
    """A shared library without Python's ABI in its name, from one source compiled several times."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        scratch, flags = self.build_temp, FLAGS + ["-Werror"] * wanted("GCOMPRESS_WERROR")
        compiler = self.without_search_paths(self.compiler)

        def compiled(source, folder, *more):
            return compiler.compile([source], output_dir=os.path.join(scratch, folder), extra_postargs=[*flags, *more])

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # minutes each
            jobs = [pool.submit(compiled, "csrc/dispatch.cc", "dispatch")]
            jobs += [
                pool.submit(compiled, "csrc/kernels.cc", isa, f"-DGC_ISA={isa}", *more) for isa, more in ISAS.items()
            ]
            objects = sum((job.result() for job in jobs), [])
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    @staticmethod
    def without_search_paths(compiler):
        """The compiler, but linking without the folders in which the Python that builds has its own libraries."""
        for name in ("linker_so", "linker_so_cxx"):
            if getattr(compiler, name, None):
                kept = [flag for flag in getattr(compiler, name) if not flag.startswith(("-Wl,-rpath", "-Wl,-R", "-L"))]
                setattr(compiler, name, kept)
        compiler.library_dirs, compiler.runtime_library_dirs = [], []
        return compiler


class OptionalBuild(BuildNative):
    """The same, but a missing compiler is no error unless GCOMPRESS_REQUIRE_NATIVE is set."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # no compiler is a supported way to run
            if not ext.optional:
                raise
            print(f"gcompress: built without C++ kernels, the torch reference is used: {error}", file=sys.stderr)
            raise CompileError(str(error)) from error  # which setuptools lets pass for what is optional


class PlatformWheel(bdist_wheel):
    """A wheel for all Pythons of a platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2].replace("universal2", MACHINE)


# In a checkout, these and the sources that the GPU's kernels are compiled from lie beside the package.
folders = {f"gcompress.{name}": name for name in ("plugins", "examples", "tools", "benchmarks")}
folders |= {f"gcompress.csrc.{part}": f"csrc/{part}" for part in ("arith", "cuda")}
packages = [*find_packages(include=["gcompress", "gcompress.*"]), *folders]
packages += [f"gcompress.{folder}.{name}" for folder in ("plugins", "examples") for name in find_packages(folder)]

headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + ["csrc/kernels.def"])
sources = ["csrc/dispatch.cc", "csrc/kernels.cc"]
setup(
    packages=packages,
    package_dir={"gcompress": "gcompress", **folders},
    ext_modules=[
        Extension("gcompress._native", sources, depends=headers, optional=not wanted("GCOMPRESS_REQUIRE_NATIVE"))
    ],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": PlatformWheel},
)
