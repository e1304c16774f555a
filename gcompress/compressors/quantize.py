"""Uniform quantization to 1 to 8 bits with a scale per bucket, bit-packed.

The min-max quantizer of QSGD's line of work (Alistarh et al., arXiv 1610.02132, sections 3
and 4: buckets), with the grid moved by at most half a step so that zero is a level: what is
exactly zero stays zero, and one byte replaces the second float of a min-max range.

Bytes for n entries in B = ceil(n / bucket) buckets:
    4 B (steps, float32) + B (the code of zero, uint8; absent for bits=1) + ceil(n bits / 8)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from ..checks import check_bucket, check_choice, check_integer
from .base import Bucketed, Section, check_scales, code_section


@dataclasses.dataclass(frozen=True)
class Quantize(Bucketed):
    """Uniform quantization to 2^bits levels, with a step and a zero per bucket.

    An entry's value is (code - zero) * step.

    Args:
        bits: bits per entry, 1 to 8. With 1 bit the two values are plus and minus the
            bucket's mean magnitude (its largest one when rounding is stochastic).
        bucket: entries that share a scale, a multiple of 8; 0: one scale for the tensor.
        rounding: "nearest" (least error, biased: use error feedback) or "stochastic"
            (unbiased; the step is up to 2^bits / (2^bits - 2) larger).

    The error of an entry is at most step / 2 (nearest) or step (stochastic) for bits >= 2,
    with step = (max(x, 0) - min(x, 0)) / (2^bits - 1). A bucket with a non-finite entry
    decodes to NaN; one whose step is below the smallest normal float32 (with 1 bit: whose
    magnitudes are below 2^-110) decodes to zero.

    >>> payload, ctx = Quantize(bits=4).compress(torch.randn(1024))
    >>> payload.numel()
    517
    """

    bucket_multiple: ClassVar[int] = 8
    name: ClassVar[str] = "quantize"
    examples: ClassVar[tuple] = (
        "quantize:bits=4",
        "quantize:bits=1",
        "quantize:bits=2,rounding=stochastic",
        "quantize:bits=1,rounding=stochastic",
        "quantize:bits=3,bucket=8",
        "quantize:bits=5,bucket=0",
        "quantize:bits=6,bucket=136",
        "quantize:bits=7",
        "quantize:bits=8,bucket=0,rounding=stochastic",
    )
    kernels: ClassVar[tuple] = ("quantize_encode", "quantize_decode")
    shown: ClassVar[tuple] = ("bits",)

    bits: int = 4
    bucket: int = 1024
    rounding: str = "nearest"

    def __post_init__(self):
        check_integer("bits", self.bits, 1, 8)
        check_bucket(self.bucket, self.bucket_multiple)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        buckets = -(-numel // self._bucket(numel))
        return buckets * (4 if self.bits == 1 else 5) + packing.packed_bytes(numel, self.bits)

    def sections(self, numel: int) -> list[Section]:
        buckets = -(-numel // self._bucket(numel))
        zeros = [] if self.bits == 1 else [Section(buckets)]
        return [Section(4 * buckets, 4, floats=True), *zeros, code_section(numel, self.bits)]

    def check(self, payload: torch.Tensor, numel: int) -> None:
        buckets = -(-numel // self._bucket(numel)) if numel else 0
        check_scales("steps hold", payload, buckets, nan=True)

    def _encode_native(self, kernels, values, payload, seed):
        kernels.quantize_encode(
            values.data_ptr(), values.numel(), self.bits, self._bucket(values.numel()),
            self.unbiased, seed, payload.data_ptr(),
        )  # fmt: skip

    def _decode_native(self, kernels, payload, out, add):
        kernels.quantize_decode(
            payload.data_ptr(), out.numel(), self.bits, self._bucket(out.numel()), add, out.data_ptr()
        )

    def _encode_reference(self, values, seed):
        numel, bucket = values.numel(), self._bucket(values.numel())
        rows = torch.nn.functional.pad(values, (0, -numel % bucket)).view(-1, bucket)
        step, zero, finite = self._grid(rows, numel)
        inverse = torch.where(step >= packing.SMALLEST_NORMAL, 1.0 / step, 0.0)
        scaled = torch.where(finite, rows, 0.0) * inverse
        dither = (
            packing.uniform(rows.numel(), seed, rows.device).view_as(rows)
            if self.unbiased
            else torch.full_like(rows, 0.5)
        )
        if self.bits == 1:
            codes = torch.floor((scaled + 0.5) + dither)
        else:
            codes = (torch.floor(scaled + dither) if self.unbiased else torch.round(scaled)) + zero
        codes = torch.where(finite, codes.clamp(0, 2**self.bits - 1), 0.0)
        packed = packing.pack_bits(codes.view(-1)[:numel].to(torch.uint8), self.bits)
        zeros = zero.view(-1).to(torch.uint8)[: 0 if self.bits == 1 else None]
        return torch.cat([packing.float_to_bytes(step.view(-1)), zeros, packed])

    def _grid(self, rows, numel):
        """Step, zero code and finiteness of every bucket, each of shape [buckets, 1]."""
        top = rows.amax(1, keepdim=True).clamp(min=0)
        bottom = rows.amin(1, keepdim=True).clamp(max=0)
        finite = torch.isfinite(top) & torch.isfinite(bottom)
        top, bottom = torch.where(finite, top, 0.0), torch.where(finite, bottom, 0.0)
        zero = torch.zeros_like(top)
        if self.bits == 1:
            half = torch.maximum(top, -bottom)
            if not self.unbiased:
                half = _mean_magnitude(rows, half, numel)
            step = torch.where(half < packing.SMALLEST_NORMAL, 0.0, (half + half).clamp(max=packing.LARGEST))
        else:
            levels = 2**self.bits - 1
            # Zero falls on a code exactly, for which stochastic rounding needs a spare level.
            spare = self.unbiased & (bottom < 0) & (top > 0)
            span = torch.where(spare, levels - 1.0, float(levels))
            step = top / span - bottom / span
            step = torch.where(step >= packing.SMALLEST_NORMAL, step, 0.0)
            inverse = torch.where(step > 0, 1.0 / step, 0.0)
            below = -bottom * inverse
            zero = (torch.ceil(below) if self.unbiased else torch.round(below)).clamp(max=levels)
        return torch.where(finite, step, float("nan")), zero, finite

    def _decode_reference(self, payload, numel):
        bucket = self._bucket(numel)
        buckets = -(-numel // bucket)
        step = packing.bytes_to_float(payload[: 4 * buckets]).view(-1, 1)
        if self.bits == 1:
            zero, packed = 0.5, payload[4 * buckets :]
        else:
            zero, packed = payload[4 * buckets : 5 * buckets].view(-1, 1), payload[5 * buckets :]
        codes = packing.unpack_bits(packed, numel, self.bits).to(torch.float32)
        rows = torch.nn.functional.pad(codes, (0, -numel % bucket)).view(-1, bucket)
        values = ((rows - zero) * step).view(-1)[:numel]
        return values.clamp_(-packing.LARGEST, packing.LARGEST)


def _mean_magnitude(rows, largest, numel):
    """Mean of |x| per bucket through 16-bit fixed point: a sum of integers has no order."""
    usable = largest >= packing.SMALLEST_FIXED
    # A tensor on both sides: torch turns scalar / tensor into a product with the reciprocal.
    to_fixed = torch.where(usable, torch.full_like(largest, 65535.0) / largest, 0.0)
    fixed = torch.where(torch.isfinite(rows), rows.abs(), 0.0) * to_fixed
    sums = torch.round(fixed).to(torch.int64).sum(1, keepdim=True)
    counts = torch.full_like(sums, rows.shape[1])
    counts[-1] = numel - rows.shape[1] * (len(rows) - 1)
    mean = sums.double() / counts.double() * (largest.double() / 65535.0)
    return torch.where(usable, mean.to(torch.float32), 0.0)


# What the GPU launches.


@device_kernel(keeps_residual=True)
def quantize_encode(gpu, x, n, bits, bucket, stochastic, seed, payload):
    stages = 2 if bits == 1 and not stochastic else 1
    gpu.encode_buckets("quantize", "quantize", x, n, bucket, payload, bits, stochastic, seed, stages=stages)


@device_kernel
def quantize_decode(gpu, payload, n, bits, bucket, add, out):
    gpu.launch("quantize", "quantize_decode", ceil_div(n, FOUR), payload, n, bits, bucket, add, out)
