#!/usr/bin/env python3
"""Build Horovod 0.28.1 as released for the torch of this Python, and install it.

Horovod is published as a source distribution that torch >= 2.1 cannot be compiled
against (horovod#3996, #4014). This script downloads the release from the package
index, adjusts its *build files only* (none of its sources), builds a wheel and keeps
it in a cache keyed by Python, torch, platform, controllers and the edits. The next
call installs from the cache in seconds; the build itself takes 4 to 8 minutes on two
cores. The MPI controller is built when `mpicxx` is on the PATH, Gloo always.

    python tools/build_horovod.py            # build or reuse, then install
    python tools/build_horovod.py --print    # only print where the wheel is or would be
"""

import argparse
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

VERSION = "0.28.1"
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


def cache_folder():
    root = os.environ.get("GCOMPRESS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gcompress"
    )
    return pathlib.Path(root) / "wheels"


def cache_key():
    import torch

    controllers = "gloo+mpi" if shutil.which("mpicxx") else "gloo"
    edits = hashlib.sha256(repr((EDITS, BUILD_REQUIREMENTS)).encode()).hexdigest()[:8]
    parts = [
        f"horovod{VERSION}",
        sys.implementation.cache_tag,
        f"torch{torch.__version__}",
        sysconfig.get_platform(),
        platform.libc_ver()[1] or "libc",
        controllers,
        edits,
    ]
    return "-".join(re.sub(r"[^A-Za-z0-9.+]", "_", part) for part in parts)


def run(command, **kwargs):
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run(command, check=True, **kwargs)


def adjust(source):
    for name, pattern, replacement in EDITS:
        path = source / name
        text, count = re.subn(pattern, replacement.replace("\\", r"\\"), path.read_text())
        if count != 1:
            sys.exit(f"{name}: expected one match of {pattern!r}, found {count}")
        path.write_text(text)


def build(target):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(pip + ["install", "-q", *BUILD_REQUIREMENTS])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as scratch:
        scratch = pathlib.Path(scratch)
        run(
            pip
            + ["download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
            + ["-d", str(scratch), f"horovod=={VERSION}"]
        )
        archive = scratch / f"horovod-{VERSION}.tar.gz"
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = scratch / f"horovod-{VERSION}"
        adjust(source)
        environment = {
            **os.environ,
            # The cmake of the virtual environment comes before the system's.
            "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITH_GLOO": "1",
            ("HOROVOD_WITH_MPI" if shutil.which("mpicxx") else "HOROVOD_WITHOUT_MPI"): "1",
            "MAKEFLAGS": os.environ.get("MAKEFLAGS", f"-j{os.cpu_count()}"),
        }
        print(f"building Horovod {VERSION}: 4 to 8 minutes on two cores, once", flush=True)
        wheels = scratch / "wheels"
        run(
            pip + ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)],
            env=environment,
        )
        # Into the cache in one step: an interrupted build leaves nothing behind that looks whole.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(wheels, partial)
        if not target.exists():
            os.replace(partial, target)
        shutil.rmtree(partial, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the wheel's place in the cache and end")
    arguments = parser.parse_args()
    target = cache_folder() / cache_key()
    if arguments.print:
        print(target)
        return
    if not target.exists():
        build(target)
    (wheel,) = target.glob("horovod-*.whl")
    run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        + ["--force-reinstall", str(wheel)]
    )
    run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        + ["cloudpickle", "psutil", "pyyaml", "packaging", "cffi>=1.4.0"]
    )
    run([sys.executable, "-c", "import horovod.torch as hvd; print('Horovod with Gloo:', hvd.gloo_built())"])


if __name__ == "__main__":
    main()
