"""Which kernels work on a tensor: the C++ ones on the CPU (cpu.py), those of csrc/cuda/ on a GPU (gpu/), or none.

`kernels(tensor, method)` returns them when they are built, wanted, can read the tensor and have all that the method
needs; otherwise None, and the caller runs its torch reference. `GCOMPRESS_BACKEND=reference` or
`use_backend("reference")` turns them off; `GCOMPRESS_ISA=portable|neon|avx2|avx512`, or the same names given to
`use_backend`, choose an instruction set. All give the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os

from ..errors import ConfigError
from . import cpu, gpu
from .gpu.plans import DeviceKernels

log = logging.getLogger(__name__)

BACKENDS = ("native", "reference", *cpu.ISAS)


def _select(name):
    """The kernels for a name in BACKENDS, or None for the reference."""
    if name not in BACKENDS:
        raise ConfigError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "reference" or (name == "native" and not cpu.built()):
        return None
    found = cpu.kernels("" if name == "native" else name)
    if found is None:
        raise ConfigError(f"backend: {name!r} is not built or this processor cannot run it")
    return found


def available_backends() -> list[str]:
    """The names that `use_backend` accepts here, the reference first."""
    return ["reference", *(isa for isa in cpu.ISAS if cpu.kernels(isa) is not None)]


def backend() -> str:
    """What is in use for CPU tensors: "reference", or the instruction set of the C++ kernels."""
    if _kernels is None:
        return "reference"
    return cpu.best_isa() if _name == "native" else _name


@contextlib.contextmanager
def use_backend(name):
    """Run a block with another backend (not thread-safe; for tests and benchmarks): its name, or a table of kernels."""
    global _kernels, _name
    before = _kernels, _name
    _kernels, _name = (_select(name) if isinstance(name, str) else name), name
    try:
        yield
    finally:
        _kernels, _name = before


_name = os.environ.get("GCOMPRESS_BACKEND") or os.environ.get("GCOMPRESS_ISA") or "native"
_kernels = _select(_name)


def cpu_kernels() -> cpu.CpuKernels | None:
    """The C++ kernels in use, or None."""
    return _kernels


def kernels(tensor, method):
    """The kernels to use on `tensor` for a method, or None where its torch reference must run.

    Args:
        tensor: decides by its device.
        method: a compressor or its class: `name`, `kernels` and `device_kernels` say what it needs.
    """
    if tensor.device.type == "cpu":
        found = _kernels
        if isinstance(found, cpu.CpuKernels) and tensor.numel() >= cpu.LARGE:
            found = found.with_threads(cpu.thread_count())
    elif tensor.device.type == "cuda" and _name != "reference":
        found = gpu.kernels(tensor.device)
    else:
        found = None
    if found is None:
        return None
    if provides(found, method):
        return found
    _say_once(method.name, tensor.device.type)
    return None


def provides(found: cpu.CpuKernels | DeviceKernels | type[DeviceKernels], method) -> bool:
    """Whether a table of kernels, cpu.CpuKernels or gpu.DeviceKernels, has all that a method needs."""
    names = method.device_kernels if found.on_device and method.device_kernels is not None else method.kernels
    return names is not None and found.has(names)


@functools.cache
def _say_once(name, device):
    log.warning("%s has no kernels for %s, the slower torch reference is in use", name, device)
