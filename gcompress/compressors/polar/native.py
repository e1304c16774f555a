"""The same functions as reference.py by the C++ kernels (csrc/polar/), for bits.py, which plans by itself, and tests.

Tensors of `Polar` take a single kernel instead: whole.py.
"""

import ctypes
import threading

import numpy as np
import torch

from . import outliers, turning
from .layout import CLASSES, NO_CODE, column_order
from .samples import value_tables
from .spending import class_starts, level_shares, row_classes, slot_of_class
from .tables import ERASED, LANES, LARGEST_BLOCK, MAX_LEVELS, design_at, positions, rank

WORKSPACE = (8 * LANES + 25) * LARGEST_BLOCK  # bytes; decoding needs 8 MAX_LEVELS LARGEST_BLOCK
_local = threading.local()

KERNELS = (
    "polar_beyond",
    "polar_decode",
    "polar_encode",
    "polar_encode_vector",
    "polar_energies",
    "polar_gather",
    "polar_scatter",
    "polar_sums",
    "polar_turn",
    "polar_turn_back",
    "polar_turn_scales",
)


class _Layout(ctypes.Structure):
    """PolarLayout of csrc/polar/scan.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("numel", "columns", "row_class", "order", "runs", "run_end", "run_class", "slot", "scale")
    ]


class NativePolar:
    """The Backend of the C++ kernels; kernels: a CpuKernels with those of polar."""

    def __init__(self, kernels):
        self._kernels = kernels

    def sums(self, values, columns, by_column):
        row_sums = np.empty(-(-values.numel() // columns), np.float32)
        column_sums = np.empty(columns, np.float32) if by_column else None
        self._kernels.polar_sums(values.data_ptr(), values.numel(), columns, _address(row_sums), _address(column_sums))
        return row_sums, column_sums

    def beyond(self, values, layout, limits, expected):
        rows, columns = outliers.factors(layout)
        capacity = 2 * expected + 1024
        while True:
            places = torch.empty(capacity, dtype=torch.int64)
            count = self._kernels.polar_beyond(
                values.data_ptr(), values.numel(), layout.columns, _address(rows), len(rows) > 1, _address(columns),
                len(columns) > 1, limits.floor, limits.slope, limits.intercept, capacity, places.data_ptr(),
            )  # fmt: skip
            if count <= capacity:
                return places[:count]
            capacity = count

    def energies(self, values, layout, scales):
        totals = np.zeros(CLASSES, np.int64)
        described, _keep, row = _layout(layout, np.arange(CLASSES, dtype=np.int8), scales)
        self._kernels.polar_energies(values.data_ptr(), ctypes.addressof(described), _address(row), _address(totals))
        return totals

    def gather(self, values, spending, scales):
        starts, size = class_starts(spending)
        samples = torch.empty(size, dtype=torch.int8)
        for c, start, end in zip(spending.classes, starts, [*starts[1:], size], strict=True):
            samples[start + c.count : end] = ERASED if c.levels > 1 else 0
        described, _keep, row = _layout(spending.layout, slot_of_class(spending), scales)
        cursors = np.array(starts, np.int64)
        self._kernels.polar_gather(
            values.data_ptr(), ctypes.addressof(described), _address(cursors), _address(row), samples.data_ptr()
        )
        return samples

    def scatter(self, values, spending, out, add):
        described, _keep, row = _layout(spending.layout, slot_of_class(spending), None)
        cursors = np.array(class_starts(spending)[0], np.int64)
        self._kernels.polar_scatter(
            values.data_ptr(), ctypes.addressof(described), _address(cursors), _address(row), add, out.data_ptr()
        )

    def encode(self, values, spending, scales, list_size):
        if spending.layout.row_codes is not None or spending.layout.column_codes is not None:
            return self.encode_samples(self.gather(values, spending, scales), spending, list_size)
        # Entries of one class, in order: they become samples tile by tile, in the caches.
        start = values.data_ptr(), values.numel(), float(scales[0])
        return self._encode(self._kernels.polar_encode_vector, start, spending, list_size)

    def encode_samples(self, samples, spending, list_size):
        return self._encode(self._kernels.polar_encode, (samples.data_ptr(),), spending, list_size)

    def _encode(self, kernel, start, spending, list_size):
        (tiles, _keep), slots = _tiles(spending), row_classes(spending)
        designs = [design_at(c.design) for c in spending.classes]
        pointers = np.array([[d.tables.ctypes.data if d.rate else 0, d.points.ctypes.data] for d in designs], np.int64)
        words = torch.empty(sum(tile.nbytes for tile in spending.tiles) + 8, dtype=torch.uint8)
        products = np.zeros((len(designs), 2), np.int64)
        kernel(
            *start, len(tiles), _address(tiles), _address(slots), _address(pointers), list_size, _workspace(),
            words.data_ptr(), _address(products),
        )  # fmt: skip
        return words[:-8], products

    def decode(self, words, spending, out, add):
        (tiles, _keep), slots, values = (
            _tiles(spending),
            row_classes(spending),
            value_tables(spending),
        )
        self._kernels.polar_decode(
            words.data_ptr(), len(tiles), _address(tiles), _address(slots), _address(values), out.numel(), add,
            _workspace(), out.data_ptr(),
        )  # fmt: skip

    def turn(self, values, seed):
        blocks = -(-values.numel() // turning.BLOCK)
        turned, lengths = _with_zeros(values.numel()), torch.empty(blocks, dtype=torch.float64)
        self._kernels.polar_turn(values.data_ptr(), values.numel(), seed, turned.data_ptr(), lengths.data_ptr())
        return turned, lengths

    def turn_scales(self, turned, decoded, lengths):
        scales, padded = torch.empty(len(lengths), dtype=torch.float32), _with_zeros(decoded.numel())
        padded.copy_(decoded)
        self._kernels.polar_turn_scales(
            turned.data_ptr(), padded.data_ptr(), turned.numel(), lengths.data_ptr(), scales.data_ptr()
        )
        return scales

    def turn_back(self, decoded, seed, of_blocks, out, add):
        self._kernels.polar_turn_back(
            decoded.data_ptr(), decoded.numel(), seed, of_blocks.data_ptr(), add, out.data_ptr()
        )


def _with_zeros(numel):
    """A float32 vector behind which 16 zeros lie."""
    memory = torch.empty(numel + 16, dtype=torch.float32)
    memory[numel:] = 0
    return memory[:numel]


def _workspace():
    """The address of this thread's workspace, kept because fresh memory costs more than what is done in it."""
    if not hasattr(_local, "workspace"):
        _local.workspace = torch.empty(WORKSPACE, dtype=torch.uint8)
    return _local.workspace.data_ptr()


def _address(array):
    return None if array is None else array.ctypes.data


def _layout(layout, slots, scales):
    """(PolarLayout, what it points to, room for a row)."""
    order = column_order(layout)
    if order is None:
        ends, classes = np.array([layout.columns], np.int32), np.array([NO_CODE], np.uint8)
    else:
        codes = layout.column_codes[order]
        ends = np.append(np.flatnonzero(np.diff(codes)) + 1, layout.columns).astype(np.int32)
        classes, order = codes[ends - 1], order.astype(np.int32)
    keep = (layout.row_codes, order, ends, classes, slots, scales)
    addresses = [_address(array) or 0 for array in keep]
    described = _Layout(layout.numel, layout.columns, *addresses[:2], len(ends), *addresses[2:])
    coded = layout.row_codes is not None or order is not None
    return described, keep, np.empty(layout.columns if coded else 0, np.float32)


def _tiles(spending):
    """(int64 [tiles, fields of PolarTile], what it points to)."""
    rows, keep, known = [], [], {}
    for tile, shares in zip(spending.tiles, level_shares(spending), strict=True):
        kind = tile.rows, tile.real, tile.lanes, shares
        if kind not in known:  # mostly all tiles but the last are alike
            tables = rank(*kind[:2]), positions(tile.rows)
            keep += tables
            fields = tile.rows, tile.lanes, tile.levels, *map(_address, tables), *shares
            known[kind] = fields + (0,) * (5 + MAX_LEVELS - len(fields))
        rows.append(known[kind])
    return np.array(rows, np.int64), keep
