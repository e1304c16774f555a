"""The same functions as reference.py by the kernels of the GPU (csrc/cuda/polar*.cu).

The plan stays with the host, which therefore waits for small numbers: sums of rows and columns, energies of
classes, products of codewords, how many outliers there are. Entries, samples and words stay on the device.
"""

import numpy as np
import torch

from ...backends.gpu.plans import THREADS, TILE, ceil_div, device_kernel
from . import outliers, turning
from .layout import CLASSES, CODES, NO_CODE, column_order
from .native import NativePolar
from .samples import value_tables
from .spending import class_starts, groups_of, level_shares
from .tables import ERASED, MAX_LEVELS, design_at, rank

LANE_GROUP = 8
SUBTREE = 256
SECTION, PLACES = 64, 1024  # rows and columns that a block gathers
ENOUGH_BLOCKS = 256  # about two for each processor of a large GPU
DECODE_SHARED = 64 << 10  # bytes of a tile's decoded bits that may lie in shared memory
TURN_SHARED = 4 * (turning.BLOCK + turning.BLOCK // 32)


def backend_of(kernels):
    """The backend for coding.py behind a table of kernels."""
    return DevicePolar(kernels) if kernels.on_device else NativePolar(kernels)


class DevicePolar:
    """The Backend of a device.

    Args:
        kernels: a DeviceKernels.
    """

    def __init__(self, kernels):
        self._launcher = kernels.launcher
        self._places_beyond = kernels.polar_beyond

    def _launch(self, module, kernel, blocks, *arguments, shared=0):
        self._launcher.launch(module, kernel, blocks, *arguments, shared=shared)

    def _upload(self, array):
        return self._launcher.upload(array)

    def _empty(self, count, dtype):
        return self._launcher.empty(count * dtype.itemsize).view(dtype)

    def sums(self, values, columns, by_column):
        rows = ceil_div(values.numel(), columns)
        found = self._empty(rows + (columns if by_column else 0), torch.float32)
        of_rows, of_columns = found.data_ptr(), found[rows:].data_ptr()
        x, n = values.data_ptr(), values.numel()
        self._launch("polar_scan", "polar_row_sums", ceil_div(4 * rows, THREADS), x, n, columns, of_rows)
        if by_column:
            blocks = ceil_div(columns, THREADS)
            self._launch("polar_scan", "polar_column_sums", blocks, x, rows, columns, of_columns)
        found = found.cpu().numpy()  # waits
        return found[:rows], found[rows:] if by_column else None

    def beyond(self, values, layout, limits, expected):
        rows, columns = outliers.factors(layout)
        of_rows, of_columns = self._upload(rows), self._upload(columns)
        factors = of_rows.data_ptr(), len(rows) > 1, of_columns.data_ptr(), len(columns) > 1
        numbers = limits.floor, limits.slope, limits.intercept
        places = values.data_ptr(), values.numel(), layout.columns, *factors, *map(float, numbers)
        return self._places_beyond(values.numel(), *places)

    def energies(self, values, layout, scales):
        codes = [None if of is None else self._upload(of) for of in (layout.row_codes, layout.column_codes)]
        factors, totals = self._upload(scales), self._launcher.zeros(8 * CLASSES).view(torch.int64)
        matrix = values.data_ptr(), values.numel(), layout.columns
        places = *matrix, *map(_address, codes), factors.data_ptr(), totals.data_ptr()
        self._launch("polar_scan", "polar_energies", _sections(layout), *places)
        return totals.cpu().numpy()  # waits

    def gather(self, values, spending, scales):
        starts, size = class_starts(spending)
        samples = self._empty(size, torch.int8)
        plain = next((s for s, c in zip(starts, spending.classes, strict=True) if c.levels == 1), size)
        samples[:plain], samples[plain:] = ERASED, 0  # what remains so is padding
        layout, shared, _keep = self._layout(spending, scales)
        places = values.data_ptr(), layout.data_ptr(), samples.data_ptr()
        self._launch("polar_scan", "polar_gather", _sections(spending.layout), *places, shared=shared)
        return samples

    def scatter(self, values, spending, out, add):
        layout, shared, _keep = self._layout(spending, None)
        places = values.data_ptr(), layout.data_ptr(), add, out.data_ptr()
        self._launch("polar_scan", "polar_scatter", _sections(spending.layout), *places, shared=shared)

    def _layout(self, spending, scales):
        """(PolarLayout of csrc/cuda/polar_scan.cu on the device, bytes of shared memory, what it points to)."""
        layout, order = spending.layout, column_order(spending.layout)
        codes = np.full(layout.columns, NO_CODE, np.uint8) if order is None else layout.column_codes[order]
        ends = np.append(np.flatnonzero(np.diff(codes)) + 1, layout.columns)
        classes = np.array([c.of_class for c in spending.classes], np.uint8)
        arrays = (
            layout.row_codes,
            None if order is None else order.astype(np.int32),
            ends.astype(np.int32),
            codes[ends - 1],
            classes,
            _section_starts(spending, classes, codes[ends - 1], np.diff(ends, prepend=0)),
            scales,
        )
        keep = [None if array is None else self._upload(array) for array in arrays]
        row_codes, order, ends_of, codes_of, *rest = map(_address, keep)
        fields = layout.numel, layout.columns, row_codes, order, len(ends), ends_of, codes_of, len(classes), *rest
        return self._upload(np.array(fields, np.int64)), 8 * SECTION * len(ends), keep

    def encode(self, values, spending, scales, list_size):
        if spending.layout.row_codes is not None or spending.layout.column_codes is not None:
            return self.encode_samples(self.gather(values, spending, scales), spending, list_size)
        return self._encode((values.data_ptr(), values.numel(), float(scales[0]), 0), spending, list_size)

    def encode_samples(self, samples, spending, list_size):
        return self._encode((0, 0, 0.0, samples.data_ptr()), spending, list_size)

    def _encode(self, source, spending, list_size):
        # Tiles of samples as they are come first, and gain nothing from a list.
        single = sum(list_size == 1 or tile.levels == MAX_LEVELS for tile in spending.tiles)
        tiles, ranks, room = self._tiles(spending, lambda tile: _encoder_bytes(tile, list_size > 1))
        classes = self._classes(spending)
        workspace = self._launcher.empty(room)
        words = self._launcher.empty(sum(tile.nbytes for tile in spending.tiles))
        products = self._launcher.zeros(16 * len(spending.classes)).view(torch.int64)
        places = classes.data_ptr(), ranks.data_ptr(), workspace.data_ptr(), words.data_ptr(), products.data_ptr()
        shared, lists = max(tile.rows for tile in spending.tiles), len(spending.tiles) - single
        if single:
            parts = _parts(single)
            arguments = *source, tiles.data_ptr(), *places, parts
            self._launch("polar_code", "polar_encode", single * parts, *arguments, shared=shared)
        if lists:
            parts = _parts(lists)
            arguments = *source, tiles[single:].data_ptr(), *places, parts, list_size
            self._launch("polar_list", "polar_encode_list", lists * parts, *arguments, shared=shared)
        return words, products.view(-1, 2).cpu().numpy()  # waits

    def decode(self, words, spending, out, add):
        most = max(tile.levels * tile.rows for tile in spending.tiles)
        tiles, ranks, room = self._tiles(spending, lambda tile: tile.levels * tile.rows * tile.lanes // LANE_GROUP)
        stride = 1 << max(tile.levels for tile in spending.tiles)
        values = self._upload(np.ascontiguousarray(value_tables(spending)[:, :stride]))
        classes = self._classes(spending)
        shared = most if most <= DECODE_SHARED else 0
        workspace = self._launcher.empty(0 if shared else room)
        places = words.data_ptr(), tiles.data_ptr(), classes.data_ptr(), ranks.data_ptr(), values.data_ptr(), stride
        room = 0 if shared else workspace.data_ptr()
        blocks = LANE_GROUP * len(spending.tiles)
        self._launch(
            "polar_code", "polar_decode", blocks, *places, room, out.numel(), add, out.data_ptr(), shared=shared
        )

    def _tiles(self, spending, workspace_bytes):
        """(DeviceTile of csrc/cuda/polar.cuh for every tile, the ranks they point into, bytes of workspace)."""
        groups = groups_of(spending.classes)
        fields, kinds, ranks, at = [], {}, [], [0, 0, 0]  # at: among entries, words, bytes of workspace
        for tile, shares in zip(spending.tiles, level_shares(spending), strict=True):
            kind, slot = (tile.rows, tile.real), groups[tile.group][0]
            if kind not in kinds:  # mostly all tiles but the last are alike
                kinds[kind] = sum(map(len, ranks))
                ranks.append(rank(*kind))
            start, words, room = at
            free = [*shares, *[0] * (MAX_LEVELS - tile.levels)]
            fixed = tile.rows, tile.lanes, tile.levels, tile.real, start, slot, words, kinds[kind], room
            fields.append([*fixed, self._tables(spending.classes[slot]), *free])
            at = [start + tile.rows * tile.lanes, words + tile.nbytes, room + workspace_bytes(tile)]
        return self._upload(np.array(fields, np.int64)), self._upload(np.concatenate(ranks)), at[2]

    def _tables(self, coded):
        if not 1 < coded.levels < MAX_LEVELS:
            return 0
        return self._launcher.constant(("tables", coded.design), lambda: design_at(coded.design).tables).data_ptr()

    def _classes(self, spending):
        """PolarClass of csrc/cuda/polar.cuh for every coded class."""
        starts, _ = class_starts(spending)
        lanes = {tile.group: tile.lanes for tile in spending.tiles}
        of_group = [number for number, group in enumerate(groups_of(spending.classes)) for _ in group]
        fields = []
        for start, coded, group in zip(starts, spending.classes, of_group, strict=True):
            design = coded.design
            points = self._launcher.constant(("points", design), lambda design=design: design_at(design).points)
            fields.append((start + ceil_div(coded.count, lanes[group]) * lanes[group], points.data_ptr()))
        return self._upload(np.array(fields, np.int64))

    def turn(self, values, seed):
        blocks = ceil_div(values.numel(), turning.BLOCK)
        turned, lengths = torch.empty_like(values), self._empty(blocks, torch.float64)
        places = values.data_ptr(), values.numel(), seed, turned.data_ptr(), lengths.data_ptr()
        self._launch("polar_turn", "polar_turn", blocks, *places, shared=TURN_SHARED)
        return turned, lengths

    def turn_scales(self, turned, decoded, lengths):
        scales = self._empty(len(lengths), torch.float32)
        places = turned.data_ptr(), decoded.data_ptr(), turned.numel(), lengths.data_ptr(), scales.data_ptr()
        self._launch("polar_turn", "polar_turn_scales", len(lengths), *places)
        return scales

    def turn_back(self, decoded, seed, of_blocks, out, add):
        places = decoded.data_ptr(), decoded.numel(), seed, of_blocks.data_ptr(), add, out.data_ptr()
        self._launch("polar_turn", "polar_turn_back", len(of_blocks), *places, shared=TURN_SHARED)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _parts(tiles):
    """Blocks that share the lanes of a tile, so that a few tiles do not leave most of a device idle."""
    return next((parts for parts in (1, 2, 4) if tiles * parts >= ENOUGH_BLOCKS), LANE_GROUP)


def _sections(layout):
    """Blocks that together go over a matrix."""
    return ceil_div(layout.rows, SECTION) * ceil_div(layout.columns, PLACES)


def _encoder_bytes(tile, lists):
    """Workspace of a tile: see `polar_warp` in csrc/cuda/polar.cuh."""
    code = 256 * ceil_div(tile.rows, SUBTREE)
    group = 16 * tile.rows + (16 * tile.rows if tile.levels > 1 else 0) + code
    return tile.lanes // LANE_GROUP * (group + (8 * tile.rows + code if lists else 0))


def _section_starts(spending, classes, run_codes, run_lengths):
    """Where every coded class's entries begin that lie in a section of rows or below: int64 [sections, classes]."""
    layout = spending.layout
    sections, starts = ceil_div(layout.rows, SECTION), np.array(class_starts(spending)[0], np.int64)
    codes = np.full(layout.rows, NO_CODE, np.int64) if layout.row_codes is None else layout.row_codes
    places = np.arange(layout.rows) // SECTION * (CODES + 1) + codes
    rows = np.bincount(places, minlength=sections * (CODES + 1)).reshape(sections, -1)
    rows[:, 0] = 0
    lengths = np.zeros(CODES + 1, np.int64)
    lengths[run_codes] = run_lengths
    lengths[0] = 0
    of_class = classes.astype(np.int64)[None, :] - np.arange(CODES + 1)[:, None]  # the column's code for a row's
    there = (of_class > 0) & (of_class <= CODES)
    entries = rows @ np.where(there, lengths[np.clip(of_class, 0, CODES)], 0)
    return starts + np.cumsum(entries, 0) - entries


# What the GPU launches.


@device_kernel
def polar_beyond(gpu, n, *where):
    """The places of entries that reach their limits, int64, rising; `where`: as polar_count_beyond takes them.

    Waits for the device, once: nobody knew how many there are.
    """
    tiles = ceil_div(n, TILE)
    before, selection = gpu.counted("polar_scan", "polar_count_beyond", tiles, *where)
    places = gpu.launcher.empty(8 * (gpu.launcher.read(selection)[4] & 0xFFFFFFFF)).view(torch.int64)
    if len(places):
        gpu.launch("polar_scan", "polar_beyond", tiles, *where, before.data_ptr(), places.data_ptr())
    return places
