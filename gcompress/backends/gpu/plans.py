"""How kernels of the GPU are launched, under the names and with the arguments of the C++ ones (csrc/kernels.def).

Each method of compressors/ plans its own launches, in functions that it registers here by `device_kernel`; what
several of them need is in `DeviceKernels`. Launches go to a launcher: CuPy's on a device (launcher.py), and in tests
one that runs the same sources and the same plans on the host. Addresses are integers, as torch's `data_ptr()`.

Nothing here waits for the device, and sizes and workspaces depend on arguments alone, except where a docstring says
that a number is read back.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

TILE = 4096  # entries that a block takes to shared memory
THREADS = 256
FOUR = 4 * THREADS  # entries a block has at four a thread
STEP_ALL, STEP_REDUCE, STEP_CODE = range(3)
SCALE_BYTES, PARTIAL_BYTES = 16, 32
SELECTION_BYTES = 24
DIGIT_BITS = (11, 10, 10)  # of a key, from the top
HISTOGRAM_BYTES = 4 << max(DIGIT_BITS)
MOST_HISTOGRAM_BLOCKS = 1024

_plans: dict[str, Callable] = {}  # a kernel's name: the function that launches what it takes
_keeping: set[str] = set()  # names of encoders that keep the new residual of error feedback as well


def device_kernel(plan=None, *, keeps_residual=False):
    """Register a function under its name as a kernel of the GPU.

    Args:
        plan: called with the DeviceKernels, then with the arguments of the C++ kernel of that name.
        keeps_residual: whether it is an encoder that regards `DeviceKernels.feedback`.
    """
    if plan is None:
        return functools.partial(device_kernel, keeps_residual=keeps_residual)
    _plans[plan.__name__] = plan
    if keeps_residual:
        _keeping.add(plan.__name__)
    return plan


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


class Selected(NamedTuple):
    """Workspaces that say which entries are kept: see csrc/cuda/select.cuh."""

    tiles: int
    selection: Any
    survivors: Any  # their places in each tile, or None for all
    counts: Any
    above: Any  # of the tiles before each tile
    equal: Any

    def places(self):
        """Addresses, in the order in which kernels take them."""
        return [0 if part is None else part.data_ptr() for part in self[1:]]


class DeviceKernels:
    """The kernels of one device: an attribute for each that a method registered.

    Args:
        launcher: has `launch(module, kernel, blocks, *arguments, shared=0)`, `empty(nbytes)` and `zeros(nbytes)`.

    Attributes: `feedback`, the addresses (residual, new residual, flag) that `remembering` sets, or zeros.
    """

    on_device = True

    def __init__(self, launcher):
        self.launcher = launcher
        self.feedback = (0, 0, 0)

    def __getattr__(self, name):
        try:
            return functools.partial(_plans[name], self)
        except KeyError:
            raise AttributeError(f"the GPU has no kernel {name!r}") from None

    @staticmethod
    def has(names):
        """Whether all kernels of these names are there."""
        return all(name in _plans for name in names)

    @staticmethod
    def keeps_residual_with(names):
        """Whether one of these kernels is an encoder that keeps the new residual as well."""
        return not _keeping.isdisjoint(names)

    @staticmethod
    def adds_with(names):
        """Whether one of these kernels adds several payloads in one pass; none does."""
        return False

    def remembering(self, residual, fresh, poisoned):
        """These kernels with error feedback in the encoders: they encode x + residual and keep what is lost.

        Args:
            residual: address of the residual, or 0 if there is none yet.
            fresh: address of the new residual, as many float32.
            poisoned: address of a uint32 that becomes 1 where the new residual is not finite.
        """
        other = copy.copy(self)
        other.feedback = (residual, fresh, poisoned)
        return other

    def feedback_restore(self, residual, n, poisoned, fresh):
        """Put the old residual in the place of a new one that is not finite."""
        self.launch("memory", "feedback_restore", ceil_div(n, FOUR), residual, n, poisoned, fresh)

    def launch(self, module, kernel, blocks, *arguments, shared=0):
        """Run a kernel of csrc/cuda/MODULE.cu in `blocks` blocks; `shared`: bytes of dynamic shared memory."""
        self.launcher.launch(module, kernel, blocks, *arguments, shared=shared)

    def zeros_into(self, target, nbytes):
        self.launch("memory", "fill_zeros", ceil_div(nbytes, 16 * THREADS), target, nbytes)

    def copy(self, source, nbytes, target):
        if nbytes:
            self.launch("memory", "copy_bytes", ceil_div(nbytes, FOUR), source, nbytes, target)

    def keep_residual(self, x, n, sent):
        """The new residual, for an encoder that could not keep it: by what it decodes to."""
        residual, fresh, poisoned = self.feedback
        self.launch("memory", "feedback_residual", ceil_div(n, FOUR), x, residual, sent, n, poisoned, fresh)

    def encode_buckets(self, module, name, x, n, bucket, payload, *extra, stages=1, codes=True):
        """One launch if buckets lie within a tile; else partial results, their merging and the codes apart.

        Returns the buckets' scales, where they are kept: if `codes` are another kernel's, or buckets large.
        """
        buckets = ceil_div(n, bucket)
        scales = self.launcher.empty(0 if codes and bucket <= TILE else SCALE_BYTES * buckets)
        if bucket <= TILE:
            blocks = ceil_div(n, TILE // bucket * bucket)
            places = 0, scales.data_ptr(), payload
            self.launch(module, f"{name}_encode", blocks, x, *self.feedback, n, bucket, STEP_ALL, 0, *places, *extra)
            return scales
        blocks = buckets * ceil_div(bucket, TILE)
        partials = self.launcher.empty(PARTIAL_BYTES * blocks)

        def launch(kernel, count, step, stage):
            places = partials.data_ptr(), scales.data_ptr(), payload
            self.launch(module, kernel, count, x, *self.feedback, n, bucket, step, stage, *places, *extra)

        for stage in range(stages):
            launch(f"{name}_encode", blocks, STEP_REDUCE, stage)
            launch(f"{name}_finish", buckets, STEP_REDUCE, stage)
        if codes:
            launch(f"{name}_encode", blocks, STEP_CODE, 0)
        return scales

    def select(self, x, n, k, signed, feedback):
        """The k largest of n; `feedback`: (residual, fresh, poisoned), of which fresh gets all entries as not sent."""
        residual, _, _ = feedback
        tiles, empty = ceil_div(n, TILE), self.launcher.empty
        histogram, selection = self.launcher.zeros(HISTOGRAM_BYTES), self.launcher.zeros(SELECTION_BYTES)
        survivors, counts = empty(2 * TILE * tiles), empty(4 * tiles)
        above, equal = empty(4 * tiles), empty(4 * tiles)
        places = selection.data_ptr(), survivors.data_ptr(), counts.data_ptr()

        def launch(kernel, blocks, *arguments):
            self.launch("select", kernel, blocks, *arguments)

        def digit(bits, count):
            launch("select_digit", 1, histogram.data_ptr(), bits, count, selection.data_ptr())

        blocks = min(tiles, MOST_HISTOGRAM_BLOCKS)
        launch("select_histogram", blocks, x, residual, n, signed, tiles, histogram.data_ptr())
        digit(DIGIT_BITS[0], k)
        launch("select_survivors", tiles, x, *feedback, n, signed, *places, histogram.data_ptr())
        digit(DIGIT_BITS[1], 0)
        launch("select_refine", tiles, x, residual, n, signed, *places, histogram.data_ptr())
        digit(DIGIT_BITS[2], 0)
        launch("select_count", tiles, x, residual, n, signed, *places, above.data_ptr(), equal.data_ptr())
        launch("select_scan", 1, above.data_ptr(), equal.data_ptr(), tiles, selection.data_ptr())
        return Selected(tiles, selection, survivors, counts, above, equal)

    def counted(self, module, kernel, tiles, *arguments):
        """What a kernel counts in each tile, summed over the tiles before; and where their total is."""
        before, selection = self.launcher.empty(4 * tiles), self.launcher.zeros(SELECTION_BYTES)
        self.launch(module, kernel, tiles, *arguments, before.data_ptr())
        self.launch("select", "select_scan", 1, before.data_ptr(), 0, tiles, selection.data_ptr())
        return before, selection

    def poison(self, wrong, n, out):
        """Make all of `out` NaN if a memo says so."""
        self.launch("memory", "poison", ceil_div(n, FOUR), wrong.data_ptr(), n, out)
