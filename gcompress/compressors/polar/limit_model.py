"""From which magnitude on an entry is an outlier: a model of what it costs to send it apart, and what to leave it in.

Limits follow the deviations that rows and columns have by their codes. They are chosen by the modelled error of the
whole payload.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from .layout import CLASSES, LARGEST, NO_CODE
from .outliers import HEADER, INTERCEPT, LAYER, MOST_LAYERS, SLOPE, Limits
from .tables import LOG_TWO, POINT_ONE, _exp, _log, design_at, design_index, levels_for, power_of_two

GAUSSIAN_RMS = 1.2533141373155001  # root mean square over mean magnitude
SAMPLE = 1 << 16  # entries that decisions are made by
BINS, LOWEST_OCTAVE = 128, -4  # of magnitudes over modelled deviations: eight to an octave
STRONGEST, WEAKEST = 80, 320  # limits' strengths, from 2.4 to 32, as logarithms in 1/64 octave
LOW_RATE, STRONGEST_ABOVE = 0.8, 104  # from that many bits an entry, 3.1: the model flatters stronger ones there
STARTS = 128, 192  # strengths 4 and 8: where neither gains, none does
STEPS = 32, -32, 16, -16, 8, -8, 4, -4
LOWEST_RATE = 1 / 32  # bits: classes with less are not coded
LEAST_GAIN, THOROUGH_GAIN = 0.985, 0.995  # the modelled error must fall to this
GAUSSIAN_ENOUGH, HIGH_RATE = 0.0035, 2.2  # below this share of energy and bits an entry no gain is to be expected
SMALLEST_LIMIT = 2.0**-100
GAP_LOSS = 0.06  # bits of an outlier's gap over the entropy
EXCESS_SHARE = 0.35  # of the squares of what lies beyond the last point, by measurement
TAIL_SHARE = 0.6  # of a Gaussian's own tail, that the figures of the code contain
# Mean of (|z| - reach)^2 over a Gaussian's entries beyond it, reach in halves of a deviation.
GAUSSIAN_TAIL = (1.0, 0.4191, 0.1507, 0.0461, 0.0115, 0.0024, 0.0004, 0.0)


class Histogram(NamedTuple):
    """A sample of the entries of every class by magnitude, in deviations that the class's code stands for."""

    classes: np.ndarray  # int64 [classes with entries]
    counts: np.ndarray  # int64, the same: entries of the tensor
    unit: float  # the deviation of class 0
    above: np.ndarray  # float64 [3, classes, BINS + 1]: share, sum of magnitudes, of squares in a bin and higher ones

    def tail(self):
        """The share of the energy that lies beyond 4 modelled deviations, a Gaussian's being .0011."""
        energies = self.counts * np.array([power_of_two(32 * int(k)) for k in self.classes])
        four = np.full(len(self.classes), 4.0)
        return math.fsum(energies * self.beyond(four)[2]) / max(math.fsum(energies * self.above[2, :, 0]), 1e-300)

    def beyond(self, limits):
        """[3, classes] for magnitudes of at least `limits` deviations."""
        mantissa, exponent = np.frexp(limits)
        place = (exponent - 1 - LOWEST_OCTAVE + 2 * mantissa - 1) * 8  # linear within an octave
        place = np.clip(place, 0.0, BINS)
        low = np.minimum(place.astype(np.int64), BINS - 1)
        part = place - low
        k = np.arange(len(self.classes))
        return self.above[:, k, low] * (1 - part) + self.above[:, k, low + 1] * part


def histogram(values, layout, total):
    """The Histogram of a float32 vector whose magnitudes sum to `total`."""
    counts = layout.histogram()
    classes = np.flatnonzero(counts)
    unit = math.fsum(int(counts[k]) * power_of_two(16 * int(k)) for k in classes)
    unit = total * GAUSSIAN_RMS / unit
    magnitudes, of_class = _sampled(values, layout)
    scales = np.array([1.0 / (unit * power_of_two(16 * k)) for k in range(CLASSES)], np.float32)
    scaled = magnitudes * (
        torch.from_numpy(scales).to(values.device)[of_class] if len(of_class) else float(scales[2 * NO_CODE])
    )
    bins = ((scaled.view(torch.int32) >> 20) - ((127 + LOWEST_OCTAVE) << 3)).clamp_(0, BINS - 1)
    first = of_class * BINS if len(of_class) else 2 * NO_CODE * BINS
    members = torch.bincount(bins + first, minlength=CLASSES * BINS).view(-1, BINS)
    members = members.cpu().numpy()[classes].astype(np.float64)
    members /= np.maximum(members.sum(1, keepdims=True), 1.0)  # whole numbers: any order gives their sum
    edges = np.arange(BINS)
    middle = np.ldexp(1 + (edges % 8 + 0.5) / 8, edges // 8 + LOWEST_OCTAVE)
    middle[0] = 0.0
    sums = np.stack([members, members * middle, members * middle * middle])
    above = np.zeros((3, len(classes), BINS + 1))
    above[:, :, :BINS] = np.cumsum(sums[:, :, ::-1], 2)[:, :, ::-1]
    return Histogram(classes, counts[classes], unit, above)


def _sampled(values, layout):
    """(magnitudes, classes) of about SAMPLE entries, 0 for those of a code 0; no classes if there is only one."""
    lone = layout.row_codes is None and layout.column_codes is None
    step = -(-values.numel() // SAMPLE)
    if lone:
        whole = values.numel() // 256 * 256
        taken = values if step == 1 else values[:whole].view(-1, 256)[::step].reshape(-1)
        return taken.abs(), torch.zeros(0, dtype=torch.int64)
    rows = np.full(layout.rows, NO_CODE) if layout.row_codes is None else layout.row_codes
    columns = np.full(layout.columns, NO_CODE) if layout.column_codes is None else layout.column_codes
    rows, columns = (torch.from_numpy(codes.astype(np.int64)).to(values.device) for codes in (rows, columns))
    of_class = torch.where((rows[::step, None] > 0) & (columns > 0), rows[::step, None] + columns, 0).view(-1)
    whole = values.numel() // layout.columns * layout.columns
    magnitudes = values[:whole].view(-1, layout.columns)[::step].reshape(-1).abs()
    if whole < values.numel() and (layout.rows - 1) % step == 0:
        magnitudes = torch.cat([magnitudes, values[whole:].abs()])
    return magnitudes, of_class[: len(magnitudes)]


def choose(found, nbytes, share, flat, thorough):
    """The Limits of least modelled error (or for about a share of the entries), and rates; None for no outliers.

    Args:
        found: the Histogram.
        nbytes: for outliers and all that comes after the scale codes.
        share: "auto", or of the entries.
        flat: see class_rates.
        thorough: look for outliers also where they gain little, some per cent at 2 bits, for their time.
    """
    if share != "auto":
        return _for_share(found, nbytes, share, flat)
    if not thorough and found.tail() < GAUSSIAN_ENOUGH and 8 * nbytes < HIGH_RATE * int(found.counts.sum()):
        return None
    strongest = STRONGEST if 8 * nbytes < LOW_RATE * int(found.counts.sum()) else STRONGEST_ABOVE
    least = THOROUGH_GAIN if thorough else LEAST_GAIN
    none, best = _modelled(found, nbytes, flat, None), None
    for first in STARTS:
        option = _modelled(found, nbytes, flat, first)
        while option is None and first < WEAKEST:  # more outliers than the bytes can name
            first += 64
            option = _modelled(found, nbytes, flat, first)
        if option and (none is None or option.error < least * none.error):
            best = option
            break
    for step in STEPS if best else ():
        while strongest <= best.strength + step <= WEAKEST:
            option = _modelled(found, nbytes, flat, best.strength + step)
            if option is None or option.error >= best.error:
                break
            best = option
    return best


def _for_share(found, nbytes, share, flat):
    """The Option with the strongest limits that about `share` of the entries reach, or fewer; None if none does."""
    strong, weak = STRONGEST - 4, WEAKEST
    while weak - strong > 4:
        middle = (strong + weak) // 2
        option = _modelled(found, nbytes, flat, middle)
        fits = option and option.outliers <= share * int(found.counts.sum())
        strong, weak = (strong, middle) if fits else (middle, weak)
    option = _modelled(found, nbytes, flat, weak)
    return option if option and option.outliers >= 1 else None


def weaker(found, nbytes, flat, option):
    """The Option with the next weaker limits, for when outliers took more bytes than modelled."""
    return _modelled(found, nbytes, flat, option.strength + STEPS[2])


class Option(NamedTuple):
    """What limits of some strength would do."""

    strength: int
    limits: Limits | None
    lowest: int  # class that would be coded
    error: float
    outliers: float


def _modelled(found, nbytes, flat, strength):
    """The Option, after three rounds in which water level and limits find each other; None if nothing can be coded."""
    deviations = np.array([power_of_two(16 * int(k)) for k in found.classes])
    energy, magnitude = found.above[2, :, 0], found.above[1, :, 0]
    limits, outliers, spent = np.full(len(deviations), np.inf), 0.0, 0.0
    for turn in range(1 if strength is None else 4):
        first_guess = np.ones(len(deviations)) if turn == 0 and strength else energy
        logarithms = _log(np.maximum(first_guess, 1e-12) * deviations**2) / (2 * LOG_TWO)
        rates, water = _water_filling(found.counts, logarithms, 8 * nbytes - spent, flat)
        if rates is None:
            return None
        if turn == 3 or strength is None:
            break
        weights = np.where(rates > 0, found.counts * deviations**2, 1e-300)
        relative = math.sqrt(math.fsum(weights * first_guess) / math.fsum(weights))
        factor = power_of_two(strength)
        floor, slope = factor * water, factor * SLOPE * relative
        limits = np.maximum(floor, slope * deviations + INTERCEPT * floor) / deviations
        outside = found.beyond(limits)
        outliers = math.fsum(found.counts * outside[0])
        energy = found.above[2, :, 0] - outside[2] + outside[0] * limits * limits / 12
        magnitude = found.above[1, :, 0] - outside[1] + outside[0] * limits / 4
        spent = _bits(found, limits, outliers)
    error = _error(found, deviations, rates, energy, magnitude, limits)
    lowest = int(found.classes[rates > 0][0]) if rates.any() else CLASSES
    if strength is None:
        return Option(0, None, lowest, error, 0.0)
    chosen = Limits(*(float(np.float32(min(limit * found.unit, LARGEST))) for limit in (floor, slope)))
    if chosen.floor < SMALLEST_LIMIT:
        return None
    return Option(strength, chosen, lowest, error, outliers)


def _water_filling(counts, logarithms, bits, flat):
    """(rates of the classes in bits, root of the mean error of what is coded), logarithms to 2 being of deviations."""
    if bits <= 0:
        return None, 0.0
    if flat:
        rates = np.full(len(counts), bits / int(counts.sum()))
        level = (_ordered_sum(counts * (logarithms - rates))) / int(counts.sum())
        return rates, _power_of_two(level)
    order = np.argsort(-logarithms, kind="stable")
    levels = (np.cumsum(counts[order] * logarithms[order]) - bits) / np.cumsum(counts[order])
    fits = np.flatnonzero(logarithms[order] - levels >= LOWEST_RATE)
    if not len(fits):  # too little for any: all is for outliers
        return np.zeros(len(counts)), _power_of_two(float(logarithms[order[0]]))
    rates = logarithms - levels[fits[-1]]
    return np.where(rates >= LOWEST_RATE, rates, 0.0), _power_of_two(levels[fits[-1]])


def _ordered_sum(terms):
    return float(np.cumsum(terms)[-1])


def _power_of_two(exponent):
    """2^x as a double."""
    whole = math.floor(exponent)
    return math.ldexp(1 / float(_exp(np.float64(-(exponent - whole) * LOG_TWO))), whole)


def _error(found, deviations, rates, energy, magnitude, limits):
    """The modelled squared error of every class: what a real code makes of a Gaussian, and what it loses otherwise."""
    ideal = 1 / _exp(-2 * LOG_TWO * rates)
    loss = np.minimum(1.012 + rates / 8, 1.2)  # of the code against the bound, by its figures
    gain = 1 - np.minimum(loss / ideal, 1.0)
    # Signs alone make less of entries whose mean magnitude is small.
    peaked = np.clip(1 - magnitude**2 / np.maximum(energy, 1e-300) * GAUSSIAN_RMS**2, 0.0, 1.0)
    gain *= 1 - peaked * np.where(rates <= 0.6, 0.3 + 0.9 * rates, 0.25)
    parts = energy * (1 - gain)
    reaches, tails = np.array([_reach_and_tail(rate) for rate in (64 * rates).astype(np.int64).tolist()]).T
    reach = reaches * np.sqrt(energy)
    n, s1, s2 = found.beyond(np.minimum(reach, limits)) - found.beyond(limits)
    excess = s2 - 2 * reach * s1 + reach * reach * n - TAIL_SHARE * tails * energy
    parts = parts + np.where(rates > 1, EXCESS_SHARE * np.maximum(excess, 0.0), 0.0)
    return math.fsum(found.counts * parts * deviations**2)


@functools.lru_cache(4096)
def _reach_and_tail(rate):
    """The largest reproduction point for a rate in 1/64 bit, in deviations, and a Gaussian's tail beyond it."""
    levels = levels_for(rate)
    reach = int(design_at(design_index(levels, (rate + 4) // 8)).points.max()) / (1 if levels == 1 else POINT_ONE)
    place = min(2 * reach, len(GAUSSIAN_TAIL) - 1.001)
    low = int(place)
    return reach, GAUSSIAN_TAIL[low] + (place - low) * (GAUSSIAN_TAIL[low + 1] - GAUSSIAN_TAIL[low])


def _bits(found, limits, outliers):
    """About what `pack` takes for that many outliers: layers of gaps, signs, mantissas."""
    bits, universe, factor, layers = 8.0 * HEADER.size + outliers, float(found.counts.sum()), 1.0, 0
    members = outliers
    while members > 0.5 and layers < MOST_LAYERS:
        bits += 8 * LAYER.size + universe * _entropy(members / universe) + GAP_LOSS * members
        universe, factor, layers = members, 2 * factor, layers + 1
        members = math.fsum(found.counts * found.beyond(factor * limits)[0])
        bits += members
    return bits


def _entropy(share):
    """-p log2 p - (1 - p) log2(1 - p), by + - * / alone."""
    if not 0 < share < 1:
        return 0.0
    logarithms = _log(np.array([share, 1 - share]))
    return -(share * float(logarithms[0]) + (1 - share) * float(logarithms[1])) / LOG_TWO
