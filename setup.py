"""Builds gcompress/_native.so from csrc; everything else about the package is in pyproject.toml.

The library has a plain C ABI and links neither Python nor torch, so one build serves all of
them. kernels.cc is compiled once per instruction set, chosen among at run time. Without a C++
compiler the package installs all the same and runs on its torch reference.
"""

import glob
import os
import platform
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# -ffp-contract=off: a fused multiply-add rounds differently, and bytes must not depend on
# the instruction set. No -ffast-math for the same reason.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
# gcc 12 warns of its own AVX-512 header (gcc bug 105593).
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
ISAS = {"portable": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISAS["avx512"] += ["-mprefer-vector-width=512"]


class BuildNative(build_ext):
    """A shared library without Python's ABI in its name, from one source compiled several times."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        compiler, scratch = self.compiler, self.build_temp
        define = ["-DGC_X86"] if X86 else []
        objects = compiler.compile(["csrc/dispatch.cc"], output_dir=scratch, extra_postargs=FLAGS + define)
        for isa, flags in ISAS.items():
            objects += compiler.compile(
                ["csrc/kernels.cc"],
                output_dir=os.path.join(scratch, isa),
                extra_postargs=[*FLAGS, *flags, f"-DGC_ISA={isa}"],
            )
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        compiler.link_shared_object(objects, target, target_lang="c++")


class OptionalBuild(BuildNative):
    """The same, but a missing compiler is no error."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # no compiler is a supported way to run
            if os.environ.get("GCOMPRESS_REQUIRE_NATIVE"):
                raise
            print(f"gcompress: built without C++ kernels, the torch reference is used: {error}", file=sys.stderr)


# In a checkout, these and the sources that the GPU's kernels are compiled from lie beside the package.
folders = {f"gcompress.{name}": name for name in ("plugins", "examples", "tools", "benchmarks")}
folders |= {f"gcompress.csrc.{part}": f"csrc/{part}" for part in ("arith", "cuda")}
packages = [*find_packages(include=["gcompress", "gcompress.*"]), *folders]
packages += [f"gcompress.{folder}.{name}" for folder in ("plugins", "examples") for name in find_packages(folder)]

headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + ["csrc/kernels.def"])
setup(
    packages=packages,
    package_dir={"gcompress": "gcompress", **folders},
    ext_modules=[
        Extension("gcompress._native", ["csrc/dispatch.cc", "csrc/kernels.cc"], depends=headers, optional=True)
    ],
    cmdclass={"build_ext": OptionalBuild},
)
