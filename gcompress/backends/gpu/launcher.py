"""Launches on a CUDA device: CuPy compiles and loads the kernels once, torch has the memory and the stream.

Tensors are not copied or converted: kernels get their addresses, outputs and workspaces come from torch's caching
allocator, and every launch goes to torch's current stream, so that it stands in order with torch's own work and can
be captured in a CUDA graph.
"""

import functools
import logging

import torch

from .compiler import cached_cubin
from .plans import THREADS, DeviceKernels

OLDEST = (7, 0)  # compute capability: shuffles and ballots with masks, 96 KB of shared memory
UNASKED = 40 << 10  # bytes of shared memory that a launch may ask for and stay, with the kernel's own, within 48 KB


class CupyLauncher:
    """Launches of the kernels of csrc/cuda/ on one torch.device."""

    def __init__(self, device):
        import cupy
        import numpy

        self._cupy, self._numpy, self._device = cupy, numpy, device
        self._functions, self._numbers, self._asked = {}, {}, {}

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
        function = self._functions.get(kernel) or self._compiled(module, kernel)
        if shared > max(UNASKED, self._asked.get(kernel, 0)):
            function.max_dynamic_shared_size_bytes = self._asked[kernel] = shared
        address = torch.cuda.current_stream(self._device).cuda_stream
        own = self._cupy.cuda
        stream = own.ExternalStream(address, self._device.index) if address else own.Stream.null
        with own.Device(self._device.index), stream:
            # Every parameter has 64 bits.
            kinds = (self._numpy.float64 if isinstance(a, float) else self._numpy.int64 for a in arguments)
            numbers = tuple(kind(a) for kind, a in zip(kinds, arguments, strict=True))
            function((blocks,), (THREADS,), numbers, shared_mem=shared)

    def _compiled(self, module, kernel):
        with self._cupy.cuda.Device(self._device.index):
            raw = _module(self._device.index, module)
            return self._functions.setdefault(kernel, raw.get_function(kernel))


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
