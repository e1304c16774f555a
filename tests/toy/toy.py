"""A signed byte for every entry: the example of a method that somebody adds (CONTRIBUTING.md walks through it).

Bytes for n entries: 4 (the step, float32) + n (codes, int8)
"""

import dataclasses
from typing import ClassVar

import torch

from gcompress import packing
from gcompress.compressors import Compressor


@dataclasses.dataclass(frozen=True)
class Toy(Compressor):
    """A signed byte for every entry, and one step for the tensor.

    Biased. A tensor with a non-finite entry decodes to NaN; one whose step is below 2^-126 to zero.

    >>> Toy().compress(torch.ones(1000))[0].numel()
    1004
    """

    name: ClassVar[str] = "toy"
    examples: ClassVar[tuple] = ("toy",)

    def nbytes(self, numel: int) -> int:
        return 4 + numel if numel else 0

    def _encode_reference(self, values, seed):
        step = values.abs().amax().view(1) / values.new_full((1,), 127.0)
        step = torch.where(step.isfinite(), torch.where(step < packing.SMALLEST_NORMAL, 0.0, step), float("nan"))
        codes = torch.round((values / step).nan_to_num(0.0)).clamp(-127, 127).to(torch.int8)
        return torch.cat([packing.float_to_bytes(step), codes.view(torch.uint8)])

    def _decode_reference(self, payload, numel):
        values = payload[4:].view(torch.int8).to(torch.float32) * packing.bytes_to_float(payload[:4])
        return values.clamp(-packing.LARGEST, packing.LARGEST)  # 127 steps may be rounded beyond it
