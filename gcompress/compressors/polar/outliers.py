"""Entries that are sent apart, far beyond what the code reaches: their places, signs and magnitudes in few bits."""

import struct
from typing import NamedTuple

import numpy as np
import torch

from ... import packing
from ...errors import PayloadError
from .layout import CODES, LARGEST, NO_CODE
from .tables import power_of_two

HEADER = struct.Struct("<ffBB")  # limits: floor and slope; offset in 1/256 of a limit; layers of levels
LAYER = struct.Struct("<I")  # members, and above them 5 bits: the low bits of a gap
COUNT_BITS = 27
MOST_LAYERS = 24
# The limit is strength max(root of water, SLOPE deviation + INTERCEPT root of water): a code of two bits
# reaches about two deviations, and an entry's bits must spare as much as they would elsewhere.
SLOPE, INTERCEPT = 0.69, 0.4


class Limits(NamedTuple):
    """The limit of an entry is max(floor, slope r c + INTERCEPT floor) with the factors r, c of its row and column."""

    floor: float
    slope: float

    def at(self, rows, columns):
        """float32 limits for the factors of rows and columns, float32 tensors that broadcast."""
        slopes = rows * float(np.float32(self.slope))
        return (slopes * columns + self.intercept).clamp(min=self.floor)

    @property
    def intercept(self):
        return float(np.float32(INTERCEPT) * np.float32(self.floor))


def factors(layout):
    """What row and column codes stand for in a limit: 2^(code / 4), 0 for a code 0; float32 arrays."""
    table = np.array([0.0] + [power_of_two(16 * k) for k in range(1, CODES + 1)], np.float32)
    lone = table[NO_CODE : NO_CODE + 1]
    rows, columns = (lone if codes is None else table[codes] for codes in (layout.row_codes, layout.column_codes))
    return rows, columns


class Outliers(NamedTuple):
    """Places in rising order and signed whole levels: the steps |x| / limit, cut off."""

    limits: Limits
    offset: int  # 1/256 limit: where within their step entries lie on average
    places: torch.Tensor  # int64
    levels: torch.Tensor  # int64, 1 and more
    negative: torch.Tensor  # bool

    def coarse(self, layout):
        """What of every outlier is sent here: float32, in the order of places."""
        limits = _limits_at(self.limits, layout, self.places)
        sizes = (self.levels.to(torch.float32) + self.offset / 256) * limits
        sizes = sizes.clamp(max=LARGEST)
        return torch.where(self.negative, -sizes, sizes)


def _limits_at(limits, layout, places):
    rows, columns = (torch.from_numpy(part).to(places.device) for part in factors(layout))
    row = places // layout.columns if len(rows) > 1 else torch.zeros_like(places)
    column = places % layout.columns if len(columns) > 1 else torch.zeros_like(places)
    return limits.at(rows[row], columns[column])


def split(values, places, limits, layout):
    """(Outliers, float32 vector of what remains) for a vector and the places of its outliers."""
    entries = values[places]
    ratios = entries.abs() / _limits_at(limits, layout, places)
    levels = ratios.clamp(max=float((1 << MOST_LAYERS) - 1)).to(torch.int64)
    parts = ((ratios - levels).clamp(max=1.0) * 256).to(torch.int64)
    offset = min(int(parts.sum()) // max(len(places), 1), 255)
    found = Outliers(limits, offset, places, levels, entries < 0)
    rest = values.clone()
    rest[places] = entries - found.coarse(layout)
    return found, rest


def pack(found, numel):
    """The section of the payload that holds them."""
    layers, members, streams, mantissas = [], found.places, [], []
    universe, levels = numel, found.levels
    while len(members) and len(layers) < MOST_LAYERS:
        width, packed = _pack_gaps(members, universe)
        layers.append(LAYER.pack(len(members) | width << COUNT_BITS))
        streams.append(packed)
        depth = len(layers)
        higher = levels >> depth > 0
        if depth > 1:
            mantissas.append(packing.pack_bits(levels[~higher] & ((1 << (depth - 1)) - 1), depth - 1))
        universe, members, levels = len(levels), torch.nonzero(higher).view(-1), levels[higher]
    head = HEADER.pack(found.limits.floor, found.limits.slope, found.offset, len(layers)) + b"".join(layers)
    body = torch.cat([*streams, packing.pack_bits(found.negative, 1), *mantissas])
    return head + body.cpu().numpy().tobytes()


def _pack_gaps(places, universe):
    """(width, bytes): the low `width` bits of every gap, then the rest of it in unary."""
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    around = max((universe // len(places)).bit_length() - 1, 0)
    sizes = {w: len(places) * w + int((gaps >> w).sum()) for w in range(max(around - 1, 0), min(around + 2, 31))}
    width = min(sizes, key=sizes.get)
    ends = torch.cumsum((gaps >> width) + 1, 0)
    unary = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=places.device)
    unary[ends - 1] = 1
    low = packing.pack_bits(gaps & ((1 << width) - 1), width) if width else unary[:0]
    return width, torch.cat([low, packing.pack_bits(unary, 1)])


def unpack(data, at, layout):
    """(Outliers, where the section ends) from a uint8 tensor; PayloadError if it contradicts itself."""
    head = bytes(data[at : at + HEADER.size + MOST_LAYERS * LAYER.size].tolist())
    if len(head) < HEADER.size:
        raise PayloadError(f"payload: outliers do not fit {data.numel()} bytes")
    floor, slope, offset, count = HEADER.unpack_from(head)
    if count > MOST_LAYERS or len(head) < HEADER.size + LAYER.size * count:
        raise PayloadError(f"payload: {count} layers of outliers do not fit {data.numel()} bytes")
    layers = [LAYER.unpack_from(head, HEADER.size + LAYER.size * k)[0] for k in range(count)]
    at += HEADER.size + LAYER.size * count
    universe, chosen = layout.numel, []
    for layer in layers:
        places, at = _unpack_gaps(data, at, layer & ((1 << COUNT_BITS) - 1), layer >> COUNT_BITS, universe)
        chosen.append(places)
        universe = len(places)
    places = chosen[0] if chosen else torch.zeros(0, dtype=torch.int64, device=data.device)
    negative, at = _unpack_stream(data, at, len(places), 1)
    levels = torch.ones_like(places)
    members = torch.arange(len(places), device=data.device)
    for depth in range(1, count):
        members = members[chosen[depth]]
        alone = torch.ones_like(members, dtype=torch.bool)
        if depth + 1 < count:
            alone[chosen[depth + 1]] = False
        mantissas, at = _unpack_stream(data, at, int(alone.sum()), depth)
        levels[members[alone]] = (1 << depth) + mantissas.to(torch.int64)
    return Outliers(Limits(floor, slope), offset, places, levels, negative.bool()), at


def _unpack_gaps(data, at, count, width, universe):
    if not 1 <= count <= universe:
        raise PayloadError(f"payload: {count} outliers among {universe} entries")
    gaps = 0
    if width:
        gaps, at = _unpack_stream(data, at, count, width)
    longest = min(8 * (data.numel() - at), count + (universe >> width) + 1)
    unary = packing.unpack_bits(data[at : at + packing.packed_bytes(max(longest, 0), 1)], max(longest, 0), 1)
    ends = torch.nonzero(unary).view(-1)[:count]
    if len(ends) < count:
        raise PayloadError(f"payload: {len(ends)} outliers are marked, expected {count}")
    high = torch.diff(ends, prepend=ends.new_full((1,), -1)) - 1
    places = torch.cumsum((high << width | gaps) + 1, 0) - 1
    if int(places[-1]) >= universe:
        raise PayloadError(f"payload: an outlier at {int(places[-1])} of {universe} entries")
    return places, at + packing.packed_bytes(int(ends[-1]) + 1, 1)


def _unpack_stream(data, at, count, width):
    size = packing.packed_bytes(count, width)
    if data.numel() < at + size:
        raise PayloadError(f"payload: {count} outliers do not fit {data.numel()} bytes")
    return packing.unpack_bits(data[at : at + size], count, width).to(torch.int64), at + size
