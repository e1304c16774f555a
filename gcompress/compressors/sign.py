"""One bit an entry: its sign, and what a sign stands for.

`Sign` is the scaled sign of EF-SignSGD (Karimireddy et al., arXiv 1901.09847): every entry
becomes plus or minus the mean magnitude. `OneBit` is that of Seide et al. (Interspeech
2014): one mean for the entries without a minus sign, another for those with one.

Bytes for n entries in B = ceil(n / bucket) buckets:
    Sign    4 B (mean magnitudes, float32) + ceil(n / 8) (signs)
    OneBit  8 B (both means, float32) + ceil(n / 8)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from ..checks import check_bucket
from .base import Bucketed


@dataclasses.dataclass(frozen=True)
class Sign(Bucketed):
    """Signs, and the mean magnitude of each bucket.

    Args:
        bucket: entries that share a mean, a multiple of 64; 0: one mean for the tensor, as
            in the paper. Smaller buckets err less where magnitudes vary along the tensor.

    Biased, and a contraction: the mean magnitude is the scale of least error. A bucket with a
    non-finite entry decodes to NaN, one whose mean is below 2^-126 to zero.

    >>> payload, ctx = Sign().compress(torch.randn(1024))
    >>> payload.numel()
    132
    """

    bucket_multiple: ClassVar[int] = 64
    name: ClassVar[str] = "sign"
    examples: ClassVar[tuple] = (
        "sign",
        "sign:bucket=64",
        "sign:bucket=4160",
    )
    kernels: ClassVar[tuple] = ("sign_encode", "sign_decode")
    means: ClassVar[int] = 1

    bucket: int = 0

    def __post_init__(self):
        check_bucket(self.bucket, self.bucket_multiple)

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        return 4 * self.means * -(-numel // self._bucket(numel)) + packing.packed_bytes(numel, 1)

    def _encode_native(self, kernels, values, payload, seed):
        numel = values.numel()
        kernels.sign_encode(values.data_ptr(), numel, self._bucket(numel), self.means, payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        numel = out.numel()
        kernels.sign_decode(payload.data_ptr(), numel, self._bucket(numel), self.means, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        rows = packing.rows_of(values, self._bucket(values.numel()))
        minus = rows.view(torch.int32) < 0
        magnitudes = rows.abs().double()
        ones = packing.rows_of(torch.ones_like(values, dtype=torch.float64), rows.shape[1])
        groups = [ones.bool()] if self.means == 1 else [~minus, minus]
        scales = [_mean(torch.where(group, magnitudes, 0.0), torch.where(group, ones, 0.0)) for group in groups]
        packed = packing.pack_bits(minus.view(-1)[: values.numel()], 1)
        return torch.cat([packing.float_to_bytes(torch.stack(scales, 1).view(-1)), packed])

    def _decode_reference(self, payload, numel):
        bucket = self._bucket(numel)
        buckets = -(-numel // bucket)
        scales = packing.bytes_to_float(payload[: 4 * self.means * buckets]).view(buckets, self.means)
        minus = packing.unpack_bits(payload[4 * self.means * buckets :], numel, 1).bool()
        rows = packing.rows_of(minus, bucket)
        return torch.where(rows, -scales[:, -1:], scales[:, :1]).view(-1)[:numel]


@dataclasses.dataclass(frozen=True)
class OneBit(Sign):
    """Signs, and two means per bucket: of the entries without and with a minus sign.

    Args:
        bucket: entries that share their means, a multiple of 64; 0: the whole tensor. (The
            paper takes the columns of a weight matrix.)

    Biased, and a contraction; never worse than `Sign` with the same buckets, and better where
    positive and negative entries differ. A mean over a non-finite entry decodes to NaN, one
    below 2^-126 to zero.

    >>> payload, ctx = OneBit().compress(torch.randn(1024))
    >>> payload.numel()
    136
    """

    name: ClassVar[str] = "onebit"
    examples: ClassVar[tuple] = (
        "onebit",
        "onebit:bucket=0",
    )
    means: ClassVar[int] = 2

    bucket: int = 1024


def _mean(values, ones):
    """The mean of every row, float32 of shape [rows], in double precision and a fixed order."""
    counts = ones.sum(1)
    mean = (packing.ordered_sum(values) / counts.clamp(min=1.0)).to(torch.float32)
    mean = torch.where(mean >= packing.SMALLEST_NORMAL, mean, 0.0 * mean)  # 0 x non-finite is NaN
    return torch.where(torch.isfinite(mean), mean, float("nan"))


# What the GPU launches.


@device_kernel(keeps_residual=True)
def sign_encode(gpu, x, n, bucket, means, payload):
    gpu.encode_buckets("sign", "sign", x, n, bucket, payload, means)


@device_kernel
def sign_decode(gpu, payload, n, bucket, means, add, out):
    gpu.launch("sign", "sign_decode", ceil_div(n, FOUR), payload, n, bucket, means, add, out)
