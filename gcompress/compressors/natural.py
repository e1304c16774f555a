"""Powers of two by random rounding: a sign and an exponent.

Natural compression (Horvath et al., arXiv 1905.10988): an entry between two neighbouring powers
of two becomes one of them at random, so that the expected value is the entry. The mantissa is the probability of the
upper one; adding a random mantissa to the bit pattern and dropping the lower bits does it.

Bytes for n entries: ceil(n / 8) (signs) + n (exponents)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from .base import Compressor


@dataclasses.dataclass(frozen=True)
class Natural(Compressor):
    """Every entry rounded at random to a power of two: a sign and an exponent, 9 bits.

    Unbiased for magnitudes up to 2^127; the expected squared error is at most 1/8 of the entry's
    square. Zeros stay zeros. An entry that is not finite decodes to NaN.

    >>> payload, ctx = Natural().compress(torch.randn(1024))
    >>> payload.numel()
    1152
    """

    name: ClassVar[str] = "natural"
    examples: ClassVar[tuple] = ("natural",)
    kernels: ClassVar[tuple] = ("natural_encode", "natural_decode")

    @property
    def unbiased(self) -> bool:
        return True

    def nbytes(self, numel: int) -> int:
        return packing.packed_bytes(numel, 1) + numel

    def _encode_native(self, kernels, values, payload, seed):
        kernels.natural_encode(values.data_ptr(), values.numel(), seed, payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        kernels.natural_decode(payload.data_ptr(), out.numel(), add, out.data_ptr())

    def _encode_reference(self, values, seed):
        keys = packing.magnitude_keys(values).to(torch.int64)
        words = packing.hashed(torch.arange(values.numel(), device=values.device), seed)
        exponents = ((keys + (words >> 9)) >> 23).clamp(max=254)
        exponents = torch.where(keys >= packing.INFINITY_KEY, 255, exponents).to(torch.uint8)
        return torch.cat([packing.pack_bits(values.view(torch.int32) < 0, 1), exponents])

    def _decode_reference(self, payload, numel):
        signs = packing.packed_bytes(numel, 1)
        pattern = payload[signs:].to(torch.int32) << 23
        magnitude = torch.where(payload[signs:] == 255, float("nan"), pattern.view(torch.float32))
        return torch.where(packing.unpack_bits(payload[:signs], numel, 1) == 1, -magnitude, magnitude)


# What the GPU launches.


@device_kernel
def natural_encode(gpu, x, n, seed, payload):
    gpu.launch("natural", "natural_encode", ceil_div(n, FOUR), x, n, seed, payload)


@device_kernel
def natural_decode(gpu, payload, n, add, out):
    gpu.launch("natural", "natural_decode", ceil_div(n, FOUR), payload, n, add, out)
