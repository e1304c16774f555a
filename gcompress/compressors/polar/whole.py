"""Whole payloads by one C++ kernel each (csrc/polar/plan/): the same bytes as coding.py makes on reference.py."""

import functools
import threading

import numpy as np
import torch

from . import coding, reference
from .tables import LARGEST_BLOCK, MAX_LEVELS, SMALLEST_BLOCK, design_at, design_count, positions, power_of_two, rank

KERNELS = ("polar_compress", "polar_decompress")
ENCODER_ROOM, DECODER_ROOM = 12 << 20, 4 << 20  # bytes besides those for entries
THREAD_ENCODER_ROOM, THREAD_DECODER_ROOM = 10 << 20, 1 << 20  # for another thread
THREAD_ENTRIES = 1 << 18  # at least, for each of them (csrc/cpu/threads.h)
LARGEST_ROOM = 1 << 12  # bytes for an entry: with more of them the kernels would do, too
_local = threading.local()


@functools.cache
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


def _workspace(least):
    """(address, bytes) of this thread's workspace, kept because fresh memory costs more than what is done in it."""
    memory = getattr(_local, "memory", None)
    if memory is None or memory.numel() < least:
        _local.memory = memory = None  # gone before there is more
        _local.memory = memory = torch.empty(least, dtype=torch.uint8)
    return memory.data_ptr(), memory.numel()


def _more_threads(kernels, numel):
    """How many threads there may be beside the first."""
    return max(0, min(kernels.threads, numel // THREAD_ENTRIES) - 1)


def compress(kernels, polar, values, payload, seed):
    """Encode a contiguous float32 tensor of any shape to all bytes of `payload`, by the options of a Polar."""
    numel, shape = values.numel(), values.shape
    first = shape[0] if polar.scales == "rowcol" and len(shape) > 1 else 0
    options = (
        *(first, 2 if polar.scales == "tensor" else 0, polar.allocation == "flat"),
        *(-1.0 if polar.outliers == "auto" else polar.outliers, polar.list_size),
        *(-1 if polar.rank == "auto" else polar.rank, polar.block, polar.unbiased, seed),
    )
    tables, nbytes = _tables(), payload.numel()  # held here: of two threads' first tables the cache keeps one
    room, largest = ENCODER_ROOM + 16 * numel + 4 * nbytes, ENCODER_ROOM + LARGEST_ROOM * (numel + nbytes)
    room += _more_threads(kernels, numel) * THREAD_ENCODER_ROOM
    while room <= largest:
        workspace = _workspace(room)
        place = values.data_ptr(), numel, *options, *workspace, payload.data_ptr(), nbytes
        if not kernels.polar_compress(tables[0], *place):
            return
        room = 2 * workspace[1]
    polar._encode(reference, values, payload, seed)


def decompress(kernels, payload, out, add, block):
    """Decode a payload into, or add it to, a float32 vector; PayloadError if the bytes contradict themselves."""
    tables = _tables()  # held here, as in `compress`
    threads = _more_threads(kernels, out.numel()) * THREAD_DECODER_ROOM
    workspace = _workspace(DECODER_ROOM + threads + 40 * out.numel() + 4 * payload.numel())
    place = payload.data_ptr(), payload.numel(), out.numel(), block, add, *workspace, out.data_ptr()
    if kernels.polar_decompress(tables[0], *place):
        # The reference says what is wrong; it decodes the few payloads that are not, but want more room.
        values = torch.empty_like(out)
        coding.decode_into(reference, payload, values, False, block)
        out.add_(values) if add else out.copy_(values)
