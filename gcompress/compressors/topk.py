"""The largest entries by magnitude, with whichever index coding is smallest.

Sparsified SGD with memory (Stich et al., arXiv 1809.07599). For n entries, k kept and w
low bits, the sizes n and k decide among three codings of the index, all of fixed size:
    bitmap   ceil(n / 8)
    fixed    ceil(k ceil(log2 n) / 8)
    gaps     ceil(k w / 8) + ceil((k + (n - 1 >> w)) / 8), Elias-Fano (Elias 1974): within
             half a bit an index of the entropy of a random choice

Bytes: 4 k (values, float32, in index order) + the index.
"""

import dataclasses
import functools
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import THREADS, TILE, ceil_div, device_kernel
from ..checks import check_choice, check_sparsity
from ..errors import ConfigError, PayloadError
from .base import Compressor, Section, kept_count, selection_workspace

FORMS = ("bitmap", "fixed", "gaps")
BITMAP, FIXED, GAPS = range(3)


@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """The largest entries by magnitude, exactly, and the smallest of three codings of their index; the rest is zero.

    It keeps k = max(1, round(n (1 - sparsity))) of n.

    Args:
        sparsity: fraction set to zero, 0 <= sparsity < 1.
        index: "auto" (the smallest), "bitmap", "fixed" or "gaps".

    Ties go to the lowest index. Biased; a contraction with delta >= k / n, so it converges
    with error feedback. Values are float32: a float64 entry is rounded to it.

    >>> payload, ctx = TopK(sparsity=0.99).compress(torch.randn(1 << 20))
    >>> payload.numel(), TopK(sparsity=0.99).nbytes(1 << 20)
    (53168, 53168)
    """

    name: ClassVar[str] = "topk"
    examples: ClassVar[tuple] = (
        "topk:sparsity=0.99",
        "topk:sparsity=0.9999",
        "topk:sparsity=0.5",
        "topk:sparsity=0.0",
        "topk:sparsity=0.9,index=fixed",
        "topk:sparsity=0.9,index=bitmap",
        "topk:sparsity=0.5,index=gaps",
    )
    kernels: ClassVar[tuple] = ("topk_encode", "topk_decode")
    shown: ClassVar[tuple] = ("sparsity",)
    sparse: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    sparsity: float = 0.99
    index: str = "auto"

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_choice("index", self.index, ("auto", *FORMS))

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        return 4 * kept_count(numel, self.sparsity) + self._layout(numel)[2]

    def sections(self, numel: int) -> list[Section]:
        return [Section(4 * kept_count(numel, self.sparsity), 4, floats=True), Section(self._layout(numel)[2])]

    def _layout(self, numel):
        """(form, width in bits, index bytes) for numel entries."""
        return index_layout(numel, kept_count(numel, self.sparsity), self.index)

    def _encode_native(self, kernels, values, payload, seed):
        form, width, _ = self._layout(values.numel())
        k = kept_count(values.numel(), self.sparsity)
        workspace = selection_workspace(values.numel(), k, values.device)
        kernels.topk_encode(
            values.data_ptr(), values.numel(), k, FORMS.index(form), width,
            workspace.data_ptr(), workspace.numel(), payload.data_ptr(),
        )  # fmt: skip

    def _decode_native(self, kernels, payload, out, add):
        form, width, _ = self._layout(out.numel())
        k = kept_count(out.numel(), self.sparsity)
        return kernels.topk_decode(payload.data_ptr(), out.numel(), k, FORMS.index(form), width, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        form, width, _ = self._layout(values.numel())
        k = kept_count(values.numel(), self.sparsity)
        _, kept = packing.select_largest(packing.magnitude_keys(values), k)
        return encode_kept(values, kept, form, width)

    def _decode_reference(self, payload, numel):
        form, width, _ = self._layout(numel)
        return decode_kept(payload, numel, kept_count(numel, self.sparsity), form, width)


@functools.lru_cache(maxsize=4096)  # asked for several times for every gradient
def index_layout(numel, k, index="auto"):
    """(form, width in bits, bytes) of the smallest index of k among numel entries that `index` allows."""
    if numel >= 2**32:
        raise ConfigError(f"tensor: got {numel} entries, expected fewer than 2^32")
    fixed, gaps = max(1, (numel - 1).bit_length()), packing.gap_width(numel, k)
    candidates = [
        ("bitmap", 0, packing.packed_bytes(numel, 1)),
        ("fixed", fixed, packing.packed_bytes(k, fixed)),
        ("gaps", gaps, packing.gap_bytes(numel, k, gaps)),
    ]
    allowed = [c for c in candidates if index in ("auto", c[0])]
    return min(allowed, key=lambda candidate: candidate[2])


def encode_kept(values, kept, form, width):
    """The bytes of the entries that the bool tensor `kept` marks: values, then their index."""
    indices = torch.nonzero(kept).view(-1)
    if form == "bitmap":
        index = packing.pack_bits(kept, 1)
    elif form == "fixed":
        index = packing.pack_bits(indices, width)
    else:
        index = packing.pack_gaps(indices, values.numel(), width)
    return torch.cat([packing.float_to_bytes(values[indices]), index])


def decode_kept(payload, numel, k, form, width):
    """The float32 tensor of numel entries behind `encode_kept`; PayloadError unless k indices increase."""
    packed = payload[4 * k :]
    if form == "bitmap":
        indices = torch.nonzero(packing.unpack_bits(packed, 8 * packed.numel(), 1)).view(-1)
    elif form == "fixed":
        indices = packing.unpack_bits(packed, k, width).to(torch.int64)
    else:
        indices = packing.unpack_gaps(packed, numel, k, width)
    if indices.numel() != k or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any()):
        raise PayloadError(f"payload: expected {k} strictly increasing indices below {numel}")
    out = torch.zeros(numel, dtype=torch.float32, device=payload.device)
    out[indices] = packing.bytes_to_float(payload[: 4 * k])
    return out


# What the GPU launches.


@device_kernel(keeps_residual=True)
def topk_encode(gpu, x, n, k, form, width, workspace, capacity, payload):
    send_kept(gpu, x, n, k, form, width, gpu.select(x, n, k, True, gpu.feedback), payload)


def send_kept(gpu, x, n, k, form, width, selected, payload):
    """Values and index of what is selected. The bits of an index are put together in words, then copied."""
    residual, fresh, _ = gpu.feedback
    index, low_bytes = payload + 4 * k, ceil_div(k * width, 8)
    high_bytes = ceil_div(k + (n - 1 >> width), 8) if form == GAPS else 0
    low_words = ceil_div(low_bytes, 4) * 4 + 4
    words = gpu.launcher.zeros(0 if form == BITMAP else low_words + high_bytes + 4)
    low, high = words.data_ptr(), words.data_ptr() + low_words
    places = *selected.places(), payload, index, low, high
    gpu.launch("topk", "topk_output", selected.tiles, x, residual, fresh, n, form, width, *places)
    if form != BITMAP:
        gpu.copy(low, low_bytes, index)
        gpu.copy(high, high_bytes, index + low_bytes)


@device_kernel
def topk_decode(gpu, payload, n, k, form, width, add, out):
    """An index that is not k increasing places below n makes all of `out` NaN."""
    wrong, places = gpu.launcher.zeros(4), gpu.launcher.empty(4 * k)
    index, low_bytes, selection = payload + 4 * k, ceil_div(k * width, 8), None
    if not add:
        gpu.zeros_into(out, 4 * n)
    if form == FIXED:
        gpu.launch("topk", "fixed_places", ceil_div(k, THREADS), index, k, width, places.data_ptr())
    else:
        bitmap = index + (low_bytes if form == GAPS else 0)
        nbytes = ceil_div(k + (n - 1 >> width) if form == GAPS else n, 8)
        before, selection = gpu.counted("topk", "bitmap_count", ceil_div(8 * nbytes, TILE), bitmap, nbytes)
        low = index, width, form == GAPS, k, places.data_ptr()
        blocks = ceil_div(8 * nbytes, TILE)
        gpu.launch("topk", "bitmap_places", blocks, bitmap, nbytes, before.data_ptr(), *low)
    total = selection.data_ptr() if selection is not None else 0
    arguments = payload, places.data_ptr(), n, k, total, add, wrong.data_ptr(), out
    gpu.launch("topk", "topk_place", ceil_div(k, THREADS), *arguments)
    gpu.poison(wrong, n, out)
    return 0
