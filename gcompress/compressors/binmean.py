"""Uniform bins around the mean, and for each bin the mean of the entries in it.

SparseLoCo (Sarfi et al., arXiv 2508.15706) codes each value that is kept in 2 bits this way, after hivemind's
quantizer of 8 bits. Bins are cut in units of the standard deviation. A table of the bins' means is sent, too: no
other values for these bins err less. Together with places in chunks,

    chain:(topk:sparsity=0.984375,index=places,chunk=4096),(binmean:bits=2)

has the bytes of that paper: 64 of 4096 entries with 12 bits of index and 2 of value, 0.21875 bits an entry.

Bytes for n entries:
    4 2^bits (the bins' means, float32) + ceil(n bits / 8)
"""

import dataclasses
import math
from typing import ClassVar

import torch

from .. import packing
from ..checks import check_integer, check_number
from ..errors import PayloadError
from .base import Compressor, Section, code_section


@dataclasses.dataclass(frozen=True)
class BinMeans(Compressor):
    """Uniform bins in units of the standard deviation around the mean, and the mean of each bin.

    Args:
        bits: bits per entry, 2 to 8; there are 2^bits bins.
        range: width of all bins together, in standard deviations, from 0.1 to 100. Entries beyond it are in the
            first or the last bin.

    Biased: use error feedback. The error is at most that of sending nothing, and the least that these bins allow.
    A tensor with a non-finite entry decodes to NaN.

    >>> payload, ctx = BinMeans(bits=2).compress(torch.randn(4096))
    >>> payload.numel()
    1040
    """

    name: ClassVar[str] = "binmean"
    examples: ClassVar[tuple] = (
        "binmean:bits=2",
        "binmean:bits=3,range=4.0",
        "binmean:bits=4",
        "binmean:bits=8",
    )
    kernels: ClassVar[tuple] = ("binmean_encode", "binmean_decode")
    shown: ClassVar[tuple] = ("bits",)

    bits: int = 2
    range: float = 6.0

    def __post_init__(self):
        check_integer("bits", self.bits, 2, 8)
        check_number("range", self.range, 0.1, 100)

    def nbytes(self, numel: int) -> int:
        return 4 * 2**self.bits + packing.packed_bytes(numel, self.bits) if numel else 0

    def sections(self, numel: int) -> list[Section]:
        return [Section(4 * 2**self.bits, 4), code_section(numel, self.bits)]

    def check(self, payload: torch.Tensor, numel: int) -> None:
        if payload.numel() < 4 * 2**self.bits:
            raise PayloadError(f"payload: got {payload.numel()} bytes, expected at least {4 * 2**self.bits}")
        if bool(self._table(payload).isinf().any()):
            raise PayloadError("payload: a bin's mean is infinite, expected finite ones or NaN")

    def _table(self, payload):
        return packing.bytes_to_float(payload[: 4 * 2**self.bits])

    def _encode_native(self, kernels, values, payload, seed):
        kernels.binmean_encode(values.data_ptr(), values.numel(), self.bits, float(self.range), payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        kernels.binmean_decode(payload.data_ptr(), out.numel(), self.bits, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        numel, bins = values.numel(), 2**self.bits
        largest = packing.magnitude_keys(values).max().to(torch.int64)
        finite = largest < packing.INFINITY_KEY
        entries = torch.where(finite, values, 0.0).double()
        shift = packing.ordered_sum(entries.view(1, -1)) / numel
        centred = entries - shift
        squares = packing.ordered_sum(centred.square().view(1, -1))
        width = squares.sqrt() / math.sqrt(max(1, numel - 1)) * self.range / bins
        places = centred / torch.where(width > 0, width, 1.0) + bins / 2
        codes = places.clamp(0, bins - 1).round().to(torch.int64)
        # In fixed point: a sum of integers has no order.
        factor = ((157 + 1023 - (largest >> 23).clamp(1, 254)) << 52).view(torch.float64)
        sums, counts = torch.zeros(2, bins, dtype=torch.int64, device=values.device)
        sums.index_add_(0, codes, (entries * factor).round().to(torch.int64))
        counts.index_add_(0, codes, torch.ones_like(codes))
        means = sums.double() / counts.clamp(min=1).double() / factor
        table = torch.where(finite, torch.where(counts > 0, means, shift).to(torch.float32), float("nan"))
        packed = packing.pack_bits(torch.where(finite, codes, 0), self.bits)
        return torch.cat([packing.float_to_bytes(table), packed])

    def _decode_reference(self, payload, numel):
        codes = packing.unpack_bits(payload[4 * 2**self.bits :], numel, self.bits)
        return self._table(payload)[codes.to(torch.int64)]
