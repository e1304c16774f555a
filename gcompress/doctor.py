"""`gcompress doctor`: what is installed, what runs the compressors, which engines there are, and whether ranks meet."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import torch

from . import __version__, backends, methods
from .backends import gpu, provides
from .backends.gpu.plans import DeviceKernels

FRAMEWORKS = ("lightning", "pytorch-lightning", "accelerate", "transformers")
EXCHANGE_SECONDS = 120  # that two processes have to start and exchange


def report() -> bool:
    """Print everything; returns whether two processes could exchange."""
    print(f"gcompress {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    _print_kernels()
    _print_engines()
    return _print_exchange()


def _print_kernels():
    built = ", ".join(backends.available_backends())
    print(f"CPU    {backends.backend()} (there are: {built}; GCOMPRESS_BACKEND chooses)")
    _print_methods(backends.cpu_kernels())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(max(1, count)):
        active, reason = gpu.status(index)
        name = f"GPU {index}" if count else "GPU"
        print(f"{name:6} {'kernels' if active else 'torch reference' if count else 'none'}: {reason}")
    _print_methods(DeviceKernels)


def _print_methods(kernels):
    """Which methods a table of kernels serves, and which run on the torch reference."""
    served = {name for name, method in methods().items() if kernels is not None and provides(kernels, method)}
    for what, names in (("with kernels", served), ("by the torch reference", set(methods()) - served)):
        if names:
            print(f"       {what}: {', '.join(sorted(names))}")


def _print_engines():
    backend = [name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available")()]
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
    for name, found, lacks in (
        ("torch.distributed", ", ".join(backend), "this torch has no backend"),
        ("Horovod", _version("horovod"), "pip install 'gcompress[horovod]', then gcompress install horovod"),
        ("MPI", _version("mpi4py"), "pip install 'gcompress[mpi]'"),
        ("BytePS", _version("byteps"), "tools/build_byteps.py of a checkout builds it"),
        ("split learning", _version("grpcio"), "pip install 'gcompress[split]'"),
    ):
        more = f", mpirun: {mpirun or 'none: gcompress install mpi'}" if name == "MPI" and found else ""
        print(f"{name:18} {found + more if found else f'not here: {lacks}'}")
    found = [f"{name} {version}" for name in FRAMEWORKS if (version := _version(name))]
    print(f"{'frameworks':18} {', '.join(found) or 'none of ' + ', '.join(FRAMEWORKS)}")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _print_exchange():
    """Let two processes of this machine exchange a megabyte; returns whether they could."""
    (folder,) = importlib.util.find_spec("gcompress.tools").submodule_search_locations
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command.append(str(pathlib.Path(folder) / "check_exchange.py"))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=EXCHANGE_SECONDS,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        error = done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"no end within {EXCHANGE_SECONDS} s"
    print(f"{'exchange':18} {f'failed: {error}' if error else done.stdout.strip()}")
    return not error
