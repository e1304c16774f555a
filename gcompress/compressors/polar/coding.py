"""A tensor to the bytes of a polar payload and back, on either backend (docs/FORMAT.md).

A backend is a module or object with the functions of reference.py: `sums`, `beyond`, `energies`,
`encode`, `decode` and `scatter`, for unbiased payloads also `turn`, `turn_scales` and `turn_back`. Everything else,
here and in planning.py, is common to all.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from ... import packing
from ...errors import PayloadError
from . import outliers, planning, products, turning
from .tables import MAX_LEVELS, design_count, octave_codes, power_of_two, powers_of_two

CHUNK = 256
SMALLEST_SIDE = 16  # a matrix with fewer rows or columns is taken as chunks
SUM_SCALE = 2.0**24  # the sums of |x| come divided by it
NOTHING = 4096  # 1/32 octaves below the largest variance: that of a class of zeros
ENERGY_STEPS = 64.0  # per modelled standard deviation, where energies of classes are measured
LEAST_FOR_OUTLIERS = 32  # bytes
RETRIES = 6
USUAL_HEADER = 16384  # bytes
SMALLEST_DEVIATION = 2.0**-88
LEAST_RANK_GAIN = 0.9  # a product must lower the modelled error to this


class Survey(NamedTuple):
    """The sum of magnitudes of some entries, how to class them (None: nothing to code), the squared error expected."""

    total: float
    layout: planning.Layout | None
    error: float


def encode(backend, values, payload, *, block, scales, flat, share, list_size, rank):
    """Encode a contiguous float32 tensor of any shape to all bytes of `payload`, a uint8 tensor on its device."""
    columns, by_column = _matrix(values.shape, scales)
    values = values.view(-1)
    survey = _survey(backend, values, columns, by_column, payload.numel(), scales, flat)
    section = b""
    if rank and by_column and survey.layout is not None:
        section, values, survey = _without_product(backend, values, columns, survey, payload.numel(), flat, rank)
    rest = payload[: payload.numel() - len(section)]
    _encode_surveyed(backend, values, survey, rest, block, flat, share, list_size)
    if section:
        rest[0] |= planning.PRODUCT
        _fill(payload[rest.numel() :], section)


def _survey(backend, values, columns, by_column, nbytes, scales, flat):
    row_sums, column_sums = backend.sums(values, columns, by_column)
    total = float(np.cumsum(row_sums, dtype=np.float64)[-1]) * SUM_SCALE  # one after the other: the same anywhere
    if not math.isfinite(total):
        return Survey(total, None, math.inf)
    if total / values.numel() < SMALLEST_DEVIATION:
        return Survey(total, None, 0.0)
    sums = (None, None) if scales == "tensor" else (row_sums, column_sums)
    layouts = list(planning.candidate_layouts(values.numel(), columns, *sums))
    layout, error = planning.choose_layout(layouts, nbytes, flat)
    return Survey(total, layout, error * _deviation(layouts[-1].histogram(), total) ** 2)


def _deviation(counts, total):
    """What code 0 stands for."""
    return (
        total * outliers.GAUSSIAN_RMS / math.fsum((counts * powers_of_two(16 * np.arange(planning.CLASSES))).tolist())
    )


def _without_product(backend, values, columns, survey, nbytes, flat, rank):
    """(section of the payload that holds a product of thin matrices or none, the rest of the entries, its Survey)."""
    matrix = values.view(-1, columns)
    error, energy = planning.error_model(survey.layout, flat)
    factors = products.find(matrix, survey.total, nbytes, lambda bits: min(error(bits) / energy, 1.0), rank)
    section = b"" if factors is None else products.pack(factors)
    while nbytes - len(section) < planning.SMALLEST_PAYLOAD and len(factors.exponents) > 1:
        factors = factors.without_weakest()
        section = products.pack(factors)
    if not 0 < len(section) <= nbytes - planning.SMALLEST_PAYLOAD:
        return b"", values, survey
    rest = factors.taken_from(matrix).view(-1)
    after = _survey(backend, rest, columns, True, nbytes - len(section), "rowcol", flat)
    if not after.error < LEAST_RANK_GAIN * survey.error:
        return b"", values, survey
    return section, rest, after


def _encode_surveyed(backend, values, survey, payload, block, flat, share, list_size):
    nbytes, (total, layout, _) = payload.numel(), survey
    if not math.isfinite(total):
        return _fill(payload, bytes([planning.NOT_FINITE]))
    if layout is None:
        return _fill(payload, b"")
    apart, layout, values = _set_apart(backend, values, layout, total, nbytes, share, flat, list_size > 1)
    variances = _variances(backend, values, layout, total, measured=bool(apart))
    spent = variances is not None and planning.spend(
        layout, variances, nbytes, flat, block, len(apart), keep_codes=bool(apart)
    )
    if spent:
        spending, words = _encode_words(backend, values, *spent, variances, list_size)
        return _fill(payload, _pack_header(spending, planning.APART if apart else 0, apart), words)
    return _fill(payload, _pack_header(planning.Spending(layout, 0, [], []), planning.APART, apart) if apart else b"")


def _fill(payload, header, words=None):
    """Header, words and zeros."""
    end = len(header)
    if header:
        payload[:end] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    if words is not None:
        payload[end : end + words.numel()] = words
        end += words.numel()
    payload[end:] = 0


def _set_apart(backend, values, layout, total, nbytes, share, flat, thorough):
    """(section of the payload that holds outliers or none, its layout, what remains of the entries)."""
    left = nbytes - planning.HEADER.size - planning.side_bytes(layout) - planning.CLASS.size - planning.TILE.size
    if share == 0 or left < LEAST_FOR_OUTLIERS:
        return b"", layout, values
    found = outliers.histogram(values, layout, total)
    option = outliers.choose(found, left, share, flat, thorough)
    for _ in range(RETRIES):
        if option is None:
            break
        kept = layout if flat else planning.without_idle_codes(layout, option.lowest)  # now: limits depend on codes
        places = backend.beyond(values, kept, option.limits, int(option.outliers))
        if len(places) == 0:
            break
        if 3 * len(places) < 8 * left:  # a sample may mislead
            entries, rest = outliers.split(values, places, option.limits, kept)
            section = outliers.pack(entries, values.numel())
            if len(section) <= left:
                return section, kept, rest
        option = outliers.weaker(found, left, flat, option)
    return b"", layout, values


def _matrix(shape, scales):
    """(row length, whether columns have scales of their own)."""
    numel = shape.numel()
    if scales == "rowcol" and len(shape) > 1 and shape[0] >= SMALLEST_SIDE and numel // shape[0] >= SMALLEST_SIDE:
        return numel // shape[0], True
    return min(CHUNK, numel), False


def _variances(backend, values, layout, total, measured):
    """Logarithms of the classes' variances in 1/32 octaves: measured, or for a single class from its mean magnitude.

    None if there is nothing: all entries are 0.
    """
    variances = np.zeros(planning.CLASSES, np.int64)
    if layout.row_codes is None and layout.column_codes is None and not measured:
        variances[2 * planning.NO_CODE] = octave_codes(
            np.array([(total / layout.numel * outliers.GAUSSIAN_RMS) ** 2]), 32
        )[0]
        return variances
    counts = layout.histogram()
    unit = math.fsum(count * power_of_two(16 * k) for k, count in enumerate(counts.tolist()) if count)
    scales = np.array(
        [ENERGY_STEPS * unit / (total * power_of_two(16 * k)) for k in range(planning.CLASSES)], np.float32
    )
    energies = np.asarray(backend.energies(values, layout, scales), np.float64)
    used = (counts > 0) & (energies > 0)
    means = energies[used] / counts[used] / scales[used].astype(np.float64) ** 2
    if not used.any():
        return None
    variances[used] = octave_codes(means, 32)
    variances[~used] = variances[used].max() - NOTHING
    return variances


def _encode_words(backend, values, spending, rates, variances, list_size):
    """(spending with amplitudes, words)."""
    scales = planning.sample_scales(spending, variances, rates)
    words, products = backend.encode(values, spending, scales, list_size)
    return planning.with_amplitudes(spending, scales, products), words


def encode_unbiased(backend, values, payload, *, block, list_size, seed):
    """Encode a contiguous float32 tensor, turned at random, to all bytes of `payload`, a uint8 tensor on its device."""
    values = values.view(-1)
    numel = values.numel()
    total = float(np.cumsum(backend.sums(values, min(CHUNK, numel), False)[0], dtype=np.float64)[-1])
    if not math.isfinite(total) or total == 0:
        return _fill(payload, b"" if total == 0 else bytes([planning.NOT_FINITE]))
    turned, lengths = backend.turn(values, seed)
    variances = np.zeros(planning.CLASSES, np.int64)
    layout = planning.Layout(numel, numel, None, None)
    spending, rates = planning.spend(layout, variances, payload.numel(), True, block, turning.section_bytes(numel))
    spending, words = _encode_words(backend, turned, spending, rates, variances, list_size)
    decoded = torch.empty_like(turned)
    backend.decode(words, spending, decoded, False)
    section = turning.pack(seed, backend.turn_scales(turned, decoded, lengths))
    _fill(payload, _pack_header(spending, planning.TURNED, section), words)


# Bytes -------------------------------------------------------------------------------------


def _pack_header(spending, flags, section):
    """Everything before the words; `section` is what the flags APART or TURNED announce."""
    layout, forms, codes = spending.layout, [], b""
    for flag, of in ((planning.ROWS, layout.row_codes), (planning.COLUMNS, layout.column_codes)):
        width, low = (0, 0) if of is None else planning.code_form(of)
        forms += [width, low]
        if of is not None:
            flags |= flag
            packed = np.where(of > 0, of - np.int64(low) + 1, 0).astype(np.uint8)
            codes += packing.pack_bits(torch.from_numpy(packed), width).numpy().tobytes() if width else b""
    coded_columns = layout.columns if flags & (planning.ROWS | planning.COLUMNS) else 0
    head = planning.HEADER.pack(flags, len(spending.classes), spending.base, coded_columns, *forms)
    classes = b"".join(planning.CLASS.pack(c.of_class, c.design, c.amplitude) for c in spending.classes)
    return head + codes + section + classes + b"".join(planning.TILE.pack(tile.words) for tile in spending.tiles)


class _Beginning:
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


def _read_header(payload, numel, block):
    """(spending, Outliers or what turning.unpack finds or None, where the words begin).

    A float in place of the first if all entries are that.
    """
    data = _Beginning(payload)
    flags, count, base, columns, *forms = planning.HEADER.unpack(data[: planning.HEADER.size])
    known = (
        (planning.TURNED,)
        if flags & planning.TURNED
        else (planning.NOT_FINITE, planning.ROWS, planning.COLUMNS, planning.APART)
    )
    if flags & ~sum(known):
        raise PayloadError(f"payload: unknown flags {flags:#x}")
    if flags & planning.NOT_FINITE or (count == 0 and not flags & planning.APART):
        return (math.nan if flags & planning.NOT_FINITE else 0.0), None, 0
    if not -200 <= base <= 200:
        raise PayloadError(f"payload: a scale of 2^{base}")
    at = planning.HEADER.size
    if not flags & (planning.ROWS | planning.COLUMNS):
        columns = numel
    elif not 1 <= columns <= numel or (flags & planning.COLUMNS and numel % columns):
        raise PayloadError(f"payload: {columns} columns do not fit {numel} entries")
    codes = [None, None]
    for k, (flag, length) in enumerate(((planning.ROWS, -(-numel // columns)), (planning.COLUMNS, columns))):
        if flags & flag:
            codes[k], at = _read_codes(data, at, length, *forms[2 * k : 2 * k + 2])
    layout, apart = planning.Layout(numel, columns, *codes), None
    if flags & planning.APART:
        apart, at = outliers.unpack(payload, at, layout)
    elif flags & planning.TURNED:
        *apart, at = turning.unpack(payload, at, numel)
    if count == 0:
        return planning.Spending(layout, 0, [], []), apart, at
    classes, at = _read_classes(data, at, count, layout)
    tiles = planning.make_tiles(classes, block)
    if len(data) < at + planning.TILE.size * len(tiles):
        raise PayloadError(f"payload: {len(tiles)} tiles do not fit {len(data)} bytes")
    for k, tile in enumerate(tiles):
        (words,) = planning.TILE.unpack(data[at + planning.TILE.size * k : at + planning.TILE.size * (k + 1)])
        if words > tile.levels * tile.real:
            raise PayloadError(f"payload: a tile of {tile.real} rows and {tile.levels} levels has {words} words")
        tiles[k] = tile._replace(words=words)
    at += planning.TILE.size * len(tiles)
    if len(data) < at + sum(tile.nbytes for tile in tiles):
        raise PayloadError(f"payload: {sum(tile.nbytes for tile in tiles)} bytes of code do not fit {len(data)}")
    return planning.Spending(layout, base, classes, tiles), apart, at


def _read_codes(data, at, length, width, low):
    size = packing.packed_bytes(length, width)
    if width > 6 or low > planning.CODES or len(data) < at + size:
        raise PayloadError(f"payload: {length} scale codes of {width} bits do not fit {len(data)} bytes")
    if width == 0:
        return np.zeros(length, np.uint8), at
    packed = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
    codes = packing.unpack_bits(packed, length, width).numpy().astype(np.int64)
    codes = np.where(codes > 0, codes + low - 1, 0)
    if codes.max() > planning.CODES:
        raise PayloadError(f"payload: scale code {codes.max()}, expected at most {planning.CODES}")
    return codes.astype(np.uint8), at + size


def _read_classes(data, at, count, layout):
    if len(data) < at + planning.CLASS.size * count:
        raise PayloadError(f"payload: {count} classes do not fit {len(data)} bytes")
    histogram, classes, before = layout.histogram(), [], (MAX_LEVELS + 1, 0)
    for k in range(count):
        of_class, design, amplitude = planning.CLASS.unpack(
            data[at + planning.CLASS.size * k : at + planning.CLASS.size * (k + 1)]
        )
        if of_class >= planning.CLASSES or histogram[of_class] == 0 or design >= design_count():
            raise PayloadError(f"payload: class {of_class} of design {design} has no entries or no such design")
        coded = planning.CodedClass(of_class, int(histogram[of_class]), design, amplitude)
        place = (-coded.levels, -of_class)
        if k and place <= before:
            raise PayloadError(f"payload: class {of_class} is out of order")
        before = place
        classes.append(coded)
    return classes, at + planning.CLASS.size * count


def decode_into(backend, payload, out, add, block):
    """Decode a payload into, or add it to, a float32 vector; PayloadError if the bytes contradict themselves."""
    if not int(payload[0]) & planning.PRODUCT:
        return _decode_rest_into(backend, payload, out, add, block)
    factors, rest = products.unpack(payload, out.numel())
    rest[0] &= 255 - planning.PRODUCT
    whole = torch.empty_like(out) if add else out  # an entry's two parts are added to each other first
    _decode_rest_into(backend, rest, whole, False, block)
    factors.add_to(whole.view(-1, len(factors.right)))
    if add:
        out += whole


def _decode_rest_into(backend, payload, out, add, block):
    spending, apart, at = _read_header(payload, out.numel(), block)
    if isinstance(apart, list):
        turned = torch.empty_like(out)
        _decode_spending(backend, payload[at:], spending, turned, False)
        backend.turn_back(turned, *apart, out, add)
        return
    if apart is not None and add:  # an entry's two parts are added to each other first
        before, out[apart.places] = out[apart.places], 0.0
    if isinstance(spending, float) or not spending.classes:
        value = spending if isinstance(spending, float) else 0.0
        out.add_(value) if add else out.fill_(value)
    else:
        _decode_spending(backend, payload[at:], spending, out, add)
    if apart is not None:
        whole = (out[apart.places] + apart.coarse(spending.layout)).clamp_(-planning.LARGEST, planning.LARGEST)
        out[apart.places] = before + whole if add else whole


def _decode_spending(backend, payload, spending, out, add):
    words = payload[: sum(tile.nbytes for tile in spending.tiles)]
    if spending.layout.row_codes is None and spending.layout.column_codes is None:
        backend.decode(words, spending, out, add)
    else:
        values = torch.empty(planning.class_starts(spending)[1], dtype=torch.float32, device=out.device)
        backend.decode(words, spending, values, False)
        backend.scatter(values, spending, out, add)
