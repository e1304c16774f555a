"""Which rate every variance gets: reverse water-filling, and the error that it is expected to leave.

The rate is half the logarithm of variance over water level, nothing below it. All decisions are integers, or doubles
combined in a fixed order, so that every machine and backend plans alike.
"""

import math

import numpy as np

from .layout import CLASSES, mean_power, side_bytes
from .payload import CLASS, HEADER, TILE
from .tables import powers_of_two

LOWEST_RATE = 2  # 1/64 bit: classes with less are not coded
PLAIN_RATE = 384  # 1/64 bit: classes of more are sent as plain samples of eight bits
PLAIN_COST = 512
LEAST_GAIN = 0.96  # finer scales must lower the modelled error to this: less is the noise of their estimates


def water_level(counts, variances, bits):
    """The level, in 1/64 bit, above which half-logarithmic variances cost `bits` bits; None if none fits."""
    order = np.argsort(-variances, kind="stable")
    order = order[counts[order] > 0]
    if len(order) == 0 or bits <= 0:
        return None
    members = np.cumsum(counts[order])
    levels = (np.cumsum(counts[order] * variances[order]) - 64 * bits) // members
    fits = np.flatnonzero(variances[order] - levels >= LOWEST_RATE)
    return int(levels[fits[-1]]) if len(fits) else None


def class_rates(counts, variances, bits, flat):
    """Rates in 1/64 bit per entry of all classes, 0 for those not coded; None if nothing can be coded.

    Args:
        counts: entries per class.
        variances: logarithms of a class's variance in 1/32 octaves, of deviation in 1/64 bit.
        bits: to be spent.
        flat: the same rate for all.
    """
    if flat:
        total = int(counts.sum())
        return np.where(counts > 0, max(1, 64 * bits // total), 0) if total and bits > 0 else None
    water = water_level(counts, variances, bits)
    if water is None:
        return None
    plain = (variances - water > PLAIN_RATE) & (counts > 0)
    if plain.any():  # they cost more than their rate
        left = bits - 8 * int(counts[plain].sum())
        lower = water_level(np.where(plain, 0, counts), variances, left)
        plain, water = (plain, lower) if lower is not None else (plain & False, water)
    rates = np.where(plain, PLAIN_COST, np.minimum(variances - water, PLAIN_RATE))
    return np.where((rates >= LOWEST_RATE) & (counts > 0), rates, 0)


def modelled_error(counts, variances, rates):
    """The squared error of ideal codes."""
    return math.fsum((counts * powers_of_two(2 * (variances - rates))).tolist())


def choose_layout(layouts, nbytes, flat):
    """(the layout with the least modelled error, that error), all judged by the finest one's variances.

    The error is in squares of what code 0 of the finest layout stands for. (None, infinity) if nothing fits.
    """
    finest = layouts[-1]
    row_power, column_power = mean_power(finest.row_codes), mean_power(finest.column_codes)
    best, least = None, math.inf
    for layout in layouts:
        error = error_model(layout, flat)[0](8 * nbytes)
        error *= row_power if layout.row_codes is None else 1.0  # a factor that is not sent has its mean power
        error *= column_power if layout.column_codes is None else 1.0
        if error < least * (LEAST_GAIN if best else 1.0):
            best, least = layout, error
    return best, least


def error_model(layout, flat):
    """(the function from a payload's bits to the modelled error, the modelled energy), by the scale codes alone.

    Both are in squares of what code 0 stands for; the error is infinite where nothing fits.
    """
    counts, variances = layout.histogram(), 16 * np.arange(CLASSES)
    overhead = 8 * (HEADER.size + CLASS.size + TILE.size + side_bytes(layout))

    def error(bits):
        rates = class_rates(counts, variances, int(bits) - overhead, flat)
        return math.inf if rates is None else modelled_error(counts, variances, rates)

    return error, modelled_error(counts, variances, np.zeros(CLASSES, np.int64))
