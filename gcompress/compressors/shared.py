"""Integers on a scale that all ranks share, so that an all-reduce adds them without decoding.

The homomorphic quantization of THC (Li et al., NSDI 2024, arXiv 2302.08545), without its
rotation, and of SwitchML (Sapio et al., NSDI 2021): ranks agree on the largest magnitude of
each bucket, round to integers from -L to L, L = 2^(bits - 1) - 1, and add those. Several
integers share a 64-bit word, each in as many bits as the sum over all ranks can need: the sum
is exact and takes the engine's own all-reduce, whose bytes do not grow with the ranks.

Bytes for n entries in B = ceil(n / bucket) buckets, with F = 64 // w integers to a word:
    4 B (largest magnitudes, float32) + 8 words, about 8 ceil(n / F)
A payload has w = bits; summed over N ranks, w is 1 + the number of bits of N L.
"""

import dataclasses
import zlib
from typing import ClassVar

import torch

from .. import backends, packing
from ..backends.gpu.plans import THREADS, TILE, ceil_div, device_kernel
from ..checks import check_choice, check_integer
from ..errors import ConfigError
from .base import Bucketed, Section, SumRounds

BLOCK_WORDS = 64
MAX_WIDTH = 24


@dataclasses.dataclass(frozen=True)
class SharedScale(Bucketed):
    """Integers on a scale that all ranks share, which an all-reduce adds exactly.

    An entry's value is code * largest / L: symmetric uniform quantization.

    Args:
        bits: bits of one rank's integer, 2 to 8 (2: minus one, zero, one). On the wire of N
            ranks it takes w = 1 + bits of N L: with 4 bits, 6 for 4 ranks and 8 for 16.
        bucket: entries that share a scale; 0: one scale for the tensor.
        rounding: "nearest" (use error feedback) or "stochastic" (unbiased).

    A bucket with a non-finite entry on any rank decodes to NaN on all; a step below the
    smallest normal float32 decodes to zero. The error of an entry is at most step / 2
    (nearest) or step (stochastic), with the step of all ranks' largest magnitude. With
    stochastic rounding, ranks with the same values draw the same random numbers.

    >>> payload, ctx = SharedScale(bits=4).compress(torch.randn(1 << 20))
    >>> payload.numel(), SharedScale(bits=4).summed_nbytes(ctx.shape, 4)
    (528384, 842960)
    """

    name: ClassVar[str] = "shared"
    examples: ClassVar[tuple] = (
        "shared:bits=4",
        "shared:bits=2,bucket=100",
        "shared:bits=7,bucket=0,rounding=stochastic",
        "shared:bits=8",
    )
    kernels: ClassVar[tuple] = ("shared_scales", "shared_encode", "shared_decode")
    shown: ClassVar[tuple] = ("bits",)
    summable: ClassVar[bool] = True

    bits: int = 4
    bucket: int = 1024
    rounding: str = "nearest"

    def __post_init__(self):
        check_integer("bits", self.bits, 2, 8)
        check_integer("bucket", self.bucket, 0)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def _limit(self):
        return 2 ** (self.bits - 1) - 1

    def width(self, world_size: int) -> int:
        """The bits of an integer that holds the sum over that many ranks."""
        width = (world_size * self._limit).bit_length() + 1
        if width > MAX_WIDTH:
            raise ConfigError(f"bits: got {self.bits}, whose sum over {world_size} ranks needs more than {MAX_WIDTH}")
        return width

    def nbytes(self, numel: int) -> int:
        return 4 * self._buckets(numel) + 8 * word_count(numel, self.bits) if numel else 0

    def summed_nbytes(self, shape: torch.Size, world_size: int) -> int:
        numel = shape.numel()
        return 4 * self._buckets(numel) + 8 * word_count(numel, self.width(world_size))

    def sections(self, numel: int) -> list[Section]:
        return [Section(4 * self._buckets(numel), 4, floats=True), Section(8 * word_count(numel, self.bits), 8)]

    def _buckets(self, numel):
        return -(-numel // self._bucket(numel))

    def sum_rounds(
        self, values: torch.Tensor, *, shape: torch.Size, seed: int, world_size: int, memory: dict
    ) -> SumRounds:
        """Two rounds: the largest magnitudes, then the integers."""
        own_scales, width = self._scales(values), self.width(world_size)
        scales = yield own_scales, "max"
        if self.unbiased:  # ranks should not round alike
            seed ^= zlib.crc32(own_scales.cpu().numpy().tobytes())
        words = self._words(values, scales, width, seed)
        own, total = torch.empty_like(values), torch.empty_like(values)
        self._add_words(words, scales, width, own, False)
        summed = yield words, "sum"
        self._add_words(summed, scales, width, total, False)
        return total, own

    def _scales(self, values):
        kernels = backends.kernels(values, self)
        bucket = self._bucket(values.numel())
        if kernels:
            scales = torch.empty(self._buckets(values.numel()), device=values.device)
            kernels.shared_scales(values.data_ptr(), values.numel(), bucket, scales.data_ptr())
            return scales
        rows = torch.nn.functional.pad(values.abs(), (0, -values.numel() % bucket)).view(-1, bucket)
        largest = rows.amax(1)
        return torch.where(torch.isfinite(largest), largest, float("inf"))

    def _words(self, values, scales, width, seed):
        kernels, numel = backends.kernels(values, self), values.numel()
        if kernels:
            words = torch.empty(word_count(numel, width), dtype=torch.int64, device=values.device)
            kernels.shared_encode(
                values.data_ptr(), numel, self._bucket(numel), self._limit, width, self.unbiased, seed,
                scales.data_ptr(), words.data_ptr(),
            )  # fmt: skip
            return words
        step = self._steps(scales).repeat_interleave(self._bucket(numel))[:numel]
        inverse = torch.where(step >= packing.SMALLEST_NORMAL, 1.0 / step, 0.0)
        scaled = torch.where(step.isnan(), 0.0, values * inverse)
        if self.unbiased:
            scaled = torch.floor(scaled + packing.uniform(values.numel(), seed, values.device).view_as(values))
        codes = torch.round(scaled.clamp(-self._limit, self._limit)).to(torch.int64)
        return pack_fields(codes, width)

    def _add_words(self, words, scales, width, out, add):
        kernels, numel = backends.kernels(out, self), out.numel()
        if kernels:
            kernels.shared_decode(
                words.data_ptr(), numel, self._bucket(numel), self._limit, width, scales.data_ptr(), add, out.data_ptr()
            )
            return
        step = self._steps(scales).repeat_interleave(self._bucket(numel))[:numel]
        values = unpack_fields(words, numel, width).to(torch.float32) * step
        values.clamp_(-packing.LARGEST, packing.LARGEST)
        out.add_(values) if add else out.copy_(values)

    def _steps(self, scales):
        # A tensor on both sides: torch turns scalar division into a product with the reciprocal.
        step = scales / torch.full_like(scales, float(self._limit))
        step = torch.where(step >= packing.SMALLEST_NORMAL, step, 0.0)
        return torch.where(torch.isfinite(scales), step, float("nan"))

    def _encode_native(self, kernels, values, payload, seed):
        numel, start = values.numel(), payload.data_ptr()
        kernels.shared_scales(values.data_ptr(), numel, self._bucket(numel), start)
        kernels.shared_encode(
            values.data_ptr(), numel, self._bucket(numel), self._limit, self.bits, self.unbiased, seed,
            start, start + 4 * self._buckets(numel),
        )  # fmt: skip

    def _encode_reference(self, values, seed):
        scales = self._scales(values)
        words = self._words(values, scales, self.bits, seed)
        return torch.cat([packing.float_to_bytes(scales), words.view(torch.uint8)])

    def _decode_native(self, kernels, payload, out, add):
        start = payload.data_ptr()
        scales = 4 * self._buckets(out.numel())
        kernels.shared_decode(
            start + scales, out.numel(), self._bucket(out.numel()), self._limit, self.bits, start, add, out.data_ptr()
        )

    def _decode_reference(self, payload, numel):
        scales = payload[: 4 * self._buckets(numel)]
        words = payload[scales.numel() :].clone().view(torch.int64)
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self._add_words(words, packing.bytes_to_float(scales), self.bits, out, False)
        return out


def word_count(numel, width):
    """64-bit words for numel integers of `width` bits, none of which lies in two."""
    fields = 64 // width
    return numel // (BLOCK_WORDS * fields) * BLOCK_WORDS + -(-(numel % (BLOCK_WORDS * fields)) // fields)


def _blocks(numel, width):
    """Entries in whole blocks of 64 words, and the words of the rest."""
    block = BLOCK_WORDS * (64 // width)
    return numel // block * block, -(-(numel % block) // (64 // width))


def pack_fields(codes, width):
    """int64 words that each hold the sum of code f times 2^(width f): words of such sums add up."""
    fields = 64 // width
    whole, last = _blocks(codes.numel(), width)
    weights = 1 << (width * torch.arange(fields, device=codes.device)).unsqueeze(1)
    words = [(codes[:whole].view(-1, fields, BLOCK_WORDS) * weights).sum(1).view(-1)]
    if last:
        rest = torch.nn.functional.pad(codes[whole:], (0, fields * last - (codes.numel() - whole)))
        words.append((rest.view(fields, last) * weights).sum(0))
    return torch.cat(words)


def unpack_fields(words, numel, width):
    """The numel integers, each from -2^(width - 1) to 2^(width - 1) - 1, behind (sums of) `pack_fields`."""
    fields, half = 64 // width, 1 << (width - 1)
    whole, last = _blocks(numel, width)
    shifts = (width * torch.arange(fields, device=words.device)).unsqueeze(1)
    bias = sum(half << (width * field) for field in range(fields))
    biased = words + (bias - (1 << 64) if bias >= 1 << 63 else bias)
    head, tail = biased[: whole // fields].view(-1, 1, BLOCK_WORDS), biased[whole // fields :].view(1, last)
    parts = [(head >> shifts).reshape(-1), (tail >> shifts).reshape(-1)]
    return (torch.cat(parts)[:numel] & ((1 << width) - 1)) - half


# What the GPU launches.


@device_kernel
def shared_scales(gpu, x, n, bucket, scales):
    gpu.zeros_into(scales, 4 * ceil_div(n, bucket))
    warps = ceil_div(n, bucket) * ceil_div(bucket, TILE)
    gpu.launch("shared", "shared_scales", ceil_div(warps, THREADS // 32), x, gpu.feedback[0], n, bucket, scales)


@device_kernel(keeps_residual=True)
def shared_encode(gpu, x, n, bucket, limit, width, stochastic, seed, scales, payload):
    words = word_count(n, width)
    arguments = x, *gpu.feedback, n, bucket, limit, width, stochastic, seed, scales, words, payload
    gpu.launch("shared", "shared_encode", ceil_div(words, THREADS), *arguments)


@device_kernel
def shared_decode(gpu, payload, n, bucket, limit, width, scales, add, out):
    words = word_count(n, width)
    arguments = payload, n, bucket, limit, width, scales, words, add, out
    gpu.launch("shared", "shared_decode", ceil_div(words, THREADS), *arguments)
