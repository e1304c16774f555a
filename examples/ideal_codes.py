"""What other quantizers would reach at best, and what no quantizer can: for polar_rate_distortion.py.

Every function takes a numpy float64 array and gives normalised mean squared errors (NMSE), sum of
(x - decoded)^2 over sum of x^2. "Ideal" means that a code's bytes are taken to be its entropy:
no real coder gets below it, and tables of probabilities are free.
"""

import math

import numpy as np

# Least squared error of 2^b levels on N(0, 1): Max, "Quantizing for minimum distortion", 1960.
LLOYD_MAX = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499)
ROUNDINGS = (0.5, 0.6, 0.75, 1.0)  # by how much of a step an entry must pass a level to go to the next one


def gaussian_bound(rate):
    """The rate-distortion function of a Gaussian source: no code of `rate` bits per entry errs less."""
    return 2.0 ** (-2 * rate)


def lloyd_max_rotated(rate):
    """EDEN (Vargaftik et al., ICML 2022): a random rotation makes entries Gaussian, then Lloyd-Max levels.

    Between whole numbers of bits a share of the entries gets one bit more; below one bit only a
    share of them is sent. The scale's bytes are not charged.
    """
    bits = min(int(rate), len(LLOYD_MAX) - 2)
    return LLOYD_MAX[bits] + (rate - bits) * (LLOYD_MAX[bits + 1] - LLOYD_MAX[bits])


def _lower_hull(points):
    """The lower convex hull of (rate, error) pairs, by rate: codes may share their time."""
    hull = []
    for rate, error in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (rate - hull[-2][0]) >= (error - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((rate, error))
    return hull


def _at(points, rates):
    hull = _lower_hull(points)
    return np.interp(rates, [rate for rate, _ in hull], [error for _, error in hull])


def _entropy_bits(counts):
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def scalar(x, rates, classes=None):
    """Uniform scalar quantizer with a dead zone, centroids for levels and ideal entropy coding.

    Args:
        rates: bits per entry.
        classes: integer per entry that the entropy coder knows too (levels are common to all), or None.
    """
    magnitude, total = np.abs(x), float(x @ x)
    deviation = math.sqrt(total / x.size)
    classes = np.zeros(x.size, np.int64) if classes is None else classes
    points = [(0.0, 1.0)]
    for rounding in ROUNDINGS:
        for step in deviation * 2.0 ** np.arange(-2.5, 6, 0.25):
            level = np.minimum(np.floor(magnitude / step + (1 - rounding)), 2047)
            level = (np.copysign(level, x) + 2047).astype(np.int64)
            counts, sums = np.bincount(level), np.bincount(level, x)
            error = 1 - float((sums[counts > 0] ** 2 / counts[counts > 0]).sum()) / total
            joint = np.bincount(classes * 4096 + level).astype(float)
            bits = _entropy_bits(joint) - _entropy_bits(np.bincount(classes).astype(float))
            points.append((bits / x.size, error))
    return _at(points, rates)


def scale_classes(matrix):
    """Codes of a quarter octave for the mean magnitudes of rows and columns: (class per entry, bits of all codes)."""
    magnitude, classes, bits = np.abs(matrix), 0, 0
    for axis in (1, 0):
        means = magnitude.mean(axis, keepdims=True)
        codes = np.rint(4 * np.log2(np.maximum(means, 1e-300) / means.max()))
        codes = np.maximum(codes, -62).astype(np.int64) + 62
        bits += codes.size * int(codes.max() - codes.min() + 1).bit_length()
        classes = classes + codes
    classes = np.broadcast_to(classes, matrix.shape)
    return (classes // 2).ravel(), bits


def scalar_with_scales(matrix, rates):
    """`scalar` that knows row and column scales as Polar does and pays for them; without them where that is less."""
    classes, bits = scale_classes(matrix)
    side = bits / matrix.size
    x = matrix.ravel()
    charged = scalar(x, np.maximum(np.array(rates) - side, 0), classes)
    return np.minimum(charged, scalar(x, rates))


def top_k(x, rates):
    """Top-k with ideal index coding; kept magnitudes in 0 to 6 bits of Lloyd-Max levels of their own, and a sign."""
    magnitude = np.sort(np.abs(x))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(magnitude)])
    squares = np.concatenate([[0.0], np.cumsum(magnitude**2)])
    points = [(0.0, 1.0)]
    for share in 2.0 ** np.arange(-14, 0.01, 0.25):
        k = max(1, min(x.size, round(share * x.size)))
        index = _entropy_bits(np.array([k, x.size - k], float)) / x.size
        for bits in range(7):
            explained = _explained(magnitude[:k], sums, 1 << bits)
            points.append((index + k * (1 + bits) / x.size, 1 - explained / squares[-1]))
    return _at(points, rates)


def low_rank(matrix, rates):
    """The best product of thin matrices (what PowerSGD, Vogels et al., 2019, approaches), in 16 bits an entry of them.

    Rounding those costs nothing here. NMSE for every rate.
    """
    powers = np.linalg.svd(matrix, compute_uv=False) ** 2
    left = 1 - np.concatenate([[0.0], np.cumsum(powers)]) / powers.sum()
    ranks = [int(rate * matrix.size / (16 * sum(matrix.shape))) for rate in rates]
    return [float(left[min(rank, len(powers))]) for rank in ranks]


def _explained(falling, sums, levels, iterations=25):
    """The sum over cells of (sum of members)^2 / count for Lloyd-Max levels of a falling sequence."""
    k = len(falling)
    edges = np.unique(np.rint(np.linspace(0, k, levels + 1)).astype(np.int64))
    rising = -falling
    for _ in range(iterations):
        means = np.diff(sums[edges]) / np.diff(edges)
        inner = np.searchsorted(rising, -(means[1:] + means[:-1]) / 2)
        edges = np.unique(np.concatenate([[0], inner, [k]]))
    return float((np.diff(sums[edges]) ** 2 / np.diff(edges)).sum())


# Trellis-coded quantization ------------------------------------------------------------------


class Trellis:
    """A trellis code on Gaussian samples: 2^8 states, a state being the last 8 bits sent.

    A branch is a state and `bits` new ones; its `size` reproduction values are trained by the
    generalised Lloyd iteration (Stewart, Gray and Linde, IEEE Trans. Comm. 1982). The encoder is
    the Viterbi algorithm, on many sequences at once; each starts at state 0.
    """

    STATES = 256

    def __init__(self, bits, size, seed=0):
        self.bits, self.size = bits, size
        generator = np.random.default_rng(seed)
        self.table = 0.8 * generator.standard_normal((self.STATES << bits, size)).astype(np.float32)

    @property
    def rate(self):
        return self.bits / self.size

    def train(self, samples, iterations):
        """Improve the table on float32 [sequences, steps, size]."""
        for _ in range(iterations):
            branches = self.encode(samples).ravel()
            counts = np.bincount(branches, minlength=len(self.table))
            for k in range(self.size):
                sums = np.bincount(branches, samples[:, :, k].ravel(), minlength=len(self.table))
                self.table[:, k] = np.where(counts > 0, sums / np.maximum(counts, 1), self.table[:, k])

    def encode(self, samples):
        """The branches of least squared error, int32 [sequences, steps], of float32 [sequences, steps, size]."""
        sequences, steps, _ = samples.shape
        ways = 1 << self.bits  # into a state: the bit or bits that it forgot
        cost = np.full((sequences, self.STATES), 1e9, np.float32)
        cost[:, 0] = 0
        back = np.empty((steps, sequences, self.STATES), np.uint8)
        # Branch b = (forgotten bits, new state): it comes from state b >> bits.
        norms = (self.table**2).sum(1)
        for step in range(steps):
            branch = norms - 2 * samples[:, step] @ self.table.T + np.repeat(cost, ways, axis=1)
            branch = branch.reshape(sequences, ways, self.STATES)
            back[step] = branch.argmin(1)
            cost = branch.min(1)
        state = cost.argmin(1)
        path, rows = np.empty((sequences, steps), np.int32), np.arange(sequences)
        for step in reversed(range(steps)):
            path[:, step] = back[step, rows, state].astype(np.int32) * self.STATES + state
            state = path[:, step] >> self.bits
        return path

    def error(self, samples):
        """The NMSE of float32 [sequences, steps, size]."""
        difference = self.table[self.encode(samples)] - samples
        return float((difference.astype(np.float64) ** 2).sum() / (samples.astype(np.float64) ** 2).sum())


# Bounds ----------------------------------------------------------------------------------------


def memoryless_bound(x, rates, cells=400):
    """The rate-distortion function (Blahut, Arimoto) of a memoryless source that has the histogram of x."""
    deviation = math.sqrt(float(x @ x) / x.size)
    compressed = np.arcsinh(4 * x / deviation)  # finer cells where most entries are
    edges = np.linspace(compressed.min(), compressed.max(), cells + 1)[1:-1]
    cell = np.searchsorted(edges, compressed)
    counts = np.bincount(cell, minlength=cells)
    centres = np.bincount(cell, x, cells)[counts > 0] / counts[counts > 0] / deviation
    mass = counts[counts > 0] / x.size
    within = 1 - float(mass @ centres**2)  # what cells hide; it is sent by nobody
    points = [(0.0, 1.0)]
    distance = (centres[:, None] - centres) ** 2
    for slope in 2.0 ** np.arange(-8, 8.5, 0.5):
        kernel, used = np.exp(-slope * distance), np.full(len(centres), 1 / len(centres))
        for _ in range(400):
            used = used * (mass / (kernel @ used) @ kernel)
        reached = kernel @ used
        error = float((mass / reached) @ ((kernel * distance) @ used))
        nats = -float(mass @ np.log(reached)) - slope * error
        points.append((nats / math.log(2), error + within))
    # Convex in between: interpolation of the logarithm hardly differs at this density of slopes.
    return np.exp(np.interp(rates, *zip(*sorted((r, math.log(e)) for r, e in points if r >= 0), strict=True)))


def bound_given_scales(matrix, rate):
    """Reverse water-filling over Gaussian entries, variances being products of row's and column's; scales are free."""
    square = matrix**2
    variance = (square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / max(square.mean(), 1e-300)).ravel()
    variance = np.sort(variance[variance > 0])[::-1]
    half_logs = np.log2(variance) / 2
    members = np.arange(1, len(variance) + 1)
    levels = (np.cumsum(half_logs) - rate * matrix.size) / members
    water = 4 ** levels[np.flatnonzero(half_logs > levels)[-1]]
    return float(np.minimum(variance, water).sum() / variance.sum())
