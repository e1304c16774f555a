"""Polar source codes: real entries at any rate, near the rate-distortion bound.

Korada and Urbanke, "Polar codes are optimal for lossy source coding" (IEEE Trans. Inf. Theory
56, 2010, arXiv 0903.0307), here as a multilevel code on real samples: docs/polar.md explains
it, docs/FORMAT.md gives every byte.

Bytes for n entries, whatever their shape: max(28, ceil(n rate / 8), min(floor, ceil(n / 8))), all
scales included; if unbiased at least 28 + 2 (tiles of the code) + 4 ceil(n / 16384).
"""

import dataclasses
from typing import ClassVar

import torch

from ...checks import check_choice, check_integer, check_number, check_power_of_two
from ..base import Compressor
from . import coding, products, reference, turning, whole
from .device import backend_of
from .native import KERNELS
from .payload import SMALLEST_PAYLOAD
from .spending import lone_class_bytes


@dataclasses.dataclass(frozen=True)
class Polar(Compressor):
    """A polar source code of any rate, with scales by row and column and the strongest outer products apart.

    Entries of larger variance get a higher rate, so that the error of the whole tensor is least.

    Args:
        rate: bits per entry, everything included: any number from 0.05 to 4.
        block: the longest block of the code, a power of two from 64 to 16384: longer errs
            less and is slower (1024 to 16384: about 0.15 dB and a third of the speed).
        scales: "rowcol" (for a matrix a scale per row and per column, otherwise per chunk of
            256 entries), "chunk" or "tensor" (a single scale). Finer scales are sent
            only where they lower the error by more than their bytes cost.
        allocation: "waterfill" (each variance at the rate of least error for the whole) or "flat" (one rate).
        list_size: candidates that the encoder keeps, 1, 2, 4 or 8: less error for about as many
            times the time; the decoder is the same.
        outliers: entries far beyond what their code reaches are sent apart, in 8 to 15 bits each: "auto" (as many
            as lower the modelled error, mostly none), 0.0, or about this share of the entries, up to 0.5.
        unbiased: over the seed; entries are turned at random first, so that any look Gaussian: scales,
            allocation and outliers do nothing, and errors are D / (1 - D) for the D of Gaussian entries
            (1.15 at 0.5 bits, .39 at 1, .079 at 2). The seed travels in the payload. Rank and step should
            differ in it.
        rank: the strongest outer products of a matrix with scales "rowcol" go apart, in few bits: "auto" (as
            many as lower the modelled error, up to 32; none in a matrix of noise), or at most that many, 0 to 32.
        floor: the fewest bytes that a tensor gets, but at most one bit for an entry. Small
            layers carry more energy for an entry than large ones, and short blocks err more. 0: none.

    Unless unbiased, the decoded tensor is a contraction of the input in the squared norm, so that
    error feedback converges. A tensor with a non-finite entry decodes to NaN; one whose entries are
    below about 1e-30 to zero.

    >>> payload, ctx = Polar(rate=0.5).compress(torch.randn(64, 1024))
    >>> payload.numel()
    4096
    """

    name: ClassVar[str] = "polar"
    examples: ClassVar[tuple] = (
        "polar:rate=0.5",
        "polar:rate=0.1,block=1024,scales=tensor,floor=0",
        "polar:rate=1.0,scales=chunk",
        "polar:rate=2.5,allocation=flat",
        "polar:rate=4,block=256",
        "polar:rate=1.0,block=256,list_size=4",
        "polar:rate=0.3,block=256,list_size=8,floor=0",
        "polar:rate=0.5,outliers=0.0,floor=0",
        "polar:rate=2.0,block=1024,outliers=0.02",
        "polar:rate=1.0,unbiased=true",
        "polar:rate=0.2,block=512,unbiased=true,floor=0",
    )
    kernels: ClassVar[tuple] = (*KERNELS, *whole.KERNELS)
    device_kernels: ClassVar[tuple] = ("polar_beyond",)
    shown: ClassVar[tuple] = ("rate",)
    uses_shape: ClassVar[bool] = True

    rate: float = 0.5
    block: int = 4096
    scales: str = "rowcol"
    allocation: str = "waterfill"
    list_size: int = 1
    outliers: float | str = "auto"
    unbiased: bool = False
    rank: int | str = "auto"
    floor: int = 512

    def __post_init__(self):
        check_number("rate", self.rate, 0.05, 4)
        check_power_of_two("block", self.block, 64, 16384)
        check_choice("scales", self.scales, ("rowcol", "chunk", "tensor"))
        check_choice("allocation", self.allocation, ("waterfill", "flat"))
        check_choice("list_size", self.list_size, (1, 2, 4, 8))
        if self.outliers != "auto":
            check_number("outliers", self.outliers, 0, 0.5)
        check_choice("unbiased", self.unbiased, (False, True))
        if self.rank != "auto":
            check_integer("rank", self.rank, 0, products.MOST)
        check_integer("floor", self.floor, 0)

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        least = SMALLEST_PAYLOAD
        if self.unbiased:
            least = lone_class_bytes(numel, self.block) + turning.section_bytes(numel)
        return max(least, -int(-numel * self.rate // 8), min(self.floor, -(-numel // 8)))

    def _encode_native(self, kernels, values, payload, seed):
        if kernels.on_device:
            self._encode(backend_of(kernels), values, payload, seed)
        else:
            whole.compress(kernels, self, values, payload, seed)

    def _encode_reference(self, values, seed):
        payload = torch.empty(self.nbytes(values.numel()), dtype=torch.uint8, device=values.device)
        self._encode(reference, values, payload, seed)
        return payload

    def _encode(self, backend, values, payload, seed):
        options = {"block": self.block, "list_size": self.list_size}
        if self.unbiased:
            coding.encode_unbiased(backend, values, payload, seed=seed, **options)
        else:
            flat, share = self.allocation == "flat", self.outliers
            coding.encode(
                backend, values, payload, scales=self.scales, flat=flat, share=share, rank=self.rank, **options
            )

    def _decode_native(self, kernels, payload, out, add):
        if not kernels.on_device:
            return whole.decompress(kernels, payload, out, add, self.block)
        return coding.decode_into(backend_of(kernels), payload, out, add, self.block)

    def _decode_reference(self, payload, numel):
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        coding.decode_into(reference, payload, out, False, self.block)
        return out
