#!/usr/bin/env python3
"""Print the levels of EDEN: the Lloyd-Max quantizers of the standard normal distribution, in units of 2^-13.

    python tools/lloyd_max.py        # the table of gcompress/compressors/eden_levels.py and docs/FORMAT.md

A level is the mean of the distribution over its cell, a cell's border is half way between levels (Max, "Quantizing
for minimum distortion", 1960). Printed are the positive levels of 2, 4, …, 256; the others are their negatives.
"""

import math

UNIT = 2**13


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tail(x):
    return math.erfc(x / math.sqrt(2)) / 2


def mean_of_cell(low, high):
    return (density(low) - density(high)) / (tail(low) - tail(high))


def border_after(low, level):
    """The upper border of the cell that begins at `low` and has its mean at `level`, by bisection; inf if none."""
    if mean_of_cell(low, math.inf) <= level:
        return math.inf
    below, above = level, level + 20.0
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if mean_of_cell(low, middle) < level else (below, middle)
    return (below + above) / 2


def levels_from(first, count):
    """Levels that follow from the first one: each next level mirrors the last at their common border."""
    levels, low = [first], 0.0
    while len(levels) < count:
        high = border_after(low, levels[-1])
        if math.isinf(high):
            return None  # the first level was too large
        levels.append(2 * high - levels[-1])
        low = high
    return levels, low


def lloyd_max(count):
    """The `count` positive levels: the first one is sought for which the last is the mean of its open cell."""
    small, large = 0.0, math.sqrt(2 / math.pi) + 1e-9
    for _ in range(200):
        first = (small + large) / 2
        found = levels_from(first, count)
        too_large = found is None or mean_of_cell(found[1], math.inf) < found[0][-1]
        small, large = (small, first) if too_large else (first, large)
    return levels_from(small, count)[0]


def main():
    for bits in range(1, 9):
        print(f"{bits}: {', '.join(str(round(UNIT * level)) for level in lloyd_max(2 ** (bits - 1)))}")


if __name__ == "__main__":
    main()
