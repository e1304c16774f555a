#!/usr/bin/env python3
"""Build BytePS 0.2.5.post15 for the torch of this Python, without CUDA, and install it.

BytePS is published as a source distribution that needs CUDA, NCCL and an old torch, and that
has faults on the way we go (byteps_edits.py lists them). This script downloads the release from
the package index, edits it, builds a wheel against stand-ins for CUDA's, NCCL's and libnuma's
headers (byteps_stand_ins/), and keeps it in a cache keyed by all that decides the build
(wheel_cache.py). Then it compiles our compressors for BytePS's workers and servers
(plugins/byteps/compressor.cc). The build takes 3 to 5 minutes on two cores, once; then seconds.
x86-64 with gcc 11 or newer.

    python tools/build_byteps.py            # build or reuse, install, compile the compressors
    python tools/build_byteps.py --print    # only print where the wheel is or would be
    python tools/build_byteps.py --optional # end well, saying so, where it cannot be built
"""

import argparse
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile

import byteps_edits
import wheel_cache
from wheel_cache import PIP, CannotBuild, compiler, run

VERSION = "0.2.5.post15"
SHA256 = "9d6a3c5be4c4b5a172739744bb32725c433f9a9f63794e1885e7376ff4eea99f"  # of its source distribution
HERE = pathlib.Path(__file__).resolve().parent
STAND_INS = HERE / "byteps_stand_ins"
PLUGIN = HERE.parent / "plugins" / "byteps"
# setup.py wants distutils, which newer Pythons have from setuptools.
BUILD_REQUIREMENTS = ["setuptools<81", "wheel"]
# Taken by BytePS's setup.py: the zeromq archive lies in the release, and distutils compiles one file at a time.
PRE_SETUP = """
import distutils.ccompiler
import multiprocessing.pool
import os

ucx_path = ""


def setup():
    compile_one = distutils.ccompiler.CCompiler.compile

    def compile_all(self, sources, *arguments, **keywords):
        with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
            parts = pool.map(lambda source: compile_one(self, [source], *arguments, **keywords), sources)
        return [name for part in parts for name in part]

    distutils.ccompiler.CCompiler.compile = compile_all


def extra_make_option():
    archive = os.path.abspath("zeromq-4.1.4.tar.gz")
    return f"ps -j{os.cpu_count()} WGET='cp -t .' ZMQ_URL='{archive}' "
"""
# What compressor.cc includes, and what that includes.
HEADERS = [
    "byteps/common/common.h",
    "byteps/common/half.h",
    "byteps/common/logging.h",
    "byteps/common/compressor/common.h",
    "byteps/common/compressor/compressor.h",
    "byteps/common/compressor/compressor_registry.h",
    "byteps/common/compressor/utils.h",
]
TARGETS = {"_worker.so": [], "_server.so": ["-DBYTEPS_BUILDING_SERVER"]}


def make_recipe():
    tools = [pathlib.Path(__file__), pathlib.Path(byteps_edits.__file__), *STAND_INS.iterdir()]
    return wheel_cache.make_recipe("byteps", VERSION, SHA256, tools)


def check_machine():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise CannotBuild(f"it is built for x86-64 Linux only, this is {sys.platform} on {platform.machine()}")
    for tool in ("make", "ar", "tar"):
        if shutil.which(tool) is None:
            raise CannotBuild(f"{tool} was not found (Debian, Ubuntu: apt-get install build-essential)")
    compiler()


def stand_in_folder(scratch):
    """A folder that passes for NCCL's: headers, and libraries with nothing in them."""
    home = scratch / "stand-ins"
    shutil.copytree(STAND_INS, home / "include")
    (home / "lib").mkdir()
    for name in ("nccl", "numa"):
        run(["ar", "rc", str(home / "lib" / f"lib{name}.a")])
    return home


def run_quietly(command, **kwargs):
    """Run a command that prints thousands of lines; show its last ones if it fails."""
    print("+", " ".join(map(str, command)), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if result.returncode:
        print(result.stdout[-8000:], flush=True)
        raise subprocess.CalledProcessError(result.returncode, command)


def build(recipe):
    run([*PIP, "install", "-q", *BUILD_REQUIREMENTS])
    with tempfile.TemporaryDirectory(prefix="byteps-build-") as scratch:
        scratch = pathlib.Path(scratch)
        frameworks = {"BYTEPS_WITHOUT_TENSORFLOW": "1", "BYTEPS_WITHOUT_MXNET": "1", "BYTEPS_WITH_PYTORCH": "1"}
        # The release's setup.py runs to tell its name.
        source = wheel_cache.download_source(scratch, "byteps", VERSION, SHA256, env={**os.environ, **frameworks})
        byteps_edits.apply(source)
        (source / "pre_setup_local.py").write_text(PRE_SETUP)
        environment = {
            **os.environ,
            **frameworks,
            "CC": os.environ.get("CC", "gcc"),
            "CXX": compiler(),
            "CFLAGS": "-w",
            "CI": "true",
            "BYTEPS_NCCL_HOME": str(stand_in_folder(scratch)),
            "BYTEPS_NCCL_LINK": "SHARED",
        }
        print(f"building BytePS {VERSION}: 3 to 5 minutes on two cores, once", flush=True)
        run_quietly([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=source, env=environment)
        for name in HEADERS:
            (source / "dist/include" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, source / "dist/include" / name)
        for path in STAND_INS.iterdir():
            shutil.copy(path, source / "dist/include")
        wheel_cache.store(recipe, source / "dist")


def compile_plugin(include):
    """Our compressors, once as a worker's library and once as a server's.

    Always: it takes seconds, and no file's time tells by which compiler and against which release they were made.
    """
    source, interface = PLUGIN / "compressor.cc", HERE.parent / "csrc" / "gcompress.h"
    for name, flags in TARGETS.items():
        run(
            [*compiler().split(), "-std=c++17", "-O2", "-fPIC", "-shared", "-march=x86-64-v3", "-Wall", *flags]
            + [f"-I{include}", f"-I{interface.parent}", f"-I{sysconfig.get_path('include')}"]
            + [str(source), "-o", str(PLUGIN / name)]
        )


def installed(wheel):
    """Whether what is installed is this wheel's: its worker library is there with the same bytes."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.fullmatch(r"byteps/torch/c_lib\..*so", n)]
        path = pathlib.Path(sysconfig.get_path("platlib")) / name
        return path.exists() and path.read_bytes() == archive.read(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the wheel's place in the cache and end")
    parser.add_argument("--optional", action="store_true", help="where it cannot be built, say why and end well")
    arguments = parser.parse_args()
    try:
        check_machine()
        recipe = make_recipe()
        target = wheel_cache.entry(recipe)
        if arguments.print:
            print(target)
            return
        if not wheel_cache.usable(recipe):
            build(recipe)
        (wheel,) = target.glob("byteps-*.whl")
        if not installed(wheel):
            wheel_cache.install_wheel(wheel)
        compile_plugin(target / "include")
        run([sys.executable, "-c", "import byteps.torch; print('BytePS is built')"])
    except (CannotBuild, byteps_edits.EditError, OSError, subprocess.CalledProcessError) as error:
        if not arguments.optional:
            sys.exit(f"build_byteps.py: {error}")
        print(f"build_byteps.py: BytePS is left out, its tests will be skipped: {error}", flush=True)


if __name__ == "__main__":
    main()
