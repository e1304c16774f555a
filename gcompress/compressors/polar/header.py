"""The header of a payload: writing it, and reading it from bytes that may be anything."""

import math
from typing import NamedTuple

import numpy as np
import torch

from ... import packing
from ...errors import PayloadError
from . import outliers, turning
from .layout import (
    CLASSES,
    CODES,
    Layout,
    code_form,
)
from .outliers import Outliers
from .payload import APART, CLASS, COLUMNS, HEADER, NOT_FINITE, ROWS, TILE, TURNED
from .spending import CodedClass, Spending, make_tiles
from .tables import MAX_LEVELS, design_count

USUAL_HEADER = 16384  # bytes


def pack_header(spending, flags, section):
    """Everything before the words; `section` is what the flags APART or TURNED announce."""
    layout, forms, codes = spending.layout, [], b""
    for flag, of in ((ROWS, layout.row_codes), (COLUMNS, layout.column_codes)):
        width, low = (0, 0) if of is None else code_form(of)
        forms += [width, low]
        if of is not None:
            flags |= flag
            packed = np.where(of > 0, of - np.int64(low) + 1, 0).astype(np.uint8)
            codes += packing.pack_bits(torch.from_numpy(packed), width).numpy().tobytes() if width else b""
    coded_columns = layout.columns if flags & (ROWS | COLUMNS) else 0
    head = HEADER.pack(flags, len(spending.classes), spending.base, coded_columns, *forms)
    classes = b"".join(CLASS.pack(c.of_class, c.design, c.amplitude) for c in spending.classes)
    return head + codes + section + classes + b"".join(TILE.pack(tile.words) for tile in spending.tiles)


class Beginning:
    """The bytes of a payload, brought to the host as far as they are asked for: mostly once, mostly little."""

    def __init__(self, payload):
        self._payload, self._known = payload, b""

    def __len__(self):
        return self._payload.numel()

    def __getitem__(self, part):
        if part.stop > len(self._known):
            size = max(USUAL_HEADER, 2 * part.stop)
            self._known = self._payload[:size].cpu().numpy().tobytes()
        return self._known[part]


class Header(NamedTuple):
    """What a payload says before its words.

    nbytes: where the words begin. spending: None if no entry is coded: all are `constant`.
    outliers: what went apart. turned: the seed and the blocks' scales of an unbiased payload.
    """

    nbytes: int = 0
    spending: Spending | None = None
    constant: float = 0.0
    outliers: Outliers | None = None
    turned: tuple[int, torch.Tensor] | None = None


def read_header(payload: torch.Tensor, numel: int, block: int) -> Header:
    """Read the header of a payload (1-D uint8) of numel entries; PayloadError if its parts contradict each other."""
    data = Beginning(payload)
    flags, count, base, columns, *forms = HEADER.unpack(data[: HEADER.size])
    known = (TURNED,) if flags & TURNED else (NOT_FINITE, ROWS, COLUMNS, APART)
    if flags & ~sum(known):
        raise PayloadError(f"payload: unknown flags {flags:#x}")
    if flags & NOT_FINITE or (count == 0 and not flags & APART):
        return Header(constant=math.nan if flags & NOT_FINITE else 0.0)
    if not -200 <= base <= 200:
        raise PayloadError(f"payload: a scale of 2^{base}")
    at = HEADER.size
    if not flags & (ROWS | COLUMNS):
        columns = numel
    elif not 1 <= columns <= numel or (flags & COLUMNS and numel % columns):
        raise PayloadError(f"payload: {columns} columns do not fit {numel} entries")
    codes = [None, None]
    for k, (flag, length) in enumerate(((ROWS, -(-numel // columns)), (COLUMNS, columns))):
        if flags & flag:
            codes[k], at = _read_codes(data, at, length, *forms[2 * k : 2 * k + 2])
    layout, apart, turned = Layout(numel, columns, *codes), None, None
    if flags & APART:
        apart, at = outliers.unpack(payload, at, layout)
    elif flags & TURNED:
        seed, scales, at = turning.unpack(payload, at, numel)
        turned = seed, scales
    if count == 0:
        return Header(at, Spending(layout, 0, [], []), outliers=apart, turned=turned)
    classes, at = _read_classes(data, at, count, layout)
    tiles = make_tiles(classes, block)
    if len(data) < at + TILE.size * len(tiles):
        raise PayloadError(f"payload: {len(tiles)} tiles do not fit {len(data)} bytes")
    for k, tile in enumerate(tiles):
        (words,) = TILE.unpack(data[at + TILE.size * k : at + TILE.size * (k + 1)])
        if words > tile.levels * tile.real:
            raise PayloadError(f"payload: a tile of {tile.real} rows and {tile.levels} levels has {words} words")
        tiles[k] = tile._replace(words=words)
    at += TILE.size * len(tiles)
    if len(data) < at + sum(tile.nbytes for tile in tiles):
        raise PayloadError(f"payload: {sum(tile.nbytes for tile in tiles)} bytes of code do not fit {len(data)}")
    return Header(at, Spending(layout, base, classes, tiles), outliers=apart, turned=turned)


def _read_codes(data, at, length, width, low):
    size = packing.packed_bytes(length, width)
    if width > 6 or low > CODES or len(data) < at + size:
        raise PayloadError(f"payload: {length} scale codes of {width} bits do not fit {len(data)} bytes")
    if width == 0:
        return np.zeros(length, np.uint8), at
    packed = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
    codes = packing.unpack_bits(packed, length, width).numpy().astype(np.int64)
    codes = np.where(codes > 0, codes + low - 1, 0)
    if codes.max() > CODES:
        raise PayloadError(f"payload: scale code {codes.max()}, expected at most {CODES}")
    return codes.astype(np.uint8), at + size


def _read_classes(data, at, count, layout):
    if len(data) < at + CLASS.size * count:
        raise PayloadError(f"payload: {count} classes do not fit {len(data)} bytes")
    histogram, classes, before = layout.histogram(), [], (MAX_LEVELS + 1, 0)
    for k in range(count):
        of_class, design, amplitude = CLASS.unpack(data[at + CLASS.size * k : at + CLASS.size * (k + 1)])
        if of_class >= CLASSES or histogram[of_class] == 0 or design >= design_count():
            raise PayloadError(f"payload: class {of_class} of design {design} has no entries or no such design")
        coded = CodedClass(of_class, int(histogram[of_class]), design, amplitude)
        place = (-coded.levels, -of_class)
        if k and place <= before:
            raise PayloadError(f"payload: class {of_class} is out of order")
        before = place
        classes.append(coded)
    return classes, at + CLASS.size * count
