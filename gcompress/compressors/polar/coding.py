"""A tensor to the bytes of a polar payload and back, on any Backend (backend.py); docs/FORMAT.md gives the bytes."""

import math
from typing import NamedTuple

import numpy as np
import torch

from . import limit_model, outliers, products, turning
from .backend import Backend
from .header import pack_header, read_header
from .layout import (
    CLASSES,
    LARGEST,
    NO_CODE,
    Layout,
    candidate_layouts,
    side_bytes,
    without_idle_codes,
)
from .payload import APART, CLASS, HEADER, NOT_FINITE, PRODUCT, SMALLEST_PAYLOAD, TILE, TURNED
from .samples import sample_scales, with_amplitudes
from .spending import Spending, class_starts, spend
from .tables import octave_codes, power_of_two, powers_of_two
from .water import choose_layout, error_model

CHUNK = 256
SMALLEST_SIDE = 16  # a matrix with fewer rows or columns is taken as chunks
SUM_SCALE = 2.0**24  # the sums of |x| come divided by it
NOTHING = 4096  # 1/32 octaves below the largest variance: that of a class of zeros
ENERGY_STEPS = 64.0  # per modelled standard deviation, where energies of classes are measured
LEAST_FOR_OUTLIERS = 32  # bytes
RETRIES = 6
SMALLEST_DEVIATION = 2.0**-88
LEAST_RANK_GAIN = 0.9  # a product must lower the modelled error to this


class Survey(NamedTuple):
    """The sum of magnitudes of some entries, how to class them (None: nothing to code), the squared error expected."""

    total: float
    layout: Layout | None
    error: float


def encode(
    backend: Backend,
    values: torch.Tensor,
    payload: torch.Tensor,
    *,
    block: int,
    scales: str,
    flat: bool,
    share: float | str,
    list_size: int,
    rank: int | str,
) -> None:
    """Encode a contiguous float32 tensor of any shape to all bytes of `payload`, a uint8 tensor on its device.

    flat: allocation="flat". share: of outliers. The others are as in `Polar`.
    """
    columns, by_column = _matrix(values.shape, scales)
    values = values.view(-1)
    survey = _survey(backend, values, columns, by_column, payload.numel(), scales, flat)
    section = b""
    if rank and by_column and survey.layout is not None:
        section, values, survey = _without_product(backend, values, columns, survey, payload.numel(), flat, rank)
    rest = payload[: payload.numel() - len(section)]
    _encode_surveyed(backend, values, survey, rest, block, flat, share, list_size)
    if section:
        rest[0] |= PRODUCT
        _fill(payload[rest.numel() :], section)


def _survey(backend, values, columns, by_column, nbytes, scales, flat):
    row_sums, column_sums = backend.sums(values, columns, by_column)
    total = float(np.cumsum(row_sums, dtype=np.float64)[-1]) * SUM_SCALE  # one after the other: the same anywhere
    if not math.isfinite(total):
        return Survey(total, None, math.inf)
    if total / values.numel() < SMALLEST_DEVIATION:
        return Survey(total, None, 0.0)
    sums = (None, None) if scales == "tensor" else (row_sums, column_sums)
    layouts = list(candidate_layouts(values.numel(), columns, *sums))
    layout, error = choose_layout(layouts, nbytes, flat)
    return Survey(total, layout, error * _deviation(layouts[-1].histogram(), total) ** 2)


def _deviation(counts, total):
    """What code 0 stands for."""
    return total * limit_model.GAUSSIAN_RMS / math.fsum((counts * powers_of_two(16 * np.arange(CLASSES))).tolist())


def _without_product(backend, values, columns, survey, nbytes, flat, rank):
    """(section of the payload that holds a product of thin matrices or none, the rest of the entries, its Survey)."""
    matrix = values.view(-1, columns)
    error, energy = error_model(survey.layout, flat)
    factors = products.find(matrix, survey.total, nbytes, lambda bits: min(error(bits) / energy, 1.0), rank)
    section = b"" if factors is None else products.pack(factors)
    while nbytes - len(section) < SMALLEST_PAYLOAD and len(factors.exponents) > 1:
        factors = factors.without_weakest()
        section = products.pack(factors)
    if not 0 < len(section) <= nbytes - SMALLEST_PAYLOAD:
        return b"", values, survey
    rest = factors.taken_from(matrix).view(-1)
    after = _survey(backend, rest, columns, True, nbytes - len(section), "rowcol", flat)
    if not after.error < LEAST_RANK_GAIN * survey.error:
        return b"", values, survey
    return section, rest, after


def _encode_surveyed(backend, values, survey, payload, block, flat, share, list_size):
    nbytes, (total, layout, _) = payload.numel(), survey
    if not math.isfinite(total):
        return _fill(payload, bytes([NOT_FINITE]))
    if layout is None:
        return _fill(payload, b"")
    apart, layout, values = _set_apart(backend, values, layout, total, nbytes, share, flat, list_size > 1)
    variances = _variances(backend, values, layout, total, measured=bool(apart))
    spent = variances is not None and spend(layout, variances, nbytes, flat, block, len(apart), keep_codes=bool(apart))
    if spent:
        spending, words = _encode_words(backend, values, *spent, variances, list_size)
        return _fill(payload, pack_header(spending, APART if apart else 0, apart), words)
    return _fill(payload, pack_header(Spending(layout, 0, [], []), APART, apart) if apart else b"")


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
    left = nbytes - HEADER.size - side_bytes(layout) - CLASS.size - TILE.size
    if share == 0 or left < LEAST_FOR_OUTLIERS:
        return b"", layout, values
    found = limit_model.histogram(values, layout, total)
    option = limit_model.choose(found, left, share, flat, thorough)
    for _ in range(RETRIES):
        if option is None:
            break
        kept = layout if flat else without_idle_codes(layout, option.lowest)  # now: limits depend on codes
        places = backend.beyond(values, kept, option.limits, int(option.outliers))
        if len(places) == 0:
            break
        if 3 * len(places) < 8 * left:  # a sample may mislead
            entries, rest = outliers.split(values, places, option.limits, kept)
            section = outliers.pack(entries, values.numel())
            if len(section) <= left:
                return section, kept, rest
        option = limit_model.weaker(found, left, flat, option)
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
    variances = np.zeros(CLASSES, np.int64)
    if layout.row_codes is None and layout.column_codes is None and not measured:
        variances[2 * NO_CODE] = octave_codes(np.array([(total / layout.numel * limit_model.GAUSSIAN_RMS) ** 2]), 32)[0]
        return variances
    counts = layout.histogram()
    unit = math.fsum(count * power_of_two(16 * k) for k, count in enumerate(counts.tolist()) if count)
    scales = np.array([ENERGY_STEPS * unit / (total * power_of_two(16 * k)) for k in range(CLASSES)], np.float32)
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
    scales = sample_scales(spending, variances, rates)
    words, moments = backend.encode(values, spending, scales, list_size)
    return with_amplitudes(spending, scales, moments), words


def encode_unbiased(
    backend: Backend, values: torch.Tensor, payload: torch.Tensor, *, block: int, list_size: int, seed: int
) -> None:
    """Encode a contiguous float32 tensor, turned at random, to all bytes of `payload`, a uint8 tensor on its device."""
    values = values.view(-1)
    numel = values.numel()
    total = float(np.cumsum(backend.sums(values, min(CHUNK, numel), False)[0], dtype=np.float64)[-1])
    if not math.isfinite(total) or total == 0:
        return _fill(payload, b"" if total == 0 else bytes([NOT_FINITE]))
    turned, lengths = backend.turn(values, seed)
    variances = np.zeros(CLASSES, np.int64)
    layout = Layout(numel, numel, None, None)
    spending, rates = spend(layout, variances, payload.numel(), True, block, turning.section_bytes(numel))
    spending, words = _encode_words(backend, turned, spending, rates, variances, list_size)
    decoded = torch.empty_like(turned)
    backend.decode(words, spending, decoded, False)
    section = turning.pack(seed, backend.turn_scales(turned, decoded, lengths))
    _fill(payload, pack_header(spending, TURNED, section), words)


# Bytes -------------------------------------------------------------------------------------


def decode_into(backend: Backend, payload: torch.Tensor, out: torch.Tensor, add: bool, block: int) -> None:
    """Decode a payload into, or add it to, a float32 vector; PayloadError if the bytes contradict themselves."""
    if not int(payload[0]) & PRODUCT:
        return _decode_rest_into(backend, payload, out, add, block)
    factors, rest = products.unpack(payload, out.numel())
    rest[0] &= 255 - PRODUCT
    whole = torch.empty_like(out) if add else out  # an entry's two parts are added to each other first
    _decode_rest_into(backend, rest, whole, False, block)
    factors.add_to(whole.view(-1, len(factors.right)))
    if add:
        out += whole


def _decode_rest_into(backend, payload, out, add, block):
    head = read_header(payload, out.numel(), block)
    spending, apart, words = head.spending, head.outliers, payload[head.nbytes :]
    if head.turned is not None:
        turned = torch.empty_like(out)
        _decode_spending(backend, words, spending, turned, False)
        backend.turn_back(turned, *head.turned, out, add)
        return
    if apart is not None and add:  # an entry's two parts are added to each other first
        before, out[apart.places] = out[apart.places], 0.0
    if spending is None or not spending.classes:
        out.add_(head.constant) if add else out.fill_(head.constant)
    else:
        _decode_spending(backend, words, spending, out, add)
    if apart is not None:
        whole = (out[apart.places] + apart.coarse(spending.layout)).clamp_(-LARGEST, LARGEST)
        out[apart.places] = before + whole if add else whole


def _decode_spending(backend, payload, spending, out, add):
    words = payload[: sum(tile.nbytes for tile in spending.tiles)]
    if spending.layout.row_codes is None and spending.layout.column_codes is None:
        backend.decode(words, spending, out, add)
    else:
        values = torch.empty(class_starts(spending)[1], dtype=torch.float32, device=out.device)
        backend.decode(words, spending, values, False)
        backend.scatter(values, spending, out, add)
