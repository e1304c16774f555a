"""How the entries of a tensor fall into classes: codes of rows and columns, and which of them are sent.

An entry's variance is modelled as the product of its row's and its column's, each sent as a code of a quarter octave
of amplitude. Entries of about the same variance are coded together: they are a class.
"""

import math
from typing import NamedTuple

import numpy as np

from .tables import octave_codes, power_of_two

LARGEST = float(np.finfo(np.float32).max)
CODES = 63  # of a row or column; 0: below everything that is coded
CLASSES = 2 * CODES + 1
NO_CODE = 1  # stands for a factor that is not sent
NEARLY_ALL = 4063  # of 4096
STRETCH = 8192  # of a long array: what numpy makes on the way stays in the caches


class Layout(NamedTuple):
    """A matrix of `numel` entries in rows of `columns`, and the class of every entry."""

    numel: int
    columns: int
    row_codes: np.ndarray | None  # [rows] uint8, or None
    column_codes: np.ndarray | None  # [columns] uint8, or None

    @property
    def rows(self):
        return -(-self.numel // self.columns)

    def row_histogram(self):
        """Entries per row code, if every column counted: int64 [64]."""
        if self.row_codes is None:
            histogram = np.zeros(CODES + 1, np.int64)
            histogram[NO_CODE] = self.numel
            return histogram
        histogram = np.bincount(self.row_codes, minlength=CODES + 1) * self.columns
        histogram[self.row_codes[-1]] -= self.rows * self.columns - self.numel
        return histogram

    def histogram(self):
        """Entries per class, those with a code 0 left out: int64 [CLASSES]."""
        rows = self.row_histogram()
        rows[0] = 0
        if self.column_codes is None:
            return np.concatenate(
                [np.zeros(NO_CODE, np.int64), rows, np.zeros(CLASSES - NO_CODE - CODES - 1, np.int64)]
            )
        columns = np.bincount(self.column_codes, minlength=CODES + 1)
        columns[0] = 0
        return np.convolve(rows // self.columns, columns)  # with column codes all rows are full


def _scale_codes(means):
    """Codes of a quarter octave, the largest at CODES; 0 for those far below it and for means of 0."""
    offset = int(octave_codes(np.maximum(means.max(keepdims=True), 1e-300), 4)[0]) - CODES
    codes = np.empty(len(means), np.uint8)
    for first in range(0, len(means), STRETCH):
        part = means[first : first + STRETCH]
        logarithms = octave_codes(np.maximum(part, 1e-300), 4)
        logarithms -= offset
        codes[first : first + STRETCH] = np.maximum(logarithms, 0, out=logarithms)
    codes[means <= 0] = 0
    return codes


def candidate_layouts(numel, columns, row_sums, column_sums):
    """Layouts from the plainest to the finest; sums are of |x| over rows and columns, as float32."""
    yield Layout(numel, numel, None, None)
    if row_sums is None:
        return
    counts = np.full(len(row_sums), columns, np.float64)
    counts[-1] = numel - columns * (len(row_sums) - 1)
    row_codes = _scale_codes(row_sums.astype(np.float64) / counts)
    yield Layout(numel, columns, row_codes, None)
    if column_sums is not None:
        column_codes = _scale_codes(column_sums.astype(np.float64))
        yield Layout(numel, columns, None, column_codes)
        yield Layout(numel, columns, row_codes, column_codes)


def mean_power(codes):
    """The mean variance of rows or columns, relative to that which NO_CODE stands for."""
    if codes is None:
        return 1.0
    counts = np.bincount(codes).tolist()
    return math.fsum(count * power_of_two(32 * (k - NO_CODE)) for k, count in enumerate(counts) if k) / len(codes)


def column_order(layout):
    """Columns in falling order of their codes, equal ones from left to right; None without column codes."""
    return None if layout.column_codes is None else np.argsort(-layout.column_codes.astype(np.int64), kind="stable")


def side_bytes(layout):
    """Bytes of the packed scale codes."""
    return sum(
        -(-len(codes) * code_form(codes)[0] // 8)
        for codes in (layout.row_codes, layout.column_codes)
        if codes is not None
    )


def code_form(codes):
    """(bits of a packed code, the smallest code that is not 0); 0 is packed as 0."""
    used = codes[codes > 0]
    if len(used) == 0:
        return 0, 0
    low = int(used.min())
    return (int(used.max()) - low + 1).bit_length(), low


def without_idle_codes(layout, floor):
    """The layout with codes 0 where a row or column lies below the class `floor` throughout."""
    row_codes, column_codes = layout.row_codes, layout.column_codes
    if row_codes is not None:
        best = NO_CODE if column_codes is None else int(column_codes.max())
        row_codes = np.where(row_codes + np.int64(best) >= floor, row_codes, 0).astype(np.uint8)
    if column_codes is not None:
        best = NO_CODE if row_codes is None else int(row_codes.max())
        column_codes = np.where(column_codes + np.int64(best) >= floor, column_codes, 0).astype(np.uint8)
    return layout._replace(row_codes=row_codes, column_codes=column_codes)
