"""A tensor to the bytes of a polar payload and back, on either backend (docs/FORMAT.md).

A backend is a module or object with the six functions of reference.py: `sums`, `energies`,
`gather`, `encode`, `decode` and `scatter`. Everything else, here and in plan.py, is common to all.
"""

import math

import numpy as np
import torch

from .. import packing
from ..errors import PayloadError
from . import plan
from .tables import MAX_LEVELS, design_count, octave_codes, power_of_two

CHUNK = 256
TILES_AT_ONCE = 8
SMALLEST_SIDE = 16  # a matrix with fewer rows or columns is taken as chunks
SUM_SCALE = 2.0**24  # the sums of |x| come divided by it
ENERGY_STEPS = 64.0  # per modelled standard deviation, where energies of classes are measured
SMALLEST_DEVIATION = 2.0**-88
GAUSSIAN_RMS = 1.2533141373155001  # root mean square over mean magnitude


def encode(backend, values, nbytes, *, block, scales, flat, list_size):
    """Encode a contiguous float32 tensor of any shape to a uint8 tensor of `nbytes` bytes on its device."""
    payload = np.zeros(nbytes, np.uint8)
    columns, by_column = _matrix(values.shape, scales)
    values = values.view(-1)
    row_sums, column_sums = backend.sums(values, columns, by_column)
    total = float(np.cumsum(row_sums, dtype=np.float64)[-1]) * SUM_SCALE  # one after the other: the same anywhere
    if not math.isfinite(total):
        payload[0] = plan.NOT_FINITE
    elif total / values.numel() >= SMALLEST_DEVIATION:
        layouts = plan.candidate_layouts(values.numel(), columns, None if scales == "tensor" else row_sums, column_sums)
        layout = plan.choose_layout(list(layouts), nbytes, flat)
        variances = _variances(backend, values, layout, total)
        spent = plan.spend(layout, variances, nbytes, flat, block)
        if spent is not None:
            return _encode_spending(backend, values, *spent, variances, payload, list_size)
    return torch.from_numpy(payload).to(values.device)


def _matrix(shape, scales):
    """(row length, whether columns have scales of their own)."""
    numel = shape.numel()
    if scales == "rowcol" and len(shape) > 1 and shape[0] >= SMALLEST_SIDE and numel // shape[0] >= SMALLEST_SIDE:
        return numel // shape[0], True
    return min(CHUNK, numel), False


def _variances(backend, values, layout, total):
    """Logarithms of the classes' variances in 1/32 octaves: measured, or for a single class from its mean magnitude."""
    variances = np.zeros(plan.CLASSES, np.int64)
    if layout.row_codes is None and layout.column_codes is None:
        variances[2 * plan.NO_CODE] = octave_codes(np.array([(total / layout.numel * GAUSSIAN_RMS) ** 2]), 32)[0]
        return variances
    counts = layout.histogram()
    unit = math.fsum(count * power_of_two(16 * k) for k, count in enumerate(counts.tolist()) if count)
    scales = np.array([ENERGY_STEPS * unit / (total * power_of_two(16 * k)) for k in range(plan.CLASSES)], np.float32)
    energies = np.asarray(backend.energies(values, layout, scales), np.float64)
    used = (counts > 0) & (energies > 0)
    means = energies[used] / counts[used] / scales[used].astype(np.float64) ** 2
    variances[:] = -(1 << 20)
    variances[used] = octave_codes(means, 32)
    return variances


def _encode_spending(backend, values, spending, rates, variances, payload, list_size):
    scales = plan.sample_scales(spending, variances, rates)
    words, products = [], np.zeros((len(spending.classes), 2), np.int64)
    for part_of_values, part in _in_parts(values, spending):
        part_words, part_products = backend.encode(backend.gather(part_of_values, part, scales), part, list_size)
        words.append(part_words)
        products += np.asarray(part_products, np.int64)
    words = torch.cat(words)
    header = _pack_header(plan.with_amplitudes(spending, scales, products))
    payload[: len(header)] = np.frombuffer(header, np.uint8)
    payload = torch.from_numpy(payload).to(values.device)
    payload[len(header) : len(header) + words.numel()] = words
    return payload


def _in_parts(values, spending):
    """(entries, their part of the plan): few tiles at a time where entries keep their order, for the caches."""
    if spending.layout.row_codes is not None or spending.layout.column_codes is not None:
        yield values, spending
        return
    start = 0
    for first in range(0, len(spending.tiles), TILES_AT_ONCE):
        tiles = spending.tiles[first : first + TILES_AT_ONCE]
        part = values[start : start + sum(tile.real * tile.lanes for tile in tiles)]
        start += part.numel()
        layout = plan.Layout(part.numel(), part.numel(), None, None)
        classes = [spending.classes[0]._replace(count=part.numel())]
        yield part, spending._replace(layout=layout, tiles=tiles, classes=classes)


# Bytes -------------------------------------------------------------------------------------


def _pack_header(spending):
    layout, flags, forms, codes = spending.layout, 0, [], b""
    for flag, of in ((plan.ROWS, layout.row_codes), (plan.COLUMNS, layout.column_codes)):
        width, low = (0, 0) if of is None else plan.code_form(of)
        forms += [width, low]
        if of is not None:
            flags |= flag
            packed = np.where(of > 0, of - np.int64(low) + 1, 0).astype(np.uint8)
            codes += packing.pack_bits(torch.from_numpy(packed), width).numpy().tobytes() if width else b""
    head = plan.HEADER.pack(flags, len(spending.classes), spending.base, layout.columns if flags else 0, *forms)
    classes = b"".join(plan.CLASS.pack(c.of_class, c.design, c.amplitude) for c in spending.classes)
    return head + codes + classes + b"".join(plan.TILE.pack(tile.words) for tile in spending.tiles)


def _read_header(payload, numel, block):
    """(spending, where the words begin); a float in place of the first if all entries are that."""
    data = payload.cpu().numpy().tobytes()
    flags, count, base, columns, *forms = plan.HEADER.unpack_from(data)
    if flags & ~(plan.NOT_FINITE | plan.ROWS | plan.COLUMNS):
        raise PayloadError(f"payload: unknown flags {flags:#x}")
    if flags & plan.NOT_FINITE or count == 0:
        return (math.nan if flags & plan.NOT_FINITE else 0.0), 0
    if not -200 <= base <= 200:
        raise PayloadError(f"payload: a scale of 2^{base}")
    at = plan.HEADER.size
    if not flags & (plan.ROWS | plan.COLUMNS):
        columns = numel
    elif not 1 <= columns <= numel or (flags & plan.COLUMNS and numel % columns):
        raise PayloadError(f"payload: {columns} columns do not fit {numel} entries")
    codes = [None, None]
    for k, (flag, length) in enumerate(((plan.ROWS, -(-numel // columns)), (plan.COLUMNS, columns))):
        if flags & flag:
            codes[k], at = _read_codes(data, at, length, *forms[2 * k : 2 * k + 2])
    layout = plan.Layout(numel, columns, *codes)
    classes, at = _read_classes(data, at, count, layout)
    tiles = plan.make_tiles(classes, block)
    if len(data) < at + plan.TILE.size * len(tiles):
        raise PayloadError(f"payload: {len(tiles)} tiles do not fit {len(data)} bytes")
    for k, tile in enumerate(tiles):
        (words,) = plan.TILE.unpack_from(data, at + plan.TILE.size * k)
        if words > tile.levels * tile.real:
            raise PayloadError(f"payload: a tile of {tile.real} rows and {tile.levels} levels has {words} words")
        tiles[k] = tile._replace(words=words)
    at += plan.TILE.size * len(tiles)
    if len(data) < at + sum(tile.nbytes for tile in tiles):
        raise PayloadError(f"payload: {sum(tile.nbytes for tile in tiles)} bytes of code do not fit {len(data)}")
    return plan.Spending(layout, base, classes, tiles), at


def _read_codes(data, at, length, width, low):
    size = packing.packed_bytes(length, width)
    if width > 6 or low > plan.CODES or len(data) < at + size:
        raise PayloadError(f"payload: {length} scale codes of {width} bits do not fit {len(data)} bytes")
    if width == 0:
        return np.zeros(length, np.uint8), at
    packed = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
    codes = packing.unpack_bits(packed, length, width).numpy().astype(np.int64)
    codes = np.where(codes > 0, codes + low - 1, 0)
    if codes.max() > plan.CODES:
        raise PayloadError(f"payload: scale code {codes.max()}, expected at most {plan.CODES}")
    return codes.astype(np.uint8), at + size


def _read_classes(data, at, count, layout):
    if len(data) < at + plan.CLASS.size * count:
        raise PayloadError(f"payload: {count} classes do not fit {len(data)} bytes")
    histogram, classes, before = layout.histogram(), [], (MAX_LEVELS + 1, 0)
    for k in range(count):
        of_class, design, amplitude = plan.CLASS.unpack_from(data, at + plan.CLASS.size * k)
        if of_class >= plan.CLASSES or histogram[of_class] == 0 or design >= design_count():
            raise PayloadError(f"payload: class {of_class} of design {design} has no entries or no such design")
        coded = plan.CodedClass(of_class, int(histogram[of_class]), design, amplitude)
        place = (-coded.levels, -of_class)
        if k and place <= before:
            raise PayloadError(f"payload: class {of_class} is out of order")
        before = place
        classes.append(coded)
    return classes, at + plan.CLASS.size * count


def decode_into(backend, payload, out, add, block):
    """Decode a payload into, or add it to, a float32 vector; PayloadError if the bytes contradict themselves."""
    spending, at = _read_header(payload, out.numel(), block)
    if isinstance(spending, float):
        out.add_(spending) if add else out.fill_(spending)
        return
    words = payload[at : at + sum(tile.nbytes for tile in spending.tiles)]
    if spending.layout.row_codes is None and spending.layout.column_codes is None:
        backend.decode(words, spending, out, add)
    else:
        values = torch.empty(plan.class_starts(spending)[1], dtype=torch.float32, device=out.device)
        backend.decode(words, spending, values, False)
        backend.scatter(values, spending, out, add)
