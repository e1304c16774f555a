"""The polar code's tables: the order of its positions, and log-likelihoods of samples.

Everything here is made at first use, by integers or by additions, multiplications, divisions
and square roots of doubles alone, which every machine rounds alike: the tables decide bytes.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 16384
LANES = 64
MAX_LEVELS = 8
ERASED = -128  # a sample that does not matter
SAMPLE_STEPS = 24  # sample steps per standard deviation, with more than one level
SIGN_STEPS = 16  # the root mean square of samples of a code of one level
INPUT_RMS = 20  # of the log-likelihoods of a level, in steps, at the design in the middle:
MIDDLE_RATES = {2: 6, 3: 8, 4: 12, 5: 16, 6: 24, 7: 30}  # eighths of a bit
POINT_ONE = 4096
LOG_TWO = 0.6931471805599453
MANTISSA = (1 << 52) - 1  # of a double's pattern
WEIGHTS = [math.isqrt(math.isqrt(1 << (96 + j))) for j in range(16)]  # floor(2^(24 + j/4))


class Design(NamedTuple):
    """Reproduction points for one rate (tools/make_polar_designs.py)."""

    levels: int
    rate: int  # eighths of a bit per entry; 0 without tables: points 1 and -1, or all samples
    information: tuple  # bits that each label bit carries, lowest first, in 1/4096
    points: np.ndarray  # [2^levels] int16, in 1/4096 of the standard deviation
    tables: np.ndarray  # int8, [prefix of lower label bits][sample as a byte], level after level; or none


@functools.cache
def positions(block):
    """Where in a block every row of a tile goes: uint16, in reversed bits, so that rows of a class are spread."""
    bits, row = block.bit_length() - 1, np.arange(block)
    return sum((row >> j & 1) << (bits - 1 - j) for j in range(bits)).astype(np.uint16)


@functools.lru_cache(1024)
def rank(block, rows):
    """The rank of every position by reliability, best first, if only the first `rows` rows are real: uint16.

    Polarization weight (He et al., arXiv 1704.05709): position i weighs the sum of 2^(j/4)
    over its set bits j; of equal weights the higher position is better. Rows that are not
    there make as many positions useless, which come last: a step of the transform leaves
    nothing to the first of a pair unless both are there, and to the second unless one is.
    """
    position = np.arange(block)
    weight = sum((position >> j & 1) * of_bit for j, of_bit in enumerate(WEIGHTS[: block.bit_length() - 1]))
    useful = np.empty(block, bool)
    useful[positions(block)] = position < rows
    half = block // 2
    while half:
        pairs = useful.reshape(-1, 2, half)
        useful = np.stack([pairs[:, 0] & pairs[:, 1], pairs[:, 0] | pairs[:, 1]], 1).ravel()
        half //= 2
    ranks = np.empty(block, np.uint16)
    ranks[np.lexsort((position, weight, useful))[::-1]] = position
    return ranks


@functools.cache
def _stored_designs():
    return json.loads(pathlib.Path(__file__).with_name("designs.json").read_text())


@functools.lru_cache(4096)
def levels_for(rate):
    """Label bits for a rate in 1/64 bits per entry: where one code's error crosses the next one's."""
    return 1 + sum(rate > limit for limit in (38, 51, 83, 109, 166, 218, 384))


@functools.lru_cache(4096)
def design_index(levels, rate):
    """The number of the design with `levels` nearest to a rate in eighths of a bit.

    0 is the one of one level; the last one, of eight, sends samples as they are.
    """
    if levels in (1, MAX_LEVELS):
        return 0 if levels == 1 else design_count() - 1
    fitting = [k for k, stored in enumerate(_stored_designs()) if stored["levels"] == levels]
    return 1 + min(fitting, key=lambda k: abs(_stored_designs()[k]["rate"] - rate))


def design_count():
    """How many designs there are."""
    return 2 + len(_stored_designs())


@functools.cache
def design_at(index):
    """The design of a number from `design_index`."""
    if index == 0:
        return Design(1, 0, (POINT_ONE,), np.array([1, -1], np.int16), np.zeros(0, np.int8))
    if index == design_count() - 1:
        points = np.rint(np.arange(256).astype(np.int8) * (POINT_ONE / SAMPLE_STEPS)).astype(np.int16)
        return Design(MAX_LEVELS, 0, (POINT_ONE,) * MAX_LEVELS, points, np.zeros(0, np.int8))
    levels, rate, information, points = _stored(index)
    gains = _gains(levels)
    tables = [
        np.clip(np.rint(ratio * gain), -127, 127).astype(np.int8)
        for ratio, gain in zip(_level_ratios(index), gains, strict=True)
    ]
    for table in tables:
        table[:, ERASED] = 0
    return Design(levels, rate, information, points, np.concatenate([table.ravel() for table in tables]))


def _stored(index):
    stored = _stored_designs()[index - 1]
    upper = np.array(stored["points"], np.int16)
    return stored["levels"], stored["rate"], tuple(stored["information"]), np.concatenate([-upper[::-1], upper])


@functools.cache
def _gains(levels):
    """Steps per nat of every level: the same for all designs of as many levels, so that classes mix."""
    gains, weight = [], _exp(-_samples() * _samples() / 2)
    for ratio in _level_ratios(design_index(levels, MIDDLE_RATES[levels])):
        power = math.fsum((ratio * ratio * weight).ravel()) / (len(ratio) * math.fsum(weight))
        gains.append(INPUT_RMS / math.sqrt(power))
    return gains


def _samples():
    """The samples behind a byte's 256 patterns, in standard deviations."""
    return np.arange(256).astype(np.int8) / np.float64(SAMPLE_STEPS)


@functools.cache
def _level_ratios(index):
    """Per level [2^level, 256]: log P(bit = 0) / P(bit = 1) given the lower bits and the sample."""
    levels, rate, _, points = _stored(index)
    upper = np.array(_stored_designs()[index - 1]["log_weights"]) / 65536.0
    log_weights = np.concatenate([upper[::-1], upper])
    beta = power_of_two(16 * rate) / 2
    exponent = log_weights - beta * (_samples()[:, None] - points / POINT_ONE) ** 2
    likelihood = _exp(exponent - exponent.max(1, keepdims=True))  # [256, points]
    return [_level_ratio(likelihood, level) for level in range(levels)]


def _level_ratio(likelihood, level):
    rows = []
    for prefix in range(1 << level):
        zero = _ordered_sum(likelihood[:, prefix :: 2 << level])
        one = _ordered_sum(likelihood[:, prefix + (1 << level) :: 2 << level])
        rows.append(_log(np.maximum(zero, 1e-80)) - _log(np.maximum(one, 1e-80)))
    return np.stack(rows)


def _ordered_sum(columns):
    total = columns[:, 0].copy()
    for k in range(1, columns.shape[1]):
        total += columns[:, k]
    return total


def _exp(x):
    """e^x for x <= 0, to eight digits or more where it matters."""
    small = np.maximum(x, -184.0) / 4096.0
    y = 1.0 + small * (1.0 + small / 2.0 * (1.0 + small / 3.0 * (1.0 + small / 4.0)))
    for _ in range(12):
        y = y * y
    return y


def _log(y):
    """Natural logarithm of y > 0."""
    mantissa, exponent = np.frexp(y)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square, series = t * t, 0.0
    for odd in range(31, 0, -2):
        series = series * square + 1.0 / odd
    return exponent * LOG_TWO + 2.0 * t * series


@functools.cache
def _roots():
    """2^(k / 64) for k in 0 … 63."""
    root, roots = 2.0, []
    for _ in range(6):
        root = math.sqrt(root)
        roots.append(root)
    powers = []
    for k in range(64):
        value = 1.0
        for bit, root in enumerate(roots):
            if k >> (5 - bit) & 1:
                value *= root
        powers.append(value)
    return powers


@functools.lru_cache(4096)
def power_of_two(sixty_fourths):
    """2^(k / 64) as a double."""
    return math.ldexp(_roots()[sixty_fourths & 63], sixty_fourths >> 6)


def powers_of_two(sixty_fourths):
    """The same for an integer array."""
    return np.ldexp(np.array(_roots())[sixty_fourths & 63], sixty_fourths >> 6)


def octave_codes(values, steps):
    """round(steps log2(values)) for positive doubles that are not subnormal, `steps` a divisor of 32: int64."""
    borders = np.array([power_of_two((2 * k - 1) * 32 // steps) / 2 for k in range(1, steps + 1)])
    patterns = np.ascontiguousarray(values, np.float64).view(np.int64)  # mantissas compare as they do
    mantissas = patterns & MANTISSA
    passed = np.zeros(patterns.shape, np.uint8)
    for border in (borders.view(np.int64) & MANTISSA).tolist():
        passed += (mantissas >= border).view(np.uint8)
    codes = np.right_shift(patterns, 52, out=mantissas)
    codes -= 1023
    codes *= steps
    codes += passed
    return codes
