"""Launches on a CUDA device: CuPy compiles and loads the kernels once, torch has the memory and the stream.

Tensors are not copied or converted: kernels get their addresses, outputs and workspaces come from torch's caching
allocator, and every launch goes to torch's current stream, so that it stands in order with torch's own work and can
be captured in a CUDA graph.
"""

import contextlib
import ctypes
import functools
import logging
import struct
import threading
from typing import Any, NamedTuple

import torch

from .compiler import cached_cubin
from .plans import THREADS, DeviceKernels

OLDEST = (7, 0)  # compute capability: shuffles and ballots with masks, 96 KB of shared memory
UNASKED = 40 << 10  # bytes of shared memory that a launch may ask for and stay, with the kernel's own, within 48 KB


class Prepared(NamedTuple):
    """A kernel that is loaded."""

    function: Any  # CuPy's
    form: struct.Struct  # of the addresses of its arguments, then of these
    shared: int  # bytes of shared memory that a launch may ask for


class CupyLauncher:
    """Launches of the kernels of csrc/cuda/ on one torch.device."""

    def __init__(self, device):
        from cupy.cuda import driver, runtime

        self._start, self._take_device, self._device = driver.launchKernel, runtime.setDevice, device
        self._thread = threading.local()
        self._functions, self._numbers = {}, {}

    def empty(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def zeros(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def numbers(self, values):
        """A tuple of integers, or of tuples, as int64 on the device."""
        if values not in self._numbers:
            self._numbers[values] = torch.tensor(values, device=self._device)
        return self._numbers[values]

    def constant(self, key, make):
        """The array that `make()` makes for a key, on the device, where it stays."""
        if key not in self._numbers:
            self._numbers[key] = torch.from_numpy(make()).to(self._device)
        return self._numbers[key]

    def upload(self, array):
        """A small NumPy array to the device, without waiting for it: by way of pinned memory, on the current stream."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def read(self, tensor):
        """Bytes of the device as a list of numbers below 2^32: waits for the device."""
        return tensor.view(torch.int32).tolist()

    def launch(self, module, kernel, blocks, *arguments, shared=0):
        found = self._functions.get(kernel)
        if found is None or shared > found.shared:
            found = self._functions[kernel] = self._prepared(module, kernel, arguments, shared)
        # Every parameter has 64 bits; they follow the addresses at which the driver reads them, before it returns.
        count = len(arguments)
        memory = bytearray(16 * count)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        found.form.pack_into(memory, 0, *range(base + 8 * count, base + 16 * count, 8), *arguments)
        index = self._device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        if not hasattr(self._thread, "begun"):  # a new thread has no context until the runtime is told its device
            self._take_device(torch.cuda.current_device())
            self._thread.begun = True
        with contextlib.nullcontext() if torch._C._cuda_getDevice() == index else torch.cuda.device(index):
            self._start(found.function.ptr, blocks, 1, 1, THREADS, 1, 1, shared, stream, base, 0)

    def _prepared(self, module, kernel, arguments, shared):
        """A kernel that takes arguments of these types, and may have that many bytes of shared memory."""
        with torch.cuda.device(self._device):
            found = _module(self._device.index, module).get_function(kernel)
            if shared > UNASKED:
                found.max_dynamic_shared_size_bytes = shared
            kinds = "".join("d" if isinstance(argument, float) else "q" for argument in arguments)
            return Prepared(found.kernel, struct.Struct(f"{len(arguments)}q{kinds}"), max(shared, UNASKED))


@functools.cache
def _module(index, module):
    import cupy

    major, minor = torch.cuda.get_device_capability(index)
    return cupy.RawModule(path=str(cached_cubin(module, 10 * major + minor)))


def status(index=0):
    """(whether the kernels run on CUDA device number `index`, a sentence that says what is there or missing)."""
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        return False, f"torch finds no CUDA device; torch {torch.__version__} {built}"
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    what = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        return False, f"{what}: expected at least 7.0"
    try:
        import cupy

        compiler = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        with cupy.cuda.Device(index):
            _module(index, "memory").get_function("feedback_restore")
    except Exception as error:  # whatever keeps CuPy from working is no reason to stop
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return False, f"{what}: CuPy does not work, {reason} (pip install cupy-cuda13x; for CUDA 12, cupy-cuda12x)"
    return True, f"{what}, CuPy {cupy.__version__}, NVRTC {compiler}"


@functools.cache
def _kernels(index):
    active, reason = status(index)
    if active:
        return DeviceKernels(CupyLauncher(torch.device("cuda", index)))
    logging.getLogger(__name__).warning("GPU kernels are not in use, the slower torch reference is: %s", reason)
    return None


def kernels(device):
    """The kernels for a CUDA torch.device, or None, said once, where the torch reference must run on it."""
    return _kernels(torch.cuda.current_device() if device.index is None else device.index)
