"""A gradient matrix as the product of two thin ones, by one step of power iteration.

PowerSGD (Vogels et al., arXiv 1905.13727). A gradient of shape (m, …) is an m x c matrix M;
with a basis V of rank orthonormal columns, M V is sent and M is taken as (M V) V^T. What was
summed gives the next step's basis, so that the iteration goes on from step to step. With
`exchanges=1` the steps multiply from the right and from the left in turn: one all-reduce of
4 rank m or 4 rank c bytes per step. With `exchanges=2`, as published, each step does both:
a lower error for twice the bytes and two all-reduces, the second of which waits for the
first (pytorch#74148).

Bytes of a payload, which knows n but no shape and no earlier step, for an m x c matrix of
nearly equal sides, c = 2^ceil(log2(n) / 2) and m = ceil(n / c):
    4 r m + 4 r c, r = min(rank, m, c), or 4 n if that is not more
"""

import dataclasses
from typing import ClassVar

import torch

from .. import backends, packing
from ..backends.gpu.plans import THREADS, ceil_div, device_kernel
from ..checks import check_choice, check_integer
from .base import Compressor, Section, SumRounds

DEPENDENT = 1e-5  # a column that keeps less of its length beside the others counts as dependent


@dataclasses.dataclass(frozen=True)
class LowRank(Compressor):
    """A matrix as the product of two thin ones (PowerSGD).

    Args:
        rank: columns of each factor, at least 1.
        exchanges: all-reduces per step, 1 or 2; see above.

    Biased, a projection (its error is at most that of sending nothing): use error feedback. A
    gradient for which the factors would not be smaller is sent as it is. The basis survives
    zero gradients (columns without a direction are drawn anew) and steps that are not finite.
    Summed, bytes differ from those of a payload: shape and memory are known there.

    >>> matrix = torch.randn(1024, 2) @ torch.randn(2, 1024)
    >>> payload, ctx = LowRank(rank=2).compress(matrix)
    >>> payload.numel(), bool((LowRank(rank=2).decompress(payload, ctx) - matrix).norm() < 1e-3 * matrix.norm())
    (16384, True)
    """

    name: ClassVar[str] = "lowrank"
    examples: ClassVar[tuple] = (
        "lowrank:rank=4",
        "lowrank:rank=1",
    )
    kernels: ClassVar[tuple] = ("lowrank_decode",)
    shown: ClassVar[tuple] = ("rank",)
    summable: ClassVar[bool] = True

    rank: int = 4
    exchanges: int = 1

    def __post_init__(self):
        check_integer("rank", self.rank, 1)
        check_choice("exchanges", self.exchanges, (1, 2))

    def nbytes(self, numel: int) -> int:
        rows, columns, rank = self._sides(numel, near_square(numel))
        return 4 * rank * (rows + columns) if rank else 4 * numel

    def sections(self, numel: int) -> list[Section]:
        return [Section(self.nbytes(numel), 4, floats=True)]

    def _sides(self, numel, sides):
        """(rows, columns, rank); rank 0 where factors would not be smaller."""
        rows, columns = sides
        rank = min(self.rank, rows, columns)
        return rows, columns, rank if rank * (rows + columns) < numel else 0

    def summed_nbytes(self, shape: torch.Size, world_size: int) -> int:
        """With one exchange per step, the mean of two steps, rounded up."""
        rows, columns, rank = self._sides(shape.numel(), matrix_sides(shape))
        if not rank:
            return 4 * shape.numel()
        return 4 * rank * (rows + columns) if self.exchanges == 2 else 2 * rank * (rows + columns)

    def sum_rounds(
        self, values: torch.Tensor, *, shape: torch.Size, seed: int, world_size: int, memory: dict
    ) -> SumRounds:
        rows, columns, rank = self._sides(values.numel(), matrix_sides(shape))
        if not rank:
            total = yield values.clone(), "sum"
            return total, values.clone()
        matrix = as_matrix(values, rows, columns)
        basis, left = memory.get("basis"), memory.get("left", False)
        if basis is None or basis.shape != (rows if left else columns, rank):
            basis, left = orthonormal(torch.zeros(columns, rank, device=values.device), seed), False
        for number in range(self.exchanges):
            # One basis spans the columns of the matrix and multiplies from the left, the next its rows.
            own = _sendable((matrix.t() if left else matrix) @ basis.double(), world_size)
            summed = yield own, "sum"
            if number + 1 < self.exchanges:
                basis, left = orthonormal(summed, seed), not left
        memory["basis"], memory["left"] = orthonormal(summed, seed), not left
        both = [(basis, part.t()) if left else (part, basis.t()) for part in (summed, own)]
        total, own = (product(left_side, right_side, values.numel()) for left_side, right_side in both)
        return total, own

    def _encode_native(self, kernels, values, payload, seed):
        payload.copy_(self._encode_reference(values, seed))

    def _encode_reference(self, values, seed):
        rows, columns, rank = self._sides(values.numel(), near_square(values.numel()))
        if not rank:
            return packing.float_to_bytes(values).clone()  # not the values' own memory
        # A power of two keeps sums of the largest and the smallest floats in range, and rounds nothing.
        exponent = torch.frexp(values.abs().max()).exponent.clamp(-100, 127)
        matrix = torch.ldexp(as_matrix(values, rows, columns), -exponent)
        basis = orthonormal(
            (matrix @ orthonormal(torch.zeros(columns, rank, device=values.device), seed).double()), seed
        )
        right = (matrix.t() @ basis.double()).float().t()
        both = torch.cat([factor.reshape(-1) for factor in (torch.ldexp(basis, exponent), right)])
        return packing.float_to_bytes(both.masked_fill_(both.isnan(), float("nan")))  # of one pattern everywhere

    def _decode_native(self, kernels, payload, out, add):
        self._decode(payload, out, add)

    def _decode_reference(self, payload, numel):
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self._decode(payload, out, False)
        return out

    def _decode(self, payload, out, add):
        rows, columns, rank = self._sides(out.numel(), near_square(out.numel()))
        floats = packing.bytes_to_float(payload)
        if rank:
            floats = product(
                floats[: rows * rank].view(rows, rank), floats[rows * rank :].view(rank, columns), out.numel()
            )
        out.add_(floats) if add else out.copy_(floats)


def _sendable(columns, world_size):
    """A float64 product as float32 whose sum over ranks is finite where the product is."""
    limit = packing.share_of_largest(world_size)
    return torch.where(columns.isinf(), columns, columns.clamp(-limit, limit)).float()


def near_square(numel):
    """(rows, columns) of a matrix that holds numel entries, its columns a power of two."""
    columns = 1 << ((max(numel - 1, 1)).bit_length() + 1) // 2
    return -(-numel // columns), columns


def matrix_sides(shape):
    """(rows, columns) of a gradient: the first dimension against the others; one alone is folded."""
    if len(shape) < 2 or shape[0] <= 1 or shape[0] == shape.numel():
        return near_square(shape.numel())
    return shape[0], shape.numel() // shape[0]


def as_matrix(values, rows, columns):
    """A float64 matrix of 1-D float32 values, zeros behind them: its sums round to the same float32 everywhere."""
    return torch.nn.functional.pad(values.double(), (0, rows * columns - values.numel())).view(rows, columns)


def orthonormal(matrix, seed):
    """An orthonormal basis, float32, of the space of a thin matrix's columns, by Gram and Schmidt, twice.

    Columns that depend on those before them, zeros among them, are replaced by random ones, the same
    for the same seed. A matrix that is not finite is returned as it is.
    """
    if not bool(torch.isfinite(matrix).all()):
        return matrix.float()
    basis = matrix.double().clone()
    for k in range(basis.shape[1]):
        index = torch.arange(basis.shape[0], device=basis.device) + k * basis.shape[0]
        drawn = packing.hashed(index & 0xFFFFFFFF, seed).double() * 2.0**-32 - 0.5
        for column in (basis[:, k], drawn):
            length = float(column.norm())
            column = column / (length or 1.0)
            for _ in range(2):
                column = column - basis[:, :k] @ (basis[:, :k].t() @ column)
            if float(column.norm()) > DEPENDENT:
                break
        basis[:, k] = column / column.norm()
    return basis.float()


def product(left, right, numel):
    """The first numel entries of left @ right, float32, added in the order of the rank: the same bits everywhere.

    Entries whose sum is not finite are added up in double precision; what is beyond float32 becomes its largest.
    """
    left, right = left.contiguous(), right.contiguous()
    out = torch.empty(numel, dtype=torch.float32, device=left.device)
    kernels = backends.kernels(left, LowRank)
    if kernels:
        rows, rank = left.shape
        kernels.lowrank_decode(
            left.data_ptr(), right.data_ptr(), rows, right.shape[1], rank, numel, False, out.data_ptr()
        )
        return out
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k]
    overflowed = ~total.isfinite()
    if bool(overflowed.any()):
        wide = torch.zeros(total.shape, dtype=torch.float64, device=left.device)
        for k in range(left.shape[1]):
            wide += left[:, k : k + 1].double() * right[k].double()
        total = torch.where(overflowed, packing.to_type(wide, torch.float32), total)
    return out.copy_(total.view(-1)[:numel])


# What the GPU launches.


@device_kernel
def lowrank_decode(gpu, left, right, rows, columns, rank, n, add, out):
    gpu.launch("shared", "lowrank_decode", ceil_div(n, THREADS), left, right, columns, rank, n, add, out)
