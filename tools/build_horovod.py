#!/usr/bin/env python3
"""Build Horovod 0.28.1 as released for the torch of this Python, and install it.

Horovod is published as a source distribution that torch >= 2.1 cannot be compiled
against (horovod#3996, #4014). This script downloads the release from the package
index, adjusts its *build files only* (none of its sources), builds a wheel and keeps
it in a cache keyed by all that decides the build (wheel_cache.py). The next call
installs from the cache in seconds; the build itself takes 4 to 8 minutes on two
cores. The MPI controller is built when `mpicxx` is on the PATH, Gloo always.

    python tools/build_horovod.py            # build or reuse, then install
    python tools/build_horovod.py --print    # only print where the wheel is or would be
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import wheel_cache
from wheel_cache import PIP, CannotBuild, run

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of its source distribution
# What Horovod's build needs in the environment: its setup.py imports pkg_resources, and
# its bundled third-party CMake files predate CMake 4.
BUILD_REQUIREMENTS = ["setuptools<81", "wheel", "packaging", "cmake>=3.18,<4"]
# Every edit must match; a release that looks different must not be built half-adjusted.
EDITS = [
    # torch >= 2.1 needs C++17, torch >= 2.13 C++20.
    ("CMakeLists.txt", r"set\(CMAKE_CXX_STANDARD 14\)", "set(CMAKE_CXX_STANDARD 20)"),
    ("horovod/torch/CMakeLists.txt", r"set\(CMAKE_CXX_STANDARD 14\)", "set(CMAKE_CXX_STANDARD 20)"),
    # A CUDA build of torch must not pull CUDA into a CPU build of Horovod.
    (
        "cmake/Modules/FindPytorch.cmake",
        r"import torch; from torch\.utils\.cpp_extension import CUDA_HOME; print\(True if \(\(torch",
        "import os, torch; from torch.utils.cpp_extension import CUDA_HOME; "
        "print(True if (os.environ.get('HOROVOD_GPU_OPERATIONS') and (torch",
    ),
]


def make_recipe():
    mpi = wheel_cache.output_of("mpicxx", "-show") if shutil.which("mpicxx") else "none"
    return wheel_cache.make_recipe("horovod", VERSION, SHA256, [pathlib.Path(__file__)], mpi=mpi)


def adjust(source):
    for name, pattern, replacement in EDITS:
        path = source / name
        text, count = re.subn(pattern, replacement.replace("\\", r"\\"), path.read_text())
        if count != 1:
            raise CannotBuild(f"{name}: expected one match of {pattern!r}, found {count}")
        path.write_text(text)


def build(recipe):
    run([*PIP, "install", "-q", *BUILD_REQUIREMENTS])
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as scratch:
        scratch = pathlib.Path(scratch)
        source = wheel_cache.download_source(scratch, "horovod", VERSION, SHA256)
        adjust(source)
        environment = {
            **os.environ,
            # The cmake of the virtual environment comes before the system's.
            "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
            "CXX": wheel_cache.compiler(),
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITH_GLOO": "1",
            ("HOROVOD_WITHOUT_MPI" if recipe["mpi"] == "none" else "HOROVOD_WITH_MPI"): "1",
            "MAKEFLAGS": os.environ.get("MAKEFLAGS", f"-j{os.cpu_count()}"),
        }
        print(f"building Horovod {VERSION}: 4 to 8 minutes on two cores, once", flush=True)
        wheels = scratch / "wheels"
        run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], env=environment)
        wheel_cache.store(recipe, wheels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the wheel's place in the cache and end")
    arguments = parser.parse_args()
    try:
        recipe = make_recipe()
        if arguments.print:
            print(wheel_cache.entry(recipe))
            return
        if not wheel_cache.usable(recipe):
            build(recipe)
        (wheel,) = wheel_cache.entry(recipe).glob("horovod-*.whl")
        wheel_cache.install_wheel(wheel)
        run([*PIP, "install", "-q", "cloudpickle", "psutil", "pyyaml", "packaging", "cffi>=1.4.0"])
        run([sys.executable, "-c", "import horovod.torch as hvd; print('Horovod with Gloo:', hvd.gloo_built())"])
    except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"build_horovod.py: {error}")


if __name__ == "__main__":
    main()
