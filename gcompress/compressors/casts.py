"""Casts to 16, 8 and 4 bit floats, with a power of two for every bucket where the range is small.

The mean over ranks is taken in float32 after decoding, so that neither the sum nor a single
large entry overflows. FP16 is IEEE binary16, BF16 the upper half of binary32, FP8 is E4M3
of the OCP 8-bit floating point specification (Micikevicius et al., arXiv 2209.05433), MXFP4
is E2M1 with a shared power of two of the OCP microscaling formats (Rouhani et al., arXiv
2310.10537).

Bytes for n entries in B = ceil(n / bucket) buckets (a scale is one byte, E8M0):
    BF16 2 n;   FP16 B + 2 n;   FP8 B + n;   MXFP4 B + ceil(n / 2)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from ..checks import check_bucket, check_choice
from .base import Bucketed, Compressor

# Below it the largest magnitude of a bucket is not scaled up further: both factors stay normal numbers.
SMALLEST_EXPONENT = 15
CAST_NAMES = ("fp16", "fp8", "mxfp4")  # by form


class _Cast(Bucketed):
    """A float of `width` bits: a sign, an exponent with `bias`, `mantissa` bits; rounded to nearest, ties to even.

    Class variables besides: `largest`, the code of the largest finite magnitude; `target`, the
    power of two to which the bucket's largest magnitude is brought; `carry`, which added to that
    magnitude's bit pattern decides where its exponent counts as the next one.
    """

    bucket_multiple: ClassVar[int] = 64
    kernels: ClassVar[tuple] = ("cast_encode", "cast_decode")
    form: ClassVar[int]
    width: ClassVar[int]
    mantissa: ClassVar[int]
    bias: ClassVar[int]
    largest: ClassVar[int]
    target: ClassVar[int]
    carry: ClassVar[int] = 0

    def nbytes(self, numel: int) -> int:
        return -(-numel // self._bucket(numel)) + packing.packed_bytes(numel, self.width) if numel else 0

    def _encode_native(self, kernels, values, payload, seed):
        numel = values.numel()
        kernels.cast_encode(values.data_ptr(), numel, self.form, self._bucket(numel), payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        numel = out.numel()
        kernels.cast_decode(payload.data_ptr(), numel, self.form, self._bucket(numel), add, out.data_ptr())

    def _encode_reference(self, values, seed):
        rows = packing.rows_of(values, self._bucket(values.numel()))
        keys = packing.magnitude_keys(rows)
        finite = keys < packing.INFINITY_KEY
        exponent = (torch.where(finite, keys, 0).amax(1, keepdim=True) + self.carry) >> 23
        scale = exponent.clamp(min=SMALLEST_EXPONENT) - self.target
        factor = ((254 - scale) << 23).view(torch.float32)
        # No more than the largest code that does not decode to infinity.
        top = (((255 - scale + self.bias) << self.mantissa) - 1).clamp(max=self.largest)
        codes = self._to_codes(rows * factor, top).view(-1)[: values.numel()]
        if self.form == MXFP4.form:  # which has no code for what is not finite
            scale = torch.where(finite.all(1, keepdim=True), scale, 255)
        packed = packing.pack_bits(codes, 4) if self.width == 4 else _integer_bytes(codes, self.width)
        return torch.cat([scale.view(-1).to(torch.uint8), packed])

    def _to_codes(self, scaled, top):
        """int64 codes of float32 magnitudes and signs; what is not finite by the format's own codes, if any."""
        keys = packing.magnitude_keys(scaled).to(torch.int64)
        shift = 23 - self.mantissa
        rounded = (keys + (1 << (shift - 1)) - 1 + ((keys >> shift) & 1)) >> shift
        normal = rounded - ((127 - self.bias) << self.mantissa)
        small = torch.round(scaled.abs() * 2.0 ** (self.bias - 1 + self.mantissa)).to(torch.int64)
        codes = torch.where(keys < (128 - self.bias) << 23, small, normal)
        codes = torch.minimum(codes, torch.where(keys < packing.INFINITY_KEY, top, self.largest))
        if self.form == FP16.form:
            codes = torch.where(keys == packing.INFINITY_KEY, 0x7C00, codes)
            codes = torch.where(keys > packing.INFINITY_KEY, 0x7E00, codes)
        elif self.form == FP8.form:
            codes = torch.where(keys >= packing.INFINITY_KEY, 0x7F, codes)
        return codes | (scaled.view(torch.int32) < 0).to(torch.int64) << (self.width - 1)

    def _decode_reference(self, payload, numel):
        bucket = self._bucket(numel)
        buckets = -(-numel // bucket)
        scale, packed = payload[:buckets].to(torch.int32).view(-1, 1), payload[buckets:]
        factor = torch.where(scale == 255, float("nan"), (scale << 23).view(torch.float32))
        codes = packing.unpack_bits(packed, numel, 4) if self.width == 4 else _bytes_integer(packed, self.width)
        values = packing.rows_of(self._from_codes(codes.to(torch.int64)), bucket)
        return (values * factor).view(-1)[:numel]

    def _from_codes(self, codes):
        """float32 values of int64 codes."""
        magnitude = codes & ((1 << (self.width - 1)) - 1)
        normal = (magnitude << (23 - self.mantissa)) + ((127 - self.bias) << 23)
        if self.form == FP16.form:
            normal = torch.where(magnitude >= 0x7C00, normal + (112 << 23), normal)
        elif self.form == FP8.form:
            normal = torch.where(magnitude == 0x7F, 0x7FC00000, normal)
        small = magnitude.to(torch.float32) * 2.0 ** (1 - self.bias - self.mantissa)
        values = torch.where(magnitude < 1 << self.mantissa, small, normal.to(torch.int32).view(torch.float32))
        return torch.where(codes >> (self.width - 1) == 1, -values, values)


def _integer_bytes(codes, width):
    """int64 codes of 8 or 16 bits to little-endian bytes."""
    return torch.stack([(codes >> shift) & 255 for shift in range(0, width, 8)], 1).view(-1).to(torch.uint8)


def _bytes_integer(packed, width):
    columns = packed.view(-1, width // 8).to(torch.int64)
    return sum(columns[:, byte] << 8 * byte for byte in range(width // 8))


@dataclasses.dataclass(frozen=True)
class FP16(_Cast):
    """IEEE half precision behind a power of two per bucket, so that nothing overflows or underflows.

    Args:
        bucket: entries that share a power of two, a multiple of 64; 0: the whole tensor.

    Relative error at most 2^-11 down to 2^-28 of the bucket's largest magnitude. Not-a-number and
    infinity stay what they are. Biased (rounds to nearest), a contraction.

    >>> tensor = torch.tensor([1e5, 1e-9, -3e38])
    >>> payload, ctx = FP16(bucket=64).compress(tensor)
    >>> payload.numel(), FP16().decompress(payload, ctx)[2].item() == -3e38
    (7, False)
    """

    name: ClassVar[str] = "fp16"
    examples: ClassVar[tuple] = (
        "fp16",
        "fp16:bucket=0",
    )
    shown: ClassVar[tuple] = ("bucket",)
    form: ClassVar[int] = 0
    width: ClassVar[int] = 16
    mantissa: ClassVar[int] = 10
    bias: ClassVar[int] = 15
    largest: ClassVar[int] = 0x7BFF
    target: ClassVar[int] = 14

    bucket: int = 1024

    def __post_init__(self):
        check_bucket(self.bucket, self.bucket_multiple)


@dataclasses.dataclass(frozen=True)
class FP8(_Cast):
    """8-bit floats (E4M3) behind a power of two per bucket.

    Args:
        bucket: entries that share a power of two, a multiple of 64; 0: the whole tensor.

    Relative error at most 2^-4 down to 2^-13 of the bucket's largest magnitude. An entry that is
    not finite decodes to NaN. Biased (rounds to nearest), a contraction.

    >>> payload, ctx = FP8().compress(torch.randn(1024))
    >>> payload.numel()
    1025
    """

    name: ClassVar[str] = "fp8"
    examples: ClassVar[tuple] = (
        "fp8",
        "fp8:bucket=64",
    )
    form: ClassVar[int] = 1
    width: ClassVar[int] = 8
    mantissa: ClassVar[int] = 3
    bias: ClassVar[int] = 7
    largest: ClassVar[int] = 0x7E
    target: ClassVar[int] = 7

    bucket: int = 1024

    def __post_init__(self):
        check_bucket(self.bucket, self.bucket_multiple)


@dataclasses.dataclass(frozen=True)
class MXFP4(_Cast):
    """4-bit floats (E2M1) that share a power of two in blocks of 32 (block floating point).

    Args:
        bucket: entries that share a power of two: 16, 32 or 64.

    The OCP format takes the power of two by the largest magnitude's exponent. Here it is the next
    one if that magnitude would come above 7.25; the largest code is 6. This errs less, and any
    MXFP4 decoder reads it. A block with an entry that is not finite decodes to NaN. Biased
    (rounds to nearest), a contraction.

    >>> payload, ctx = MXFP4().compress(torch.randn(1024))
    >>> payload.numel()
    544
    """

    name: ClassVar[str] = "mxfp4"
    examples: ClassVar[tuple] = (
        "mxfp4",
        "mxfp4:bucket=16",
    )
    form: ClassVar[int] = 2
    width: ClassVar[int] = 4
    mantissa: ClassVar[int] = 1
    bias: ClassVar[int] = 1
    largest: ClassVar[int] = 7
    target: ClassVar[int] = 2
    carry: ClassVar[int] = 0x17FFFF

    bucket: int = 32

    def __post_init__(self):
        check_choice("bucket", self.bucket, (16, 32, 64))


@dataclasses.dataclass(frozen=True)
class BF16(Compressor):
    """The upper half of every float32 (bfloat16): its range, with 8 bits of precision.

    Args:
        rounding: "nearest" (ties to even; biased, a contraction) or "stochastic" (unbiased: the
            nearer neighbour is the likelier one; the error is up to twice as large).

    Saturating: what is finite stays finite. Not-a-number and infinity stay what they are.

    >>> payload, ctx = BF16().compress(torch.randn(1024))
    >>> payload.numel()
    2048
    """

    name: ClassVar[str] = "bf16"
    examples: ClassVar[tuple] = ("bf16", "bf16:rounding=stochastic")
    kernels: ClassVar[tuple] = ("bf16_encode", "bf16_decode")

    rounding: str = "nearest"

    def __post_init__(self):
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def _encode_native(self, kernels, values, payload, seed):
        kernels.bf16_encode(values.data_ptr(), values.numel(), self.unbiased, seed, payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        kernels.bf16_decode(payload.data_ptr(), out.numel(), add, out.data_ptr())

    def _encode_reference(self, values, seed):
        pattern = values.view(torch.int32).to(torch.int64)
        keys = pattern & 0x7FFFFFFF
        below = 0x7FFF + ((keys >> 16) & 1)
        if self.unbiased:
            below = packing.hashed(torch.arange(values.numel(), device=values.device), seed) >> 16
        codes = ((keys + below) >> 16).clamp(max=0x7F7F)
        codes = torch.where(keys == packing.INFINITY_KEY, 0x7F80, codes)
        codes = torch.where(keys > packing.INFINITY_KEY, 0x7FC0, codes)
        return _integer_bytes(codes | (pattern < 0).to(torch.int64) << 15, 16)

    def _decode_reference(self, payload, numel):
        return (_bytes_integer(payload, 16) << 16).to(torch.int32).view(torch.float32)


# What the GPU launches.


@device_kernel(keeps_residual=True)
def cast_encode(gpu, x, n, form, bucket, payload):
    gpu.encode_buckets("cast", CAST_NAMES[form], x, n, bucket, payload)


@device_kernel
def cast_decode(gpu, payload, n, form, bucket, add, out):
    gpu.launch("cast", f"{CAST_NAMES[form]}_decode", ceil_div(n, FOUR), payload, n, bucket, add, out)


@device_kernel(keeps_residual=True)
def bf16_encode(gpu, x, n, stochastic, seed, payload):
    gpu.launch("cast", "bf16_encode", ceil_div(n, FOUR), x, *gpu.feedback, n, stochastic, seed, payload)


@device_kernel
def bf16_decode(gpu, payload, n, add, out):
    gpu.launch("cast", "bf16_decode", ceil_div(n, FOUR), payload, n, add, out)
