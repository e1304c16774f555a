"""The largest entries by magnitude, with whichever index coding is smallest.

Sparsified SGD with memory (Stich et al., arXiv 1809.07599). With chunks, the
largest of each chunk are kept, as in SparseLoCo (Sarfi et al., arXiv 2508.15706). For n entries, k
kept and w low bits, the sizes n and k decide among these codings of the index, all of fixed size:
    bitmap   ceil(n / 8)
    fixed    ceil(k ceil(log2 n) / 8)
    gaps     ceil(k w / 8) + ceil((k + (n - 1 >> w)) / 8), Elias-Fano (Elias 1974): within
             half a bit an index of the entropy of a random choice
    places   ceil(k log2(chunk) / 8), where in its chunk each entry is; with chunks only

Bytes: 4 k (values, float32, in index order) + the index.
"""

import dataclasses
import functools
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import THREADS, TILE, ceil_div, device_kernel
from ..checks import check_choice, check_power_of_two, check_sparsity
from ..errors import ConfigError, PayloadError
from .base import Compressor, Section, kept_count, selection_words

FORMS = ("bitmap", "fixed", "gaps", "places")
BITMAP, FIXED, GAPS, PLACES = range(4)


@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """The largest entries by magnitude, exactly, and the smallest of some codings of their index; the rest is zero.

    It keeps k = max(1, round(n (1 - sparsity))) of n entries; with chunks, of each chunk's n.

    Args:
        sparsity: fraction set to zero, 0 <= sparsity < 1.
        index: "auto" (the smallest), "bitmap", "fixed", "gaps", or with chunks "places".
        chunk: consecutive entries of which the largest are kept, whatever other chunks hold: a power of two from 64
            to 65536 (the last chunk may be shorter); 0: the whole tensor.

    Ties go to the lowest index. Biased; a contraction with delta >= k / n, in chunks with the least k / n of them, so
    it converges with error feedback. Values are float32: a float64 entry is rounded to it.

    >>> payload, ctx = TopK(sparsity=0.99).compress(torch.randn(1 << 20))
    >>> payload.numel(), TopK(sparsity=0.99).nbytes(1 << 20)
    (53168, 53168)
    >>> TopK(sparsity=0.984375, chunk=4096, index="places").nbytes(1 << 20)  # 64 of each 4096, at 32 + 12 bits
    90112
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
        "topk:sparsity=0.984375,index=places,chunk=4096",
        "topk:sparsity=0.9,chunk=64",
        "topk:sparsity=0.5,index=bitmap,chunk=128",
        "topk:sparsity=0.999,index=places,chunk=8192",
        "topk:sparsity=0.9,index=gaps,chunk=1024",
    )
    kernels: ClassVar[tuple] = ("topk_encode", "chunk_encode", "topk_decode")
    shown: ClassVar[tuple] = ("sparsity",)
    sparse: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    sparsity: float = 0.99
    index: str = "auto"
    chunk: int = 0

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_choice("index", self.index, ("auto", *FORMS))
        check_power_of_two("chunk", self.chunk, 64, 65536, zero="the whole tensor")
        if self.index == "places" and self.chunk == 0:
            raise ConfigError("index: got 'places' with chunk=0, expected a chunk with it")

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        return 4 * self._kept(numel)[0] + self._layout(numel)[2]

    def sections(self, numel: int) -> list[Section]:
        return [Section(4 * self._kept(numel)[0], 4, floats=True), Section(self._layout(numel)[2])]

    def _kept(self, numel):
        """Entries kept of numel, and of a whole chunk (0 without chunks)."""
        if self.chunk == 0:
            return kept_count(numel, self.sparsity), 0
        chunks, rest = divmod(numel, self.chunk)
        of_chunk = kept_count(self.chunk, self.sparsity)
        return chunks * of_chunk + kept_count(rest, self.sparsity), of_chunk

    def _words(self, numel):
        """32-bit words of scratch memory for the C++ selection."""
        # Of all entries: a key and a place for each that the selection looks at.
        return 2 * self.chunk + 64 if self.chunk else 2 * selection_words(numel, self._kept(numel)[0])

    def _layout(self, numel):
        """(form, width in bits, index bytes) for numel entries."""
        return index_layout(numel, self._kept(numel)[0], self.index, self.chunk)

    def _encode_native(self, kernels, values, payload, seed):
        numel, (form, width, _) = values.numel(), self._layout(values.numel())
        k, of_chunk = self._kept(numel)
        workspace = torch.empty(self._words(numel), dtype=torch.int32, device=values.device)
        places = workspace.data_ptr(), workspace.numel(), payload.data_ptr()
        encode = kernels.chunk_encode if self.chunk else kernels.topk_encode
        chunks = (self.chunk, of_chunk) if self.chunk else ()
        encode(values.data_ptr(), numel, k, *chunks, FORMS.index(form), width, *places)

    def _decode_native(self, kernels, payload, out, add):
        numel, (form, width, _) = out.numel(), self._layout(out.numel())
        shape = numel, self._kept(numel)[0], FORMS.index(form), width, self._kept(numel)[1]
        return kernels.topk_decode(payload.data_ptr(), *shape, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        form, width, _ = self._layout(values.numel())
        (k, of_chunk), keys = self._kept(values.numel()), packing.magnitude_keys(values)
        kept = _largest_of_chunks(keys, k, self.chunk, of_chunk) if self.chunk else packing.select_largest(keys, k)[1]
        return encode_kept(values, kept, form, width)

    def _decode_reference(self, payload, numel):
        form, width, _ = self._layout(numel)
        return decode_kept(payload, numel, self._kept(numel)[0], form, width, self._kept(numel)[1])


def _largest_of_chunks(keys, k, chunk, of_chunk):
    """The bool tensor of the `of_chunk` largest int32 keys of each chunk; k of all, the others in the last chunk."""
    rows = torch.nn.functional.pad(keys, (0, -keys.numel() % chunk), value=-1).view(-1, chunk)
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :of_chunk], True)
    kept[-1, order[-1, k - (len(rows) - 1) * of_chunk :]] = False
    return kept.view(-1)[: keys.numel()]


@functools.lru_cache(maxsize=4096)  # asked for several times for every gradient
def index_layout(numel, k, index="auto", chunk=0):
    """(form, width in bits, bytes) of the smallest index of k among numel entries that `index` allows."""
    if numel >= 2**32:
        raise ConfigError(f"tensor: got {numel} entries, expected fewer than 2^32")
    fixed, gaps = max(1, (numel - 1).bit_length()), packing.gap_width(numel, k)
    candidates = [
        ("bitmap", 0, packing.packed_bytes(numel, 1)),
        ("fixed", fixed, packing.packed_bytes(k, fixed)),
        ("gaps", gaps, packing.gap_bytes(numel, k, gaps)),
    ]
    if chunk:
        place = chunk.bit_length() - 1
        candidates.append(("places", place, packing.packed_bytes(k, place)))
    allowed = [c for c in candidates if index in ("auto", c[0])]
    return min(allowed, key=lambda candidate: candidate[2])


def encode_kept(values, kept, form, width):
    """The bytes of the entries that the bool tensor `kept` marks: values, then their index."""
    indices = torch.nonzero(kept).view(-1)
    if form == "bitmap":
        index = packing.pack_bits(kept, 1)
    elif form == "gaps":
        index = packing.pack_gaps(indices, values.numel(), width)
    else:
        index = packing.pack_bits(indices & ((1 << width) - 1), width)
    return torch.cat([packing.float_to_bytes(values[indices]), index])


def decode_kept(payload, numel, k, form, width, of_chunk=0):
    """The float32 tensor of numel entries behind `encode_kept`; PayloadError unless k indices increase.

    of_chunk: entries kept of each chunk of 2^width, for places in them.
    """
    packed = payload[4 * k :]
    if form == "bitmap":
        indices = torch.nonzero(packing.unpack_bits(packed, 8 * packed.numel(), 1)).view(-1)
    elif form == "gaps":
        indices = packing.unpack_gaps(packed, numel, k, width)
    else:
        indices = packing.unpack_bits(packed, k, width).to(torch.int64)
        if form == "places":
            indices += torch.arange(k, device=payload.device) // of_chunk << width
    if indices.numel() != k or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any()):
        raise PayloadError(f"payload: expected {k} strictly increasing indices below {numel}")
    out = torch.zeros(numel, dtype=torch.float32, device=payload.device)
    out[indices] = packing.bytes_to_float(payload[: 4 * k])
    return out


# What the GPU launches.


@device_kernel(keeps_residual=True)
def topk_encode(gpu, x, n, k, form, width, workspace, capacity, payload):
    send_kept(gpu, x, n, k, form, width, gpu.select(x, n, k, True, gpu.feedback), payload)


@device_kernel(keeps_residual=True)
def chunk_encode(gpu, x, n, k, chunk, kept, form, width, workspace, capacity, payload):
    what = x, *gpu.feedback, n, k, chunk, kept, form, width
    _send(gpu, "chunk_output", ceil_div(n, chunk), what, n, k, form, width, payload)


def send_kept(gpu, x, n, k, form, width, selected, payload):
    """Values and index of what is selected."""
    residual, fresh, _ = gpu.feedback
    what = x, residual, fresh, n, form, width, *selected.places()
    _send(gpu, "topk_output", selected.tiles, what, n, k, form, width, payload)


def _send(gpu, kernel, blocks, what, n, k, form, width, payload):
    """Run what writes values and index. The bits of an index are put together in words, then copied."""
    index, low_bytes = payload + 4 * k, ceil_div(k * width, 8)
    high_bytes = ceil_div(k + (n - 1 >> width), 8) if form == GAPS else 0
    low_words = ceil_div(low_bytes, 4) * 4 + 4
    words = gpu.launcher.zeros(0 if form == BITMAP else low_words + high_bytes + 4)
    low, high = words.data_ptr(), words.data_ptr() + low_words
    gpu.launch("topk", kernel, blocks, *what, payload, index, low, high)
    if form != BITMAP:
        gpu.copy(low, low_bytes, index)
        gpu.copy(high, high_bytes, index + low_bytes)


@device_kernel
def topk_decode(gpu, payload, n, k, form, width, kept, add, out):
    """An index that is not k increasing places below n makes all of `out` NaN."""
    wrong, places = gpu.launcher.zeros(4), gpu.launcher.empty(4 * k)
    index, low_bytes, selection = payload + 4 * k, ceil_div(k * width, 8), None
    if not add:
        gpu.zeros_into(out, 4 * n)
    if form in (FIXED, PLACES):
        gpu.launch("topk", "fixed_places", ceil_div(k, THREADS), index, k, width, kept, places.data_ptr())
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
