"""A matrix as the product of two thin matrices of integers, and what remains of it for the polar code.

Gradients of layers are sums of a few strong outer products (Vogels et al., PowerSGD, arXiv
1905.13727): a handful of singular vectors holds most of the energy, and costs few bits because a
matrix has far fewer rows and columns than entries. They are found by subspace iteration on a
sample of the rows, rounded to steps that the water level asks for, and Rice coded.

Every product of matrices here is of integers held in doubles and stays below 2^53: it is exact, so
that any order of summation, number of threads and device give the same bytes.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
import torch

from ... import packing
from ...errors import PayloadError
from .layout import LARGEST
from .payload import SMALLEST_PAYLOAD
from .tables import LOG_TWO, _log

HEADER = struct.Struct("<IBh")  # columns, components, the smallest exponent
COMPONENT = struct.Struct("<BBB")  # exponent above the smallest; widths of the Rice codes, left and right
LENGTH = struct.Struct("<I")
MOST, MOST_OF_FEW, FEW = 32, 16, 0.4  # components; where there are so few bits for an entry
SMALLEST_MATRIX = 4096
LARGEST_MATRIX, LARGEST_SIDE = 1 << 28, 1 << 22
SAMPLE = 1 << 17  # entries
ROUNDS = 3  # of subspace iteration
MEAN_STEPS = 5  # the mean magnitude is about 2^5 steps of the integers
LARGEST_ENTRY, LARGEST_FACTOR = 1 << 17, 1 << 18
BASIS_BITS = 15
MOST_SHIFT = 10
LEAST_ERROR = 2.0**-24  # of the energy
DEPENDENT = 2.0**-24  # of a column's energy left beside the others: it adds nothing
CODE_LOSS = 0.7  # bits of a rounded factor beyond half the logarithm of its power over the water level
LARGEST_EXPONENT = 200
WIDEST = 20  # low bits of a Rice code
MOST_SHARE = 0.9  # of the bytes for the factors
LEAST_GAIN = 0.95  # to this a product must seem to lower the error, before it is made and has to do so (coding.py)
STRETCH = 1 << 14  # entries that are unpacked at a time


class Factors(NamedTuple):
    """int64 left [rows, rank] and right [columns, rank]; component j counts 2^exponents[j]."""

    left: torch.Tensor
    right: torch.Tensor
    exponents: list

    def products(self):
        """left @ right^T in parts: (rows as a slice, their float32 [some rows, columns])."""
        least = min(self.exponents)
        weights = torch.tensor([float(1 << (e - least)) for e in self.exponents], dtype=torch.float64)
        left, right = self.left.double() * weights.to(self.left.device), self.right.double().t().contiguous()
        for rows in _chunks(len(left), right.shape[1]):
            exact = (left[rows] @ right) * math.ldexp(1.0, least)
            yield rows, exact.clamp(-LARGEST, LARGEST).to(torch.float32)

    def without_weakest(self):
        return Factors(self.left[:, :-1], self.right[:, :-1], self.exponents[:-1])

    def taken_from(self, matrix):
        """What remains of a float32 [rows, columns]."""
        rest = torch.empty_like(matrix)
        for rows, product in self.products():
            torch.sub(matrix[rows], product, out=rest[rows]).clamp_(-LARGEST, LARGEST)
        return rest

    def add_to(self, matrix):
        """Add the product to a float32 [rows, columns]."""
        for rows, product in self.products():
            matrix[rows].add_(product).clamp_(-LARGEST, LARGEST)


def _chunks(rows, columns):
    step = max(1, (1 << 16) // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


# Finding -----------------------------------------------------------------------------------


def find(matrix, total, nbytes, left_over, most):
    """The Factors of least modelled error, or None.

    Args:
        matrix: float32 [rows, columns], finite, whose magnitudes sum to `total`.
        nbytes: for the factors and the rest.
        left_over: the share of its energy that a rest like the matrix errs by, from its bits.
        most: components at most, or "auto".
    """
    if not SMALLEST_MATRIX <= matrix.numel() <= LARGEST_MATRIX or max(matrix.shape) > LARGEST_SIDE:
        return None
    if most == "auto":
        most = MOST if 8 * nbytes >= FEW * matrix.numel() else MOST_OF_FEW
    if matrix.shape[0] < matrix.shape[1]:  # a sample of the longer side's members
        turned = _find(matrix.t(), total, nbytes, left_over, most)
        return turned and Factors(turned.right, turned.left, turned.exponents)
    return _find(matrix, total, nbytes, left_over, most)


def _find(matrix, total, nbytes, left_over, most):
    most = min(most, *matrix.shape)
    exponent = MEAN_STEPS - math.frexp(total / matrix.numel())[1]
    sample = _integers(matrix[:: _sampling(matrix)], exponent)
    basis = _basis(sample, most)
    powers, energy = _powers(sample @ basis), float(sample.square().sum())
    spent, water = _choose(powers, energy, sample.numel(), matrix.shape, 8 * nbytes, left_over)
    count = len(spent)
    left = _left_beyond_noise(powers[:count], energy, sample.shape, len(matrix))
    enough = LEAST_GAIN * energy * left_over(8 * nbytes)
    if not any(rest * left_over(8 * nbytes - bits) < enough for rest, bits in zip(left, spent, strict=True)):
        return None
    step = math.sqrt(12 * water)
    left = _rounded(_times(matrix, exponent, basis[:, :count]), BASIS_BITS + _octave(step))
    lengths = left.t() @ left
    products, powers = _integral(_transposed_times(matrix, exponent, left))
    right = _combined(products, _inverse(lengths.cpu().numpy()) / powers.cpu().numpy()[:, None])
    steps = [_octave(step / math.sqrt(max(power, 1.0))) for power in torch.diagonal(lengths).tolist()]
    steps = [max(step, max(steps) - MOST_SHIFT) for step in steps]
    right = torch.cat([_rounded(right[:, j : j + 1], step) for j, step in enumerate(steps)], 1)
    return Factors(left.to(torch.int64), right.to(torch.int64), [step - exponent for step in steps])


def _powers(columns):
    return packing.ordered_sum(columns.t().square() * 2.0 ** (-2 * BASIS_BITS)).tolist()


def _left_beyond_noise(powers, energy, sample_shape, rows):
    """Energy of a sample's rest after each component, if those have not taken what a sample of noise would show.

    The strongest directions of m sampled rows of noise, of length L, hold up to L + 2 sqrt(m L) times an entry's energy
    more than any directions hold of other rows (the edge of the law of Marchenko and Pastur).
    """
    members, length = sample_shape
    rest = energy
    for power in powers:
        rest = max(rest - power, 0.0)
    shown = (1 - members / rows) * (length + 2 * math.sqrt(members * length)) / (members * length)
    left = []
    for power in powers:
        energy -= max(power - rest * shown, 0.0)
        left.append(energy)
    return left


def _sampling(matrix):
    rows, columns = matrix.shape
    return max(1, rows // max(SAMPLE // columns, 4 * MOST_OF_FEW))


def _integers(entries, exponent):
    scaled = torch.round(entries * math.ldexp(1.0, exponent))
    return scaled.clamp_(-LARGEST_ENTRY, LARGEST_ENTRY).double()


def _times(matrix, exponent, basis):
    """The integer matrix times the basis."""
    return torch.cat([_integers(matrix[rows], exponent) @ basis for rows in _chunks(*matrix.shape)])


def _transposed_times(matrix, exponent, left):
    total = torch.zeros((matrix.shape[1], left.shape[1]), dtype=torch.float64, device=matrix.device)
    for rows in _chunks(*matrix.shape):
        total += _integers(matrix[rows], exponent).t() @ left[rows]
    return total


def _basis(sample, count):
    """Integers [columns, count], about orthogonal, of length 2^BASIS_BITS: the strongest right directions."""
    index = torch.arange(len(sample) * count, device=sample.device)
    left = (1 - 2 * (packing.hashed(index, 0) & 1)).double().view(len(sample), count)
    right = _orthogonal(sample.t() @ left)
    for _ in range(ROUNDS - 1):
        right = _orthogonal(sample.t() @ _orthogonal(sample @ right))
    return right


def _orthogonal(columns):
    """The columns by Gram-Schmidt, rounded to integers of length 2^BASIS_BITS; those that depend on others are 0."""
    small = _integral(columns)[0]
    weights = _whitening((small.t() @ small).cpu().numpy())
    return torch.round(_combined(small, weights) * 2.0**BASIS_BITS)


def _integral(columns):
    """(columns times a power of two each, in integers of up to 2^BASIS_BITS, the powers)."""
    largest = columns.abs().amax(0).tolist()
    powers = [math.ldexp(1.0, BASIS_BITS - math.frexp(value)[1]) for value in largest]
    powers = torch.tensor(powers, dtype=torch.float64, device=columns.device)
    return torch.round(columns * powers), powers


def _combined(integers, weights):
    """integers @ weights, the weights rounded to few enough bits that the product is exact."""
    weights, powers = _integral(torch.from_numpy(weights).to(integers.device))
    return integers @ weights / powers


def _whitening(gram):
    """The upper triangular W with W^T G W = 1 for G [k, k], columns of dependent ones 0: float64."""
    size = len(gram)
    work = np.concatenate([gram, np.eye(size)], 1)
    roots = np.zeros(size)
    for i in range(size):
        if work[i, i] <= DEPENDENT * gram[i, i]:
            work[:, i] = work[i, :] = 0.0
            continue
        roots[i] = 1.0 / math.sqrt(work[i, i])
        work[i + 1 :] -= (work[i + 1 :, i] / work[i, i])[:, None] * work[i]
    return work[:, size:].T * roots


def _inverse(gram):
    white = _whitening(gram)
    total = np.zeros_like(gram)
    for column in white.T:  # one after the other: a product of matrices may add in any order
        total += column[:, None] * column
    return total


def _rounded(columns, exponent):
    return torch.round(columns * math.ldexp(1.0, -exponent)).clamp(-LARGEST_FACTOR, LARGEST_FACTOR)


def _octave(value):
    """The whole number nearest to the logarithm of a positive double to 2."""
    mantissa, exponent = math.frexp(value)
    return exponent - (mantissa * mantissa < 0.5)


def _choose(powers, energy, numel, shape, bits, left_over):
    """The components of least modelled error: (bits of the first, of two, of all; water level, the squared error).

    Args:
        powers, energy: squares of the components and of all entries, in a sample of `numel` entries.
        shape, bits: of the whole matrix.
    """
    entries = shape[0] * shape[1]
    least = energy * left_over(bits)
    if least <= 0:
        return [], 0.0
    best, water, spent, left, worse = 0, least / numel, [8 * (HEADER.size + LENGTH.size)], energy, 0
    level = water
    for count, power in enumerate(powers, 1):
        left = max(left - power, 0.0)
        each = (_modelled_bits(power * entries / numel, side, level) for side in shape)
        spent.append(spent[-1] + (8 * COMPONENT.size + sum(each)))
        if power <= 0 or spent[-1] >= MOST_SHARE * bits:
            break
        error = left * left_over(bits - spent[-1])
        level = max(error, LEAST_ERROR * energy) / numel
        if error < least:
            best, water, least, worse = count, level, error, 0
        elif (worse := worse + 1) > 2:
            break
    return spent[1 : best + 1], water


def _modelled_bits(power, entries, water):
    """Of a factor with that many entries whose component has energy `power`."""
    ratio = power / (entries * water)
    return entries * max(float(_log(np.float64(min(max(ratio, 1e-9), 1e300)))) / (2 * LOG_TWO) + CODE_LOSS, 1.0)


# Bytes -------------------------------------------------------------------------------------


def pack(factors):
    """The section of the payload, as bytes; its length comes last.

    Rice codes, column after column: the low bits of every entry, then what is above them in unary.
    """
    least, sides = min(factors.exponents), [_folded(side) for side in (factors.left, factors.right)]
    widths = np.stack([_rice_widths(side) for side in sides], 1).tolist()
    head = HEADER.pack(len(factors.right), len(factors.exponents), least)
    for exponent, both in zip(factors.exponents, widths, strict=True):
        head += COMPONENT.pack(exponent - least, *both)
    values = torch.cat([torch.cat([side[:, j] for side in sides]) for j in range(len(widths))])
    places, width = _low_places(widths, [len(side) for side in sides], values.device)
    low = (values.unsqueeze(1) >> torch.arange(places.shape[1], device=values.device) & 1)[places]
    ends = torch.cumsum((values >> width) + 1, 0)
    unary = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=ends.device)
    unary[ends - 1] = 1
    body = torch.cat([packing.pack_bits(low, 1), packing.pack_bits(unary, 1)])
    section = head + body.cpu().numpy().tobytes()
    return section + LENGTH.pack(len(section) + LENGTH.size)


def _rice_widths(values):
    """For every column of nonnegative integers, the number of low bits with the fewest bits in all: int64."""
    most = min(int(values.max()).bit_length(), WIDEST)
    bits = [len(values) * width + (values >> width).sum(0) for width in range(most + 1)]
    return torch.stack(bits).cpu().numpy().argmin(0)


def _low_places(widths, lengths, device):
    """(bool [entries, most low bits of one], True where an entry has that bit; int64 [entries], how many it has)."""
    each = torch.tensor([width for both in widths for width in both], device=device)
    width = each.repeat_interleave(torch.tensor(lengths * len(widths), device=device))
    return torch.arange(max(1, int(each.max())), device=device) < width.unsqueeze(1), width


def unpack(payload, numel):
    """(Factors, the payload of the rest) from a uint8 tensor; PayloadError if it contradicts itself.

    Memory for entries is asked for when as many are marked: a few times what they take.
    """
    (size,) = LENGTH.unpack(bytes(payload[-LENGTH.size :].tolist()))
    if not HEADER.size + LENGTH.size <= size <= payload.numel() - SMALLEST_PAYLOAD:
        raise PayloadError(f"payload: factors of {size} bytes do not fit {payload.numel()}")
    section = payload[-size : -LENGTH.size]
    columns, count, least = HEADER.unpack(bytes(section[: HEADER.size].tolist()))
    at = HEADER.size + COMPONENT.size * count
    if not 1 <= count <= MOST or not 1 <= columns <= numel or numel % columns or section.numel() < at:
        raise PayloadError(f"payload: {count} factors of {columns} columns do not fit {numel} entries")
    components = [*COMPONENT.iter_unpack(bytes(section[HEADER.size : at].tolist()))]
    if abs(least) > LARGEST_EXPONENT or max(shift for shift, *_ in components) > MOST_SHIFT:
        raise PayloadError(f"payload: factors with exponents from {least} on, {MOST_SHIFT} above it at most")
    lengths = [numel // columns, columns]
    if count > min(lengths):
        raise PayloadError(f"payload: {count} factors of a matrix of {lengths[0]} rows and {columns} columns")
    values = _unpack_rice(section[at:], [width for _, *both in components for width in both], lengths * count)
    if max(int(values.max()), -int(values.min())) > LARGEST_FACTOR:
        raise PayloadError(f"payload: an entry of a factor beyond {LARGEST_FACTOR}")
    left, right = values.view(count, -1).split(lengths, 1)
    return Factors(left.t(), right.t(), [least + shift for shift, *_ in components]), payload[:-size].clone()


def _unpack_rice(section, widths, lengths):
    """The entries of columns of that many low bits and entries, column after column: int64."""
    bits, entries = sum(width * length for width, length in zip(widths, lengths, strict=True)), sum(lengths)
    if max(widths) > WIDEST or packing.packed_bytes(bits, 1) > section.numel():
        raise PayloadError(f"payload: {bits} low bits of factors do not fit {section.numel()} bytes")
    marks = packing.unpack_bits(section[packing.packed_bytes(bits, 1) :], 8 * section.numel() - -(-bits // 8) * 8, 1)
    if int(marks.sum()) != entries:
        raise PayloadError(f"payload: {int(marks.sum())} entries of factors, expected {entries}")
    ends = torch.nonzero(marks).view(-1)
    width = torch.tensor(widths, dtype=torch.uint8).repeat_interleave(torch.tensor(lengths)).to(section.device)
    values, before, at = torch.empty_like(ends), -1, 0
    for first in range(0, entries, STRETCH):
        part = slice(first, first + STRETCH)
        wide = width[part].to(torch.int64)
        low_ends = torch.cumsum(wide, 0) + at
        low = packing.bits_at(section, low_ends - wide, wide, WIDEST)
        above = torch.diff(ends[part], prepend=ends.new_full((1,), before)) - 1
        values[part] = _unfolded(above << wide | low)
        before, at = int(ends[part][-1]), int(low_ends[-1])
    return values


def _folded(values):
    """0, -1, 1, -2, 2 … to 0, 1, 2, 3, 4 …"""
    return torch.where(values >= 0, 2 * values, -2 * values - 1)


def _unfolded(values):
    return torch.where(values % 2 == 0, values // 2, -(values + 1) // 2)
