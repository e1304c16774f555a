"""Entries as the samples that are coded, and back: the scales before, the amplitudes and values after."""

import math

import numpy as np

from .layout import LARGEST
from .tables import MAX_LEVELS, POINT_ONE, SAMPLE_STEPS, SIGN_STEPS, design_at, power_of_two


def sample_scales(spending, variances, rates):
    """By what an entry of every coded class is multiplied to become a sample: float32.

    With several levels a standard deviation is SAMPLE_STEPS. With one, samples are in
    proportion to the log-likelihood ratio of an entry against the optimal reproduction, whose
    deviation is the root of variance less water level; their root mean square is SIGN_STEPS.
    """
    scales, power, members = [], 0.0, 0
    for c in spending.classes:
        deviation = power_of_two(int(variances[c.of_class]))
        scale = SAMPLE_STEPS / deviation
        if c.levels == 1:
            rate = int(rates[c.of_class])
            relative = math.sqrt(max(power_of_two(2 * rate) - 1.0, 0.0)) / power_of_two(rate)
            scale = relative
            power += c.count * (relative * deviation) ** 2
            members += c.count
        scales.append(scale)
    gain = SIGN_STEPS / math.sqrt(power / members) if members else 1.0
    return np.array(
        [s * gain if c.levels == 1 else s for s, c in zip(scales, spending.classes, strict=True)], np.float32
    )


def with_amplitudes(spending, scales, moments):
    """The classes with the factors of least error, from <sample, reproduction> and |reproduction|^2 in integers."""
    classes = []
    for c, scale, (dot, norm) in zip(spending.classes, scales.tolist(), moments, strict=True):
        norm = float(c.count) if c.levels == 1 else int(norm) / POINT_ONE
        amplitude = int(dot) / (scale * norm) if norm else 0.0
        relative = math.ldexp(amplitude, -spending.base)
        classes.append(c._replace(amplitude=float(np.float16(min(max(relative, 0.0), 6e4)))))
    return spending._replace(classes=classes)


def value_tables(spending):
    """What the labels of every coded class decode to: float32 [classes, 2^MAX_LEVELS]."""
    tables = np.zeros((len(spending.classes), 1 << MAX_LEVELS), np.float32)
    for table, c in zip(tables, spending.classes, strict=True):
        points = design_at(c.design).points.astype(np.float64)
        values = np.ldexp(points * c.amplitude, spending.base) / (1 if c.levels == 1 else POINT_ONE)
        table[: len(points)] = np.clip(values, -LARGEST, LARGEST)
    return tables
