"""Minus, zero or plus one scale: five trits a byte.

TernGrad (Wen et al., arXiv 1705.07878): an entry becomes plus or minus s with the probability
|x| / s, else zero, where s is the largest magnitude after clipping at 2.5 deviations. With
rounding="nearest" (ours, after Li et al., arXiv 1605.04711) entries below 3/4 of the mean magnitude
become zero, the others the mean magnitude of those others: a fifth of the error, but biased.

Bytes for n entries in B = ceil(n / bucket) buckets: 4 B (scales, float32) + ceil(n / 5) (trits)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import THREADS, ceil_div, device_kernel
from ..checks import check_bucket, check_choice, is_number, shown
from ..errors import ConfigError
from .base import Bucketed

GROUP = 320  # entries whose trits lie in 64 bytes


@dataclasses.dataclass(frozen=True)
class Ternary(Bucketed):
    """Minus, zero or plus one scale per bucket: 1.6 bits an entry.

    Args:
        rounding: "stochastic" (TernGrad) or "nearest" (least error: use error feedback).
        clip: stochastic only: magnitudes are limited to this many times the bucket's root mean square. 0: no
            limit, which is unbiased but errs far more in large buckets.
        bucket: entries that share a scale, a multiple of 64; 0: the whole tensor.

    Zeros stay zeros. A bucket with a non-finite entry decodes to NaN, one whose scale is below
    2^-126 to zero.

    >>> payload, ctx = Ternary().compress(torch.randn(1000))
    >>> payload.numel()
    204
    """

    bucket_multiple: ClassVar[int] = 64
    name: ClassVar[str] = "ternary"
    examples: ClassVar[tuple] = (
        "ternary",
        "ternary:clip=0.0,bucket=64",
        "ternary:rounding=nearest,bucket=1024",
    )
    kernels: ClassVar[tuple] = ("ternary_encode", "ternary_decode")

    rounding: str = "stochastic"
    clip: float = 2.5
    bucket: int = 0

    def __post_init__(self):
        check_choice("rounding", self.rounding, ("stochastic", "nearest"))
        if not is_number(self.clip) or not 0 <= self.clip < 1e6:
            raise ConfigError(f"clip: got {shown(self.clip)}, expected a number of root mean squares, or 0 for none")
        check_bucket(self.bucket, self.bucket_multiple)

    @property
    def unbiased(self) -> bool:
        """True of stochastic rounding, but for what `clip` cuts off; its error is too large to be fed back."""
        return self.rounding == "stochastic"

    def nbytes(self, numel: int) -> int:
        return 4 * -(-numel // self._bucket(numel)) + -(-numel // 5) if numel else 0

    def _encode_native(self, kernels, values, payload, seed):
        numel = values.numel()
        kernels.ternary_encode(
            values.data_ptr(), numel, self._bucket(numel), self.rounding == "stochastic", float(self.clip), seed,
            payload.data_ptr(),
        )  # fmt: skip

    def _decode_native(self, kernels, payload, out, add):
        kernels.ternary_decode(payload.data_ptr(), out.numel(), self._bucket(out.numel()), add, out.data_ptr())

    def _encode_reference(self, values, seed):
        numel = values.numel()
        rows = packing.rows_of(values, self._bucket(numel))
        finite = torch.isfinite(rows).all(1, keepdim=True)
        magnitudes = torch.where(finite, rows.abs(), 0.0)
        counts = packing.rows_of(torch.ones_like(values, dtype=torch.float64), rows.shape[1]).sum(1, keepdim=True)
        if self.rounding == "stochastic":
            scale = magnitudes.amax(1, keepdim=True)
            if self.clip:
                power = packing.ordered_sum(magnitudes.double().square()).unsqueeze(1)
                limit = float(self.clip) * torch.sqrt(power / counts)
                scale = torch.where(limit < scale.double(), limit, scale.double()).to(torch.float32)
            draw = packing.uniform(rows.numel(), seed, rows.device).view_as(rows) * scale
        else:
            mean = packing.ordered_sum(magnitudes.double()).unsqueeze(1) / counts
            draw = (0.75 * mean).to(torch.float32).expand_as(rows)
            kept = magnitudes > draw
            above = packing.ordered_sum(torch.where(kept, magnitudes, 0.0).double()).unsqueeze(1)
            scale = (above / kept.sum(1, keepdim=True).clamp(min=1).double()).to(torch.float32)
        scale = torch.where(scale >= packing.SMALLEST_NORMAL, scale, 0.0)
        trits = torch.where(rows.view(torch.int32) < 0, 0, 2)
        trits = torch.where((magnitudes > draw) & (scale > 0), trits, 1).view(-1)[:numel]
        scale = torch.where(finite, scale, float("nan"))
        return torch.cat([packing.float_to_bytes(scale.view(-1)), _pack_trits(trits)])

    def _decode_reference(self, payload, numel):
        bucket = self._bucket(numel)
        buckets = -(-numel // bucket)
        scale = packing.bytes_to_float(payload[: 4 * buckets]).unsqueeze(1)
        trits = _unpack_trits(payload[4 * buckets :], numel)
        return (packing.rows_of(trits.to(torch.float32) - 1, bucket) * scale).view(-1)[:numel]


def _planes(numel):
    """(first entry, entries, bytes) of the whole groups together and of the last one."""
    whole = numel // GROUP * GROUP
    if whole:
        yield 0, whole, 64
    if whole < numel:
        yield whole, numel - whole, -(-(numel - whole) // 5)


def _pack_trits(trits):
    """Trit d of byte j of a group of w bytes is entry d w + j."""
    weights = torch.tensor([[1], [3], [9], [27], [81]], device=trits.device)
    parts = [
        (packing.rows_of(trits[first : first + count], 5 * width).view(-1, 5, width) * weights).sum(1).view(-1)
        for first, count, width in _planes(trits.numel())
    ]
    return torch.cat(parts).to(torch.uint8)


def _unpack_trits(packed, numel):
    weights = torch.tensor([[1], [3], [9], [27], [81]], device=packed.device)
    parts = []
    for first, count, width in _planes(numel):
        rows = packed[first // 5 : first // 5 + -(-count // 5)].to(torch.int64).view(-1, 1, width)
        parts.append((rows // weights % 3).view(-1)[:count])
    return torch.cat(parts)


# What the GPU launches.


@device_kernel(keeps_residual=True)
def ternary_encode(gpu, x, n, bucket, stochastic, clip, seed, payload):
    stages = 1 if stochastic else 2
    extra = stochastic, float(clip)
    scales = gpu.encode_buckets("ternary", "ternary", x, n, bucket, payload, *extra, stages=stages, codes=False)
    places = x, *gpu.feedback, n, bucket, scales.data_ptr()
    blocks = ceil_div(ceil_div(n, 5), THREADS)
    gpu.launch("ternary", "ternary_trits", blocks, *places, stochastic, seed, payload)


@device_kernel
def ternary_decode(gpu, payload, n, bucket, add, out):
    blocks = ceil_div(ceil_div(n, 5), THREADS)
    gpu.launch("ternary", "ternary_decode", blocks, payload, n, bucket, add, out)
