"""Random rounding to multiples of a part of the norm.

QSGD (Alistarh et al., arXiv 1610.02132), with buckets (section 4) and codes of a fixed number of
bits: a sign and one of s = 2^(bits - 1) - 1 levels, a zero besides.

Bytes for n entries in B = ceil(n / bucket) buckets: 4 B (steps, float32) + ceil(n bits / 8)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from ..checks import check_bucket, check_choice, check_integer
from .base import Bucketed

LARGEST_NORM = 3.4e38  # s steps of it stay finite


@dataclasses.dataclass(frozen=True)
class QSGD(Bucketed):
    """Every entry rounded at random to a multiple of its bucket's norm / s, the next lower or higher.

    Args:
        bits: bits per entry, 2 to 8.
        bucket: entries that share a norm, a multiple of 64; 0: one norm for the tensor.
        norm: "l2" (the paper's, whose payload has many zeros) or "max" (the error is smaller).

    Zeros stay zeros. A bucket with a non-finite entry decodes to NaN, one whose step is below
    2^-126 to zero.

    >>> payload, ctx = QSGD(bits=4).compress(torch.randn(1024))
    >>> payload.numel()
    520
    """

    bucket_multiple: ClassVar[int] = 64
    name: ClassVar[str] = "qsgd"
    examples: ClassVar[tuple] = (
        "qsgd:bits=4",
        "qsgd:bits=2,bucket=0",
        "qsgd:bits=8,bucket=64,norm=max",
    )
    kernels: ClassVar[tuple] = ("qsgd_encode", "qsgd_decode")
    shown: ClassVar[tuple] = ("bits",)

    bits: int = 4
    bucket: int = 512
    norm: str = "l2"

    def __post_init__(self):
        check_integer("bits", self.bits, 2, 8)
        check_bucket(self.bucket, self.bucket_multiple)
        check_choice("norm", self.norm, ("l2", "max"))

    @property
    def unbiased(self) -> bool:
        return True

    def nbytes(self, numel: int) -> int:
        return 4 * -(-numel // self._bucket(numel)) + packing.packed_bytes(numel, self.bits) if numel else 0

    def _encode_native(self, kernels, values, payload, seed):
        numel = values.numel()
        kernels.qsgd_encode(
            values.data_ptr(), numel, self.bits, self._bucket(numel), self.norm == "max", seed, payload.data_ptr()
        )

    def _decode_native(self, kernels, payload, out, add):
        numel = out.numel()
        kernels.qsgd_decode(payload.data_ptr(), numel, self.bits, self._bucket(numel), add, out.data_ptr())

    def _encode_reference(self, values, seed):
        numel, levels = values.numel(), 2 ** (self.bits - 1) - 1
        rows = packing.rows_of(values, self._bucket(numel))
        if self.norm == "max":
            norm = rows.abs().amax(1)
        else:
            norm = torch.sqrt(packing.ordered_sum(rows.double().square())).to(torch.float32)
        finite = torch.isfinite(rows).all(1)
        norm = norm.clamp(max=LARGEST_NORM)
        step = norm / levels
        usable = finite & (step >= packing.SMALLEST_NORMAL)
        inverse = torch.where(usable, torch.full_like(norm, float(levels)) / norm, 0.0).unsqueeze(1)
        scaled = torch.where(finite.unsqueeze(1), rows.abs(), 0.0) * inverse
        magnitude = torch.floor(scaled + packing.uniform(rows.numel(), seed, rows.device).view_as(rows))
        magnitude = magnitude.clamp(max=levels).to(torch.int32)
        codes = levels + torch.where(rows.view(torch.int32) < 0, -magnitude, magnitude)
        step = torch.where(finite, torch.where(usable, step, 0.0), float("nan"))
        packed = packing.pack_bits(codes.view(-1)[:numel].to(torch.uint8), self.bits)
        return torch.cat([packing.float_to_bytes(step), packed])

    def _decode_reference(self, payload, numel):
        bucket, levels = self._bucket(numel), 2 ** (self.bits - 1) - 1
        buckets = -(-numel // bucket)
        step = packing.bytes_to_float(payload[: 4 * buckets]).unsqueeze(1)
        codes = packing.unpack_bits(payload[4 * buckets :], numel, self.bits).to(torch.int32) - levels
        return (packing.rows_of(codes.to(torch.float32), bucket) * step).view(-1)[:numel]


# What the GPU launches.


@device_kernel(keeps_residual=True)
def qsgd_encode(gpu, x, n, bits, bucket, largest_norm, seed, payload):
    gpu.encode_buckets("qsgd", "qsgd", x, n, bucket, payload, bits, largest_norm, seed)


@device_kernel
def qsgd_decode(gpu, payload, n, bits, bucket, add, out):
    gpu.launch("qsgd", "qsgd_decode", ceil_div(n, FOUR), payload, n, bits, bucket, add, out)
