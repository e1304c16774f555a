"""A random rotation, then the best scalar quantizer for the entries that any vector has after it.

DRIVE (Vargaftik et al., arXiv 2105.08339) and EDEN (arXiv 2108.08842): signs at random and a
Hadamard transform make the entries of any vector close to normal, for which the Lloyd-Max
levels are known beforehand; one scale makes the result unbiased, or of least error. The error
no longer depends on the distribution of the entries. Rates below one bit keep a part of the
rotated entries, one bit each.

The rotation works on blocks; the last one may have any number of entries and is not padded.

Bytes for n entries in B = ceil(n / block) blocks, of which m = n are sent (bits < 1: about bits n):
    4 (seed) + 4 B (scales, float32) + ceil(m max(1, bits) / 8)
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.calls import made_once
from ..backends.gpu.plans import ceil_div, device_kernel
from ..checks import check_choice, check_power_of_two, shown
from ..errors import ConfigError
from .base import Compressor
from .eden_levels import LEVELS, UNIT
from .rotation import flip, gain, rotate, rotate_back

LARGEST = torch.finfo(torch.float32).max
PART_WORDS = 0x40000000  # and which entries are sent from others again
PRIMES = (16411, 16417, 16421, 16427, 16433, 16447, 16451, 16453)


@dataclasses.dataclass(frozen=True)
class Eden(Compressor):
    """A random rotation, then the best levels for Gaussian entries (Lloyd-Max) and a scale per block.

    Args:
        bits: bits per entry: an integer from 1 to 8, or a fraction from 0.01 to below 1.
        scale: "least" (least error: use error feedback) or "unbiased" (over the seed; the
            error is 1.6 times as large at 1 bit, 1.13 times at 2).
        block: entries that are rotated together, a power of two from 64 to 16384.

    Normalised mean squared errors, whatever the distribution: .363, .118, .035, .0095 at 1 to 4
    bits (least). A block with a non-finite entry decodes to NaN, one whose largest magnitude is
    below 2^-126 to zero. The seed travels in the payload. Rank and step should differ in it.

    >>> payload, ctx = Eden(bits=2).compress(torch.randn(4096), seed=5)
    >>> payload.numel()
    1032
    """

    name: ClassVar[str] = "eden"
    examples: ClassVar[tuple] = (
        "eden:bits=1",
        "eden:bits=1,scale=unbiased",
        "eden:bits=2,block=1024",
        "eden:bits=4",
        "eden:bits=5,block=16384",
        "eden:bits=8,block=64",
        "eden:bits=0.5",
        "eden:bits=0.1,scale=unbiased,block=256",
    )
    kernels: ClassVar[tuple] = ("eden_encode", "eden_decode")
    shown: ClassVar[tuple] = ("bits",)

    bits: float = 1
    scale: str = "least"
    block: int = 4096

    def __post_init__(self):
        whole = type(self.bits) is int and self.bits in LEVELS
        if not whole and not (type(self.bits) is float and 0.01 <= self.bits < 1):
            raise ConfigError(f"bits: got {shown(self.bits)}, expected an integer from 1 to 8 or 0.01 <= bits < 1")
        check_choice("scale", self.scale, ("least", "unbiased"))
        check_power_of_two("block", self.block, 64, 16384)

    @property
    def unbiased(self) -> bool:
        return self.scale == "unbiased"

    @property
    def _width(self):
        """Bits of a code."""
        return max(1, self.bits)

    def _sent(self, entries):
        """Entries sent of a block of that many."""
        if self.bits >= 1:
            return entries
        if entries == self.block:  # a multiple of 8, so that each block's codes begin with a byte
            return max(8, 8 * round(entries * self.bits / 8))
        return max(1, round(entries * self.bits))

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        blocks, tail = divmod(numel, self.block)
        codes = blocks * self._sent(self.block) + (self._sent(tail) if tail else 0)
        return 4 + 4 * (blocks + (tail > 0)) + packing.packed_bytes(codes, self._width)

    def _encode_native(self, kernels, values, payload, seed):
        levels = _levels(self._width, values.device)
        tail = values.numel() % self.block
        kernels.eden_encode(
            values.data_ptr(), values.numel(), self._width, self.block, self._sent(self.block), self._sent(tail),
            self.unbiased, seed, levels.data_ptr(), payload.data_ptr(),
        )  # fmt: skip

    def _decode_native(self, kernels, payload, out, add):
        levels = _levels(self._width, out.device)
        tail = out.numel() % self.block
        kernels.eden_decode(
            payload.data_ptr(), out.numel(), self._width, self.block, self._sent(self.block), self._sent(tail),
            levels.data_ptr(), add, out.data_ptr(),
        )  # fmt: skip

    def _encode_reference(self, values, seed):
        parts = [self._encode_rows(rows, first, seed) for rows, first in self._rows(values)]
        scales = torch.cat([scale for scale, _ in parts])
        codes = torch.cat([codes.view(-1) for _, codes in parts])
        seed_bytes = torch.tensor(list(seed.to_bytes(4, "little")), dtype=torch.uint8, device=values.device)
        return torch.cat([seed_bytes, packing.float_to_bytes(scales), packing.pack_bits(codes, self._width)])

    def _rows(self, values):
        """(blocks of one size as rows, index of their first entry): the whole blocks, then the last one."""
        whole = values.numel() // self.block * self.block
        if whole:
            yield values[:whole].view(-1, self.block), 0
        if whole < values.numel():
            yield values[whole:].view(1, -1), whole

    def _encode_rows(self, rows, first, seed):
        """Scales, float32 of shape [rows], and codes, uint8 of shape [rows, sent]."""
        keys = packing.magnitude_keys(rows).amax(1, keepdim=True)
        exponent = keys >> 23
        usable = (exponent > 0) & (exponent < 255)
        factor = torch.where(usable, 255 - exponent, 127) << 23
        rotated = rotate(torch.where(usable, rows, 1.0) * factor.view(torch.float32), first, seed)
        power = packing.ordered_sum(rotated.double().square()).unsqueeze(1)
        to_units = (UNIT / torch.sqrt(power / rows.shape[1])).to(torch.float32)
        sent = rotated.gather(1, self._positions(*rows.shape, first, seed, rows.device))
        levels = _levels(self._width, rows.device)
        borders = (levels[1:] + levels[:-1]) / 2
        classes = torch.bucketize(sent.abs() * to_units, borders, right=True)
        chosen = levels[classes].double()
        dot = packing.ordered_sum(sent.abs().double() * chosen).unsqueeze(1)
        scale = power / dot if self.unbiased else dot / packing.ordered_sum(chosen.square()).unsqueeze(1)
        back = ((exponent.to(torch.int64) - 128 + 1023) << 52).view(torch.float64)  # 2^(exponent - 128)
        scale = (scale * back / gain(rows.shape[1])).to(torch.float32)
        scale = torch.where(usable & (scale >= packing.SMALLEST_NORMAL) & (dot > 0), scale, 0.0).clamp(max=LARGEST)
        scale = torch.where(exponent == 255, float("nan"), scale)
        codes = classes | (sent.view(torch.int32) < 0).to(torch.int64) << (self._width - 1)
        return scale.view(-1), torch.where(usable, codes, 0).to(torch.uint8)

    def _positions(self, blocks, entries, first, seed, device):
        """Which rotated entries of each block are sent, in this order: int64 of shape [blocks, sent]."""
        sent = self._sent(entries)
        if sent == entries:
            return torch.arange(entries, device=device).expand(blocks, entries)
        words = packing.hashed(torch.arange(blocks, device=device) + first // self.block + PART_WORDS, seed)
        prime = torch.tensor(PRIMES, device=device)[words & 7].unsqueeze(1)
        return (torch.arange(sent, device=device) * prime + (words >> 3).unsqueeze(1)) % entries

    def _decode_reference(self, payload, numel):
        seed = int.from_bytes(bytes(payload[:4].tolist()), "little")
        blocks = -(-numel // self.block)
        scales = packing.bytes_to_float(payload[4 : 4 + 4 * blocks])
        levels = _levels(self._width, payload.device)
        table = torch.cat([levels, -levels])
        out = torch.zeros(numel, dtype=torch.float32, device=payload.device)
        whole = numel // self.block * self._sent(self.block)
        tail = self._sent(numel % self.block) if numel % self.block else 0
        codes = packing.unpack_bits(payload[4 + 4 * blocks :], whole + tail, self._width)
        for rows, first in self._rows(out):
            sent = self._sent(rows.shape[1])
            count = len(rows)
            part, codes = codes[: count * sent].view(count, sent).to(torch.int64), codes[count * sent :]
            rows.scatter_(1, self._positions(*rows.shape, first, seed, rows.device), table[part])
            scale = scales[first // self.block :][:count].unsqueeze(1)
            rows.copy_((rotate_back(rows, first, seed) * scale).clamp(-LARGEST, LARGEST))
            rows.copy_(flip(rows, first // 32, seed))
        return out


@made_once
def _levels(bits, device):
    """The positive levels of a number of bits, float32."""
    return torch.tensor(LEVELS[bits], dtype=torch.float32, device=device)


# What the GPU launches.


@device_kernel(keeps_residual=True)
def eden_encode(gpu, x, n, bits, block, sent, sent_tail, unbiased, seed, levels, payload):
    residual, fresh, _ = gpu.feedback
    shape = n, bits, block, sent, sent_tail
    places = x, residual, *shape, unbiased, seed, levels, payload
    gpu.launch("eden", "eden_encode", ceil_div(n, block), *places, shared=_eden_shared(block))
    if fresh:
        decoded = gpu.launcher.empty(4 * n)
        eden_decode(gpu, payload, *shape, levels, False, decoded.data_ptr())
        gpu.keep_residual(x, n, decoded.data_ptr())


@device_kernel
def eden_decode(gpu, payload, n, bits, block, sent, sent_tail, levels, add, out):
    places = payload, n, bits, block, sent, sent_tail, levels, add, out
    gpu.launch("eden", "eden_decode", ceil_div(n, block), *places, shared=_eden_shared(block))


def _eden_shared(block):
    """Bytes: the entries, with a gap behind every 32, and their codes."""
    return 4 * (block + block // 32) + block
