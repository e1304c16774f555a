"""Entries drawn at random, the same ones on all ranks: payloads that an all-reduce can sum.

Random-k sparsification (Stich et al., arXiv 1809.07599; unbiased by scaling: Wangni et al.,
arXiv 1710.09854), stratified: the entries are cut into k runs of equal length, give or take
one, and one entry is drawn from each. So an entry is kept with a probability of 1 over its
run's length, indices come in order, and neither drawing nor decoding sorts anything.

Bytes: 4 (seed, uint32) + 4 k (values, float32). Summed by an all-reduce: 4 k, since all
ranks draw from one seed that is not sent.
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, THREADS, ceil_div, device_kernel
from ..checks import check_choice, check_sparsity
from ..errors import ConfigError
from .base import Compressor, Section, SumRounds, kept_count


@dataclasses.dataclass(frozen=True)
class RandomK(Compressor):
    """Entries that a seed chooses, the same on all ranks; the rest is zero.

    It keeps k = max(1, round(n (1 - sparsity))) of n.

    Args:
        sparsity: fraction set to zero, 0 <= sparsity < 1.
        unbiased: multiply each kept entry by its run's length, about n / k, so that the
            expected decoded value is the input. Without it the error is smaller: use error
            feedback, with which it converges (a contraction with delta >= k / (n + k)).

    A non-finite entry, drawn or not, makes all sent values NaN. Values are float32.

    >>> payload, ctx = RandomK(sparsity=0.99).compress(torch.randn(1 << 20), seed=7)
    >>> payload.numel()
    41948
    """

    name: ClassVar[str] = "randomk"
    examples: ClassVar[tuple] = (
        "randomk:sparsity=0.99",
        "randomk:sparsity=0.4",
        "randomk:sparsity=0.0",
        "randomk:sparsity=0.9,unbiased=true",
    )
    kernels: ClassVar[tuple] = ("randomk_encode", "randomk_decode")
    shown: ClassVar[tuple] = ("sparsity",)
    summable: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    sparsity: float = 0.99
    unbiased: bool = False

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_choice("unbiased", self.unbiased, (False, True))

    def nbytes(self, numel: int) -> int:
        if numel >= 2**31:
            raise ConfigError(f"tensor: got {numel} entries, expected fewer than 2^31")
        return 4 + 4 * kept_count(numel, self.sparsity) if numel else 0

    def sections(self, numel: int) -> list[Section]:
        return [Section(4), Section(4 * kept_count(numel, self.sparsity), 4, floats=True)]

    def summed_nbytes(self, shape: torch.Size, world_size: int) -> int:
        return 4 * kept_count(shape.numel(), self.sparsity)

    def sum_rounds(
        self, values: torch.Tensor, *, shape: torch.Size, seed: int, world_size: int, memory: dict
    ) -> SumRounds:
        """One round: the kept values, whose places the shared seed tells every rank."""
        payload, _ = self.compress(values, seed=seed)
        kept = payload[4:].view(torch.float32)
        if self.unbiased:  # a multiple of what is finite on every rank: so that the sum is finite too
            limit = packing.share_of_largest(world_size)
            kept.clamp_(-limit, limit)
        own = torch.empty_like(values)
        self.decode_into(payload, own)
        summed = yield kept, "sum"
        total = torch.empty_like(values)
        self.decode_into(torch.cat([payload[:4], packing.float_to_bytes(summed)]), total)
        return total, own

    def _encode_native(self, kernels, values, payload, seed):
        k = kept_count(values.numel(), self.sparsity)
        kernels.randomk_encode(values.data_ptr(), values.numel(), k, self.unbiased, seed, payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        k = kept_count(out.numel(), self.sparsity)
        kernels.randomk_decode(payload.data_ptr(), out.numel(), k, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        indices, lengths = drawn(values.numel(), kept_count(values.numel(), self.sparsity), seed, values.device)
        kept = values[indices]
        if self.unbiased:
            kept = (kept * lengths).clamp_(-packing.LARGEST, packing.LARGEST)
        if not bool(torch.isfinite(values).all()):
            kept = torch.full_like(kept, float("nan"))
        word = torch.tensor([seed], device=values.device).view(torch.uint8)[:4]
        return torch.cat([word, packing.float_to_bytes(kept)])

    def _decode_reference(self, payload, numel):
        seed = int(packing.unpack_bits(payload[:4], 1, 32))
        indices, _ = drawn(numel, kept_count(numel, self.sparsity), seed, payload.device)
        out = torch.zeros(numel, dtype=torch.float32, device=payload.device)
        out[indices] = packing.bytes_to_float(payload[4:])
        return out


def drawn(numel, k, seed, device):
    """The index drawn from each of k runs of numel entries, increasing, and the runs' lengths; both int64 [k]."""
    borders = torch.arange(k + 1, device=device) * numel // k
    first, length = borders[:-1], borders.diff()
    return first + (packing.hashed(torch.arange(k, device=device), seed) * length >> 32), length


# What the GPU launches.


@device_kernel
def randomk_encode(gpu, x, n, k, unbiased, seed, payload):
    poisoned = gpu.launcher.zeros(4)
    gpu.launch("randomk", "find_poison", ceil_div(n, FOUR), x, n, poisoned.data_ptr())
    places = poisoned.data_ptr(), payload
    gpu.launch("randomk", "randomk_encode", ceil_div(k, THREADS), x, n, k, unbiased, seed, *places)


@device_kernel
def randomk_decode(gpu, payload, n, k, add, out):
    if not add:
        gpu.zeros_into(out, 4 * n)
    gpu.launch("randomk", "randomk_decode", ceil_div(k, THREADS), payload, n, k, add, out)
