#!/usr/bin/env python3
"""Make gcompress/compressors/polar/designs.json: the reproduction points of the polar quantizer for every rate.

    python tools/make_polar_designs.py [--check]

For a Gaussian sample of unit variance and a rate, the Blahut-Arimoto iteration finds the 2^m
equally likely points, and the test channel to them, of least squared error (equal probability
because a linear code uses all labels equally often). Kept per design, as integers:

    rate            eighths of a bit per entry: the slope of the rate-distortion curve it is for
    levels          m, label bits; the label of the k-th point from below is k
    points          the upper half of the points, 1/4096 of the standard deviation
    log_weights     of the same points: the channel is P(k | x) ~ exp(log_weight - beta (x - point)^2)
                    with beta = 2^(2 rate) / 2, natural logarithms in 1/65536
    information     bits that every label bit carries about x, lowest first, in 1/4096

It takes about five minutes; --check makes them again and compares.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np

PATH = pathlib.Path(__file__).resolve().parent.parent / "gcompress" / "compressors" / "polar" / "designs.json"
# Label bits, and the first and last rate in eighths for which they can be the best choice.
LEVELS = {2: (4, 8), 3: (4, 12), 4: (10, 16), 5: (9, 23), 6: (20, 29), 7: (19, 36)}


def gaussian_cells(count=1000):
    """Centroids and probabilities of `count` equal cells on [-6.5, 6.5]."""
    edges = np.linspace(-6.5, 6.5, count + 1)
    mass = np.diff([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    centroids = -np.diff(density) / mass
    return (centroids - centroids[::-1]) / 2, mass / mass.sum()


def channel(samples, points, log_weights, beta):
    """P(point | sample), one row a sample."""
    exponent = log_weights - beta * (samples[:, None] - points) ** 2
    exponent -= exponent.max(1, keepdims=True)
    likelihood = np.exp(exponent)
    return likelihood / likelihood.sum(1, keepdims=True)


def equally_likely_points(samples, mass, levels, beta, iterations=4000):
    """Points and log weights of the best test channel whose outputs are equally likely."""
    count = 1 << levels
    points = np.interp((np.arange(count) + 0.5) / count, np.cumsum(mass), samples) * math.sqrt(1 - 0.5 / beta)
    log_weights = np.zeros(count)
    for _ in range(iterations):
        posterior = channel(samples, points, log_weights, beta)
        used = mass @ posterior
        log_weights -= 0.9 * np.log(used * count)
        log_weights = (log_weights + log_weights[::-1]) / 2 - log_weights.mean()
        moved = (mass * samples) @ posterior / used
        moved = (moved - moved[::-1]) / 2
        change, points = np.abs(moved - points).max(), moved
        if change < 1e-7 and np.abs(used * count - 1).max() < 1e-6:
            break
    return points, log_weights


def level_information(mass, posterior, levels):
    """Mutual information of the sample with every label bit, given the lower ones."""
    labels = np.arange(1 << levels)
    known = [0.0]
    for level in range(1, levels + 1):
        low_bits = labels % (1 << level)
        joint = np.stack([posterior[:, low_bits == value].sum(1) for value in range(1 << level)], 1)
        known.append(float((mass[:, None] * joint * np.log2(np.maximum(joint * (1 << level), 1e-300))).sum()))
    return np.diff(known)


def make_designs():
    samples, mass = gaussian_cells()
    designs = []
    for levels, (first, last) in LEVELS.items():
        for rate in range(first, last + 1):
            beta = 2.0 ** (rate / 4) / 2
            points, log_weights = equally_likely_points(samples, mass, levels, beta)
            information = level_information(mass, channel(samples, points, log_weights, beta), levels)
            half = 1 << (levels - 1)
            designs.append(
                {
                    "rate": rate,
                    "levels": levels,
                    "points": np.rint(points[half:] * 4096).astype(int).tolist(),
                    "log_weights": np.rint(log_weights[half:] * 65536).astype(int).tolist(),
                    "information": np.rint(information * 4096).astype(int).tolist(),
                }
            )
            print(f"{levels} levels at {rate / 8} bits: information {information.sum():.3f}", file=sys.stderr)
    return designs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    text = "[\n" + ",\n".join(json.dumps(design) for design in make_designs()) + "\n]\n"
    if not arguments.check:
        PATH.write_text(text)
    elif PATH.read_text() != text:
        sys.exit(f"{PATH.name} differs from what this script makes")


if __name__ == "__main__":
    main()
