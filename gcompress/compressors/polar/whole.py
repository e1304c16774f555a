"""Whole payloads by one C++ kernel each (csrc/polar/plan/): the same bytes as coding.py makes on reference.py."""

import numpy as np
import torch

from ...backends.calls import made_once, workspace
from . import coding, reference
from .tables import LARGEST_BLOCK, MAX_LEVELS, SMALLEST_BLOCK, design_at, design_count, positions, power_of_two, rank

KERNELS = ("polar_compress", "polar_decompress")
ENCODER_ROOM, DECODER_ROOM = 12 << 20, 4 << 20  # bytes besides those for entries
THREAD_ENCODER_ROOM, THREAD_DECODER_ROOM = 10 << 20, 1 << 20  # for another thread
THREAD_ENTRIES = 1 << 18  # at least, for each of them (csrc/cpu/threads.h)
LARGEST_ROOM, LARGEST_OF_ENTRIES = 64 << 20, 1 << 12  # far more than the kernels ever need


@made_once
def _tables():
    """(address of PlanTables of csrc/polar/plan/tables.h, what it points to)."""
    designs, keep, sizes = [], [], []
    for design in map(design_at, range(design_count())):
        keep += design.tables, design.points
        tables = design.tables.ctypes.data if design.rate else 0
        carried = [*design.information, *[0] * (MAX_LEVELS - design.levels)]
        largest = int(design.points.max())
        designs.append([design.levels, design.rate, *carried, tables, design.points.ctypes.data, largest])
    block = SMALLEST_BLOCK
    while block <= LARGEST_BLOCK:
        sizes.append((rank(block, block), np.argsort(rank(block, block)).astype(np.uint16), positions(block)))
        block *= 2
    described, roots = np.array(designs, np.int64), np.array([power_of_two(k) for k in range(64)])
    addresses = [of[k].ctypes.data for k in range(3) for of in sizes]
    whole = np.array([described.ctypes.data, len(designs), roots.ctypes.data, *addresses], np.int64)
    return whole.ctypes.data, (whole, described, roots, sizes, keep)


def _more_threads(kernels, numel):
    """How many threads there may be beside the first."""
    return max(0, min(kernels.threads, numel // THREAD_ENTRIES) - 1)


def _room(kernels, numel, nbytes, encodes=True):
    """Bytes of a workspace in which almost every tensor is encoded, and decoded for its memory; or only decoded."""
    threads, decoding = _more_threads(kernels, numel), DECODER_ROOM + 40 * numel + 4 * nbytes
    if not encodes:
        return decoding + threads * THREAD_DECODER_ROOM
    return max(ENCODER_ROOM + 16 * numel + 4 * nbytes, decoding) + threads * THREAD_ENCODER_ROOM


def compress(kernels, polar, values, payload, seed):
    """Encode a contiguous float32 tensor of any shape to all bytes of `payload`, by the options of a Polar."""
    numel, shape = values.numel(), values.shape
    first = shape[0] if polar.scales == "rowcol" and len(shape) > 1 else 0
    options = (
        *(first, 2 if polar.scales == "tensor" else 0, polar.allocation == "flat"),
        *(-1.0 if polar.outliers == "auto" else polar.outliers, polar.list_size),
        *(-1 if polar.rank == "auto" else polar.rank, polar.block, polar.unbiased, seed),
    )
    source, nbytes, memory = values.data_ptr(), payload.numel(), kernels.memory
    room, largest = _room(kernels, numel, nbytes), LARGEST_ROOM + LARGEST_OF_ENTRIES * (numel + nbytes)
    while True:
        scratch = workspace(room // 4)
        place = *scratch, payload.data_ptr(), nbytes
        if not kernels.polar_compress(_tables()[0], source, numel, *options, *place):
            return
        room = 8 * scratch[1]
        if room > largest:
            raise MemoryError(f"{polar}: a workspace of {room // 2} bytes is too small for {numel} entries")
        if memory is not None:  # the residual is added already
            source, memory.residual = memory.fresh, None


def decompress(kernels, payload, out, add, block):
    """Decode a payload into, or add it to, a float32 vector; PayloadError if the bytes contradict themselves.

    With kernels that add other payloads: whether one of them is bad, or needs more room than payloads of its size do.
    """
    numel, nbytes = out.numel(), payload.numel()
    scratch = workspace(_room(kernels, numel, nbytes, encodes=False) // 4)
    place = payload.data_ptr(), nbytes, numel, block, add, *scratch, out.data_ptr()
    failed = kernels.polar_decompress(_tables()[0], *place)
    if not failed or kernels.adds:
        return failed
    # The reference says what is wrong; it decodes the few payloads that are not, but want more room.
    values = torch.empty_like(out)
    coding.decode_into(reference, payload, values, False, block)
    out.add_(values) if add else out.copy_(values)
    return 0
