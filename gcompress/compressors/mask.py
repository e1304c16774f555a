"""Mask-encoded sparsification: the largest entries exactly, a few bits for every other one.

Zhou et al., "Mask-Encoded Sparsification" (ECAI 2024, arXiv 2408.13787). Every entry gets
a b-bit code; one state, 2^b - 1, means "kept", so the codes are the index. The paper's
form (`signed=False`) is for activations behind a ReLU: codes 0 .. L-1 of L = 2^b - 1 for
what is dropped. For gradients (`signed=True`, ours) the L codes, an odd number, stand
symmetric about zero, which costs no sign bit. The paper reconstructs code m as m t / L from
the threshold t; here each code's mean is sent (`levels="mean"`), or the codes' borders are
moved to the Lloyd-Max optimum first (`levels="lloyd"`): a lower error for a few floats.

Bytes for n entries, k = max(1, round(n (1 - sparsity))) kept:
    4 h (levels, float32) + 4 k (kept values, float32, in index order) + ceil(n b / 8) (codes)
with h = (L - 1) / 2 levels in the signed form and h = L in the unsigned one.
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import TILE, ceil_div, device_kernel
from ..checks import check_choice, check_integer, check_sparsity
from ..errors import PayloadError
from .base import Compressor, Section, check_scales, code_section, kept_count, selection_workspace

FIXED_ONE = 65535  # a dropped magnitude is an integer in 1 / 65535 of the threshold
BINS = 4096  # of 16 such integers each, for Lloyd-Max


@dataclasses.dataclass(frozen=True)
class MaskSparse(Compressor):
    """The largest entries exactly, a few bits for each of the others; the mask of these bits is the index.

    Args:
        sparsity: fraction not kept, 0 <= sparsity < 1 (the paper's ratio).
        bits: bits per entry of the mask, 1 to 8. With 1 bit this is top-k with a bitmap.
        signed: True for gradients: kept by magnitude, levels symmetric about an exact
            zero. False for activations behind a ReLU: kept by value, negative entries are
            coded as zeros.
        levels: "mean" or "lloyd" (lower error; encoding takes about twice as long).

    Ties go to the lowest index. Biased, and a contraction: the error is at most that of
    top-k. Dropped entries decode to zero if the smallest kept one is below 2^-110. A
    non-finite entry is always among those kept (all of them, up to k).

    >>> payload, ctx = MaskSparse(sparsity=0.99, bits=2).compress(torch.randn(1 << 20))
    >>> payload.numel()  # of 4,194,304
    304092
    """

    name: ClassVar[str] = "mask"
    examples: ClassVar[tuple] = (
        "mask:sparsity=0.99,bits=2",
        "mask:sparsity=0.99,bits=1",
        "mask:sparsity=0.9,bits=3",
        "mask:sparsity=0.5,bits=5",
        "mask:sparsity=0.99,bits=8",
        "mask:sparsity=0.0,bits=2",
        "mask:sparsity=0.99,bits=2,signed=false",
        "mask:sparsity=0.9,bits=4,signed=false",
        "mask:sparsity=0.99,bits=2,levels=lloyd",
        "mask:sparsity=0.9,bits=3,signed=false,levels=lloyd",
        "mask:sparsity=0.9,bits=6,levels=lloyd",
    )
    kernels: ClassVar[tuple] = ("mask_encode", "mask_decode")
    shown: ClassVar[tuple] = ("sparsity", "bits")

    sparsity: float = 0.99
    bits: int = 2
    signed: bool = True
    levels: str = "mean"

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_integer("bits", self.bits, 1, 8)
        check_choice("signed", self.signed, (True, False))
        check_choice("levels", self.levels, ("mean", "lloyd"))

    @property
    def _codes(self):
        """Codes for dropped entries; the next one, 2^bits - 1 itself, means kept."""
        return 2**self.bits - 1

    @property
    def _largest_class(self):
        """Dropped entries fall into classes of magnitude 0 .. this."""
        return sent_levels(self.bits, self.signed) - (not self.signed)

    @property
    def _sent_levels(self):
        return sent_levels(self.bits, self.signed)

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        kept = kept_count(numel, self.sparsity)
        return 4 * self._sent_levels + 4 * kept + packing.packed_bytes(numel, self.bits)

    def sections(self, numel: int) -> list[Section]:
        kept = Section(4 * kept_count(numel, self.sparsity), 4, floats=True)
        return [Section(4 * self._sent_levels, 4, floats=True), kept, code_section(numel, self.bits)]

    def check(self, payload: torch.Tensor, numel: int) -> None:
        check_scales("levels hold", payload, self._sent_levels if numel else 0)

    def _encode_native(self, kernels, values, payload, seed):
        k = kept_count(values.numel(), self.sparsity)
        workspace = selection_workspace(values.numel(), k, values.device)
        kernels.mask_encode(
            values.data_ptr(), values.numel(), k, self.bits, self.signed, self.levels == "lloyd",
            workspace.data_ptr(), workspace.numel(), payload.data_ptr(),
        )  # fmt: skip

    def _decode_native(self, kernels, payload, out, add):
        k = kept_count(out.numel(), self.sparsity)
        return kernels.mask_decode(payload.data_ptr(), out.numel(), k, self.bits, self.signed, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        keys = packing.magnitude_keys(values, self.signed)
        threshold_key, kept = packing.select_largest(keys, kept_count(values.numel(), self.sparsity))
        threshold = _usable_threshold(threshold_key)
        # From here on integers decide: their sums and comparisons have no order or rounding.
        usable = ~kept & (keys < packing.INFINITY_KEY)
        to_fixed = torch.tensor(float(FIXED_ONE)) / threshold if threshold > 0 else torch.zeros(())
        fixed = torch.round(torch.where(usable, keys, 0).view(torch.float32) * to_fixed).to(torch.int64)
        if self.levels == "lloyd":
            counts = torch.bincount((fixed >> 4)[~kept], minlength=BINS)
            classes = self._lloyd_classes(counts.tolist()).to(values.device)[fixed >> 4]
        else:
            classes = (fixed * (self._largest_class + 1) + (1 << 15)) >> 16
            classes.clamp_(max=self._largest_class)
        if self.signed:
            codes = torch.where(values.view(torch.int32) < 0, -classes, classes) + self._largest_class
        else:
            codes = classes
        codes = torch.where(kept, self._codes, codes).to(torch.uint8)
        levels = self._level_means(fixed[~kept], classes[~kept], float(threshold))
        return torch.cat(
            [
                packing.float_to_bytes(levels.to(values.device)),
                packing.float_to_bytes(values[kept]),
                packing.pack_bits(codes, self.bits),
            ]
        )

    def _level_means(self, fixed, classes, threshold):
        """The mean magnitude of every sent class, float32 of shape [sent levels]."""
        size = self._largest_class + 1
        sums = torch.zeros(size, dtype=torch.int64, device=fixed.device).scatter_add_(0, classes, fixed)
        counts = torch.bincount(classes, minlength=size)
        means = sums.double() / counts.double() * (threshold / FIXED_ONE)
        return torch.where(counts > 0, means, 0.0).to(torch.float32)[size - self._sent_levels :]

    def _lloyd_classes(self, histogram):
        """The class of each of the 4096 bins after Lloyd's iteration, in double precision and a fixed order."""
        top = self._largest_class
        count, total = [0], [0]
        for number, members in enumerate(histogram):
            count.append(count[-1] + members)
            total.append(total[-1] + members * (16 * number + 8))
        level = [m * FIXED_ONE / (top + 1) for m in range(top + 1)]
        edge = [0] * (top + 1) + [BINS]  # class m is bins edge[m] .. edge[m + 1] - 1
        for _ in range(100):
            before = list(edge)
            for m in range(1, top + 1):
                edge[m] = int(((level[m - 1] + level[m]) / 2 + 8) / 16)
            if edge == before:
                break
            for m in range(1 if self.signed else 0, top + 1):
                members = count[edge[m + 1]] - count[edge[m]]
                if members > 0:
                    level[m] = (total[edge[m + 1]] - total[edge[m]]) / members
        sizes = [edge[m + 1] - edge[m] for m in range(top + 1)]
        return torch.repeat_interleave(torch.arange(top + 1), torch.tensor(sizes))

    def _decode_reference(self, payload, numel):
        k, sent = kept_count(numel, self.sparsity), self._sent_levels
        levels = packing.bytes_to_float(payload[: 4 * sent])
        values = packing.bytes_to_float(payload[4 * sent : 4 * sent + 4 * k])
        codes = packing.unpack_bits(payload[4 * sent + 4 * k :], numel, self.bits).to(torch.int64)
        kept = codes == self._codes
        if int(kept.sum()) != k:
            raise PayloadError(f"payload: {int(kept.sum())} entries are marked as kept, expected {k}")
        zero = levels.new_zeros(1)
        table = torch.cat([-levels.flip(0), zero, levels, zero] if self.signed else [levels, zero])
        out = table[codes]
        out[kept] = values
        return out


def sent_levels(bits, signed):
    """Levels in a payload: of all 2^bits - 1 codes, or of the half above zero in the signed form."""
    codes = 2**bits - 1
    return (codes - 1) // 2 if signed else codes


def _usable_threshold(key):
    """The threshold as float32, or 0 where nothing can be said about dropped entries: too small or not finite."""
    threshold = torch.tensor(key, dtype=torch.int32).view(torch.float32)
    usable = key < packing.INFINITY_KEY and threshold >= packing.SMALLEST_FIXED
    return threshold if usable else torch.zeros(())


# What the GPU launches.


@device_kernel(keeps_residual=True)
def mask_encode(gpu, x, n, k, bits, signed, lloyd, workspace, capacity, payload):
    residual, fresh, _ = gpu.feedback
    selected = gpu.select(x, n, k, signed, (residual, 0, 0))
    selection, _, _, above, equal = selected.places()
    chosen = selection, above, equal
    classes = _lloyd_on_device(gpu, x, residual, n, bits, signed, selected.tiles, chosen) if lloyd else None
    sums, counts = gpu.launcher.zeros(8 * 256), gpu.launcher.zeros(8 * 256)
    totals = sums.data_ptr(), counts.data_ptr()
    class_of_bin = classes.data_ptr() if lloyd else 0
    arguments = x, residual, n, k, bits, signed, *chosen, class_of_bin, *totals, payload
    gpu.launch("mask", "mask_codes", selected.tiles, *arguments)
    gpu.launch("mask", "mask_levels", 1, *totals, bits, signed, selection, payload)
    if fresh:  # what a level stands for is known only now
        sent = gpu.launcher.empty(4 * n)
        mask_decode(gpu, payload, n, k, bits, signed, False, sent.data_ptr())
        gpu.keep_residual(x, n, sent.data_ptr())


def _lloyd_on_device(gpu, x, residual, n, bits, signed, tiles, chosen):
    histogram, classes = gpu.launcher.zeros(4 * BINS), gpu.launcher.empty(BINS)
    below = gpu.launcher.empty(2 * 8 * (BINS + 1))
    places = histogram.data_ptr(), bits, signed, below.data_ptr(), below.data_ptr() + 8 * (BINS + 1)
    gpu.launch("mask", "mask_histogram", tiles, x, residual, n, signed, *chosen, histogram.data_ptr())
    gpu.launch("mask", "mask_lloyd", 1, *places, classes.data_ptr())
    return classes


@device_kernel
def mask_decode(gpu, payload, n, k, bits, signed, add, out):
    """A mask that does not keep k entries makes all of `out` NaN."""
    wrong, tiles = gpu.launcher.zeros(4), ceil_div(n, TILE)
    packed = payload + 4 * sent_levels(bits, signed) + 4 * k
    before, selection = gpu.counted("mask", "mask_count", tiles, packed, n, bits)
    places = before.data_ptr(), selection.data_ptr(), add, wrong.data_ptr(), out
    gpu.launch("mask", "mask_decode", tiles, payload, n, k, bits, signed, *places)
    gpu.poison(wrong, n, out)
    return 0
