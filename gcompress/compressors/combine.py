"""Compressors made of two others.

`Chain` codes the values that one compressor sends by another, as in Qsparse-local-SGD (Basu
et al., arXiv 1906.02367: the largest entries, quantized). `Hybrid` sends outliers apart and
codes the rest, as in LLM.int8() (Dettmers et al., arXiv 2208.07339) and SpQR (arXiv
2306.03078): so no outlier stretches the quantizer's range.

Bytes of a chain: those of `first` without its float32 values, then those of `then` for that
many values. Bytes of a hybrid: those of `outliers`, then those of `rest`.
"""

import dataclasses
from typing import ClassVar

import torch

from .. import backends
from ..backends.gpu.plans import THREADS, ceil_div, device_kernel
from ..errors import ConfigError
from .base import Compressor, Section
from .quantize import Quantize
from .spec import read_parts
from .topk import TopK


class _Combination(Compressor):
    """Encoders and decoders by those of the parts, which choose the backend themselves."""

    def _encode_reference(self, values, seed):
        return torch.cat(self._encode_parts(values, seed))

    def _encode_native(self, kernels, values, payload, seed):
        start = 0
        for part in self._encode_parts(values, seed):
            payload[start : start + part.numel()] = part
            start += part.numel()
        return start

    def _decode_reference(self, payload, numel):
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self._decode_parts(payload, out, False)
        return out

    def _decode_native(self, kernels, payload, out, add):
        self._decode_parts(payload, out, add)


@dataclasses.dataclass(frozen=True)
class Chain(_Combination):
    """The float32 values that one compressor sends, coded by another.

    Args:
        first: a compressor of fixed size that sends float32 values: the entries kept by topk,
            randomk or mask, the steps of quantize.
        then: any compressor; it sees these values as a tensor of one dimension.

    Unbiased only if both parts are. A contraction if `first` is one and the values' error is small.

    >>> chain = Chain(TopK(sparsity=0.99), Quantize(bits=4))
    >>> payload, ctx = chain.compress(torch.randn(1 << 20))
    >>> payload.numel(), TopK(sparsity=0.99).nbytes(1 << 20)
    (16522, 53168)
    """

    name: ClassVar[str] = "chain"
    examples: ClassVar[tuple] = (
        "chain:(topk:sparsity=0.99),(quantize:bits=4)",
        "chain:(topk:sparsity=0.5),(entropy:(quantize:bits=2))",
        "chain:(mask:sparsity=0.9,bits=2),(quantize:bits=8,bucket=0)",
        "chain:(quantize:bits=4,bucket=64),(quantize:bits=8)",
        "chain:(randomk:sparsity=0.9,unbiased=true),(quantize:bits=2,rounding=stochastic)",
        "chain:(topk:sparsity=0.984375,index=places,chunk=4096),(binmean:bits=2)",
    )
    kernels: ClassVar[tuple] = ()
    parts: ClassVar[tuple] = ("first", "then")

    first: Compressor = TopK()
    then: Compressor = Quantize()

    def __post_init__(self):
        read_parts(self)
        if not self.first.fixed_size or not any(section.floats for section in self.first.sections(1024)):
            raise ConfigError(f"first: got {self.first}, expected a compressor of fixed size that sends float32 values")

    @property
    def unbiased(self) -> bool:
        return self.first.unbiased and self.then.unbiased

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]  # of the parts
        return self.then.fixed_size

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # of the parts
        return self.first.sparse

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        before, values, after = self._split(numel)
        return before + self.then.nbytes(values // 4) + after

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        before, values, after = self._split(numel)
        return before + after + self.then.payload_nbytes(start[before + after :], values // 4)

    def sections(self, numel: int) -> list[Section]:
        before, values, after = self._parted(numel)
        return before + after + self.then.sections(values.nbytes // 4)

    def _parted(self, numel):
        """The Sections of `first` before its values, that of the values (of several the last), those after it."""
        sections = self.first.sections(numel)
        coded = max(index for index, section in enumerate(sections) if section.floats)
        return sections[:coded], sections[coded], sections[coded + 1 :]

    def _split(self, numel):
        """Bytes of `first` before its values, of the values, after them."""
        before, values, after = self._parted(numel)
        return sum(section.nbytes for section in before), values.nbytes, sum(section.nbytes for section in after)

    def _encode_parts(self, values, seed):
        payload, _ = self.first.compress(values, seed=seed)
        before, middle, after = payload.split(self._split(values.numel()))
        # A copy: floats must lie at an address that is a multiple of four.
        coded, _ = self.then.compress(middle.clone().view(torch.float32), seed=seed)
        return before, after, coded

    def _decode_parts(self, payload, out, add):
        before, middle, after = self._split(out.numel())
        values = torch.empty(middle // 4, dtype=torch.float32, device=payload.device)
        self.then.decode_into(payload[before + after :], values)
        parts = payload[:before], values.view(torch.uint8), payload[before : before + after]
        self.first.decode_into(torch.cat(parts), out, add)


@dataclasses.dataclass(frozen=True)
class Hybrid(_Combination):
    """Outliers exactly by one compressor, all other entries by another.

    Args:
        outliers: topk or threshold.
        rest: any compressor; it sees the tensor with zeros in place of the outliers.

    Unbiased if `rest` is.

    >>> hybrid = Hybrid(TopK(sparsity=0.999), Quantize(bits=2))
    >>> payload, ctx = hybrid.compress(torch.randn(1 << 20))
    >>> payload.numel(), hybrid.nbytes(1 << 20)
    (273028, 273028)
    """

    name: ClassVar[str] = "hybrid"
    examples: ClassVar[tuple] = (
        "hybrid:(topk:sparsity=0.999),(quantize:bits=2)",
        "hybrid:(threshold:threshold=3.0),(quantize:bits=1)",
        "hybrid:(topk:sparsity=0.99),(chain:(topk:sparsity=0.5),(quantize:bits=3,rounding=stochastic))",
    )
    kernels: ClassVar[tuple] = ("hybrid_split", "hybrid_merge")
    parts: ClassVar[tuple] = ("outliers", "rest")

    outliers: Compressor = TopK(sparsity=0.999)
    rest: Compressor = Quantize()

    def __post_init__(self):
        read_parts(self)
        if not self.outliers.exact:
            raise ConfigError(
                f"outliers: got {self.outliers}, expected one that keeps entries exactly: topk, threshold"
            )

    @property
    def unbiased(self) -> bool:
        return self.rest.unbiased

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]  # of the parts
        return self.outliers.fixed_size and self.rest.fixed_size

    def nbytes(self, numel: int) -> int:
        return self.outliers.nbytes(numel) + self.rest.nbytes(numel)

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        first = self.outliers.payload_nbytes(start, numel)
        return first + self.rest.payload_nbytes(start[first:], numel)

    def sections(self, numel: int) -> list[Section]:
        return self.outliers.sections(numel) + self.rest.sections(numel)

    def _encode_parts(self, values, seed):
        payload, _ = self.outliers.compress(values, seed=seed)
        remaining = torch.empty_like(values)
        self.outliers.decode_into(payload, remaining)
        kernels = backends.kernels(values, self)
        if kernels:
            kernels.hybrid_split(values.data_ptr(), values.numel(), remaining.data_ptr())
        else:
            remaining = torch.where(remaining == 0, values, 0.0)
        rest, _ = self.rest.compress(remaining, seed=seed)
        return payload, rest

    def _decode_parts(self, payload, out, add):
        first = self.outliers.payload_nbytes(payload, out.numel())
        kept, decoded = torch.empty_like(out), torch.empty_like(out) if add else out
        self.rest.decode_into(payload[first:], decoded)
        self.outliers.decode_into(payload[:first], kept)
        kernels = backends.kernels(out, self)
        if kernels:
            kernels.hybrid_merge(kept.data_ptr(), kept.numel(), decoded.data_ptr())
        else:
            torch.where(kept == 0, decoded, kept, out=decoded)
        if add:
            out.add_(decoded)


# What the GPU launches.


@device_kernel
def hybrid_split(gpu, x, n, outliers):
    gpu.launch("topk", "hybrid_split", ceil_div(n, THREADS), x, n, outliers)


@device_kernel
def hybrid_merge(gpu, outliers, n, rest):
    gpu.launch("topk", "hybrid_merge", ceil_div(n, THREADS), outliers, n, rest)
