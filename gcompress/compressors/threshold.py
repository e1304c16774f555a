"""Every entry that is large enough, however many those are.

Hard thresholding: Strom (2015) for speech models; Sahu et al., "Rethinking gradient
sparsification as total error minimization" (arXiv 2108.00951): with error feedback an
absolute threshold errs less over a whole training than the top-k of the same bytes, since
it sends more when gradients are large and nearly nothing when they are small.

Bytes, of variable size, for n entries of which k are large enough (0 <= k <= n):
    4 (k, uint32) + 4 k (values, float32, in index order) + the index as in topk, absent for k = 0
"""

import dataclasses
from typing import ClassVar

import torch

from .. import packing
from ..backends.gpu.plans import FOUR, SELECTION_BYTES, TILE, Selected, ceil_div, device_kernel
from ..checks import check_choice, is_number, shown
from ..errors import ConfigError, PayloadError
from ..packing import read_u32, u32_bytes
from .base import Compressor
from .topk import FORMS, decode_kept, encode_kept, index_layout, send_kept


@dataclasses.dataclass(frozen=True)
class Threshold(Compressor):
    """Every entry of at least a given magnitude, exactly; the rest is zero.

    Args:
        threshold: positive, in units of the gradient, or of its largest magnitude.
        relative: whether it is a fraction of the tensor's largest magnitude, then at most 1.

    Biased. An absolute threshold is no contraction, since a small gradient is not sent at all.
    It converges with error feedback all the same, which holds every entry's residual below the
    threshold. A non-finite entry is always kept. `nbytes` is the size if all are.

    >>> payload, ctx = Threshold(threshold=2.5).compress(torch.randn(1 << 20))
    >>> payload.numel() < 80_000  # about 1.2 % are kept
    True
    """

    name: ClassVar[str] = "threshold"
    examples: ClassVar[tuple] = (
        "threshold:threshold=2.0",
        "threshold:threshold=1e-05",
        "threshold:threshold=0.3,relative=true",
    )
    kernels: ClassVar[tuple] = ("largest_key", "count_keys", "keys_encode", "topk_decode")
    device_kernels: ClassVar[tuple] = ("count_large", "large_encode", "topk_decode")
    shown: ClassVar[tuple] = ("threshold",)
    fixed_size: ClassVar[bool] = False
    sparse: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    threshold: float = 0.01
    relative: bool = False

    def __post_init__(self):
        check_choice("relative", self.relative, (True, False))
        largest = 1 if self.relative else packing.LARGEST
        if not is_number(self.threshold) or not packing.SMALLEST_NORMAL <= self.threshold <= largest:
            expected = "from 2^-126 to 1 when relative" if self.relative else "a positive float32 of at least 2^-126"
            raise ConfigError(f"threshold: got {shown(self.threshold)}, expected {expected}")

    def nbytes(self, numel: int) -> int:
        return self._size(numel, numel) if numel else 0

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        k = read_u32(start)
        if k > numel:
            raise PayloadError(f"payload: says that {k} of {numel} entries are kept")
        return self._size(numel, k)

    def _size(self, numel, k):
        return 4 + 4 * k + (index_layout(numel, k)[2] if k else 0)

    def _key(self, largest):
        """The smallest key to keep, given the largest one: keys order like magnitudes."""
        threshold = torch.tensor(self.threshold, dtype=torch.float32)
        if self.relative:
            if largest >= packing.INFINITY_KEY:
                return packing.INFINITY_KEY
            threshold = threshold * torch.tensor(largest, dtype=torch.int32).view(torch.float32)
        return max(1, int(threshold.view(torch.int32)))

    def _encode_native(self, kernels, values, payload, seed):
        numel = values.numel()
        if kernels.on_device:
            return self._encode_device(kernels, values, payload)
        key = self._key(kernels.largest_key(values.data_ptr(), numel) if self.relative else 0)
        k = kernels.count_keys(values.data_ptr(), numel, key)
        payload[:4] = u32_bytes(k, payload.device)
        if k > 0:
            form, width, _ = index_layout(numel, k)
            kernels.keys_encode(values.data_ptr(), numel, k, key, FORMS.index(form), width, payload.data_ptr() + 4)
        return self._size(numel, k)

    def _encode_device(self, kernels, values, payload):
        """As above, where the key is found by the device too, which is waited for once."""
        numel = values.numel()
        threshold = float(torch.tensor(self.threshold, dtype=torch.float32))
        k, memo = kernels.count_large(values.data_ptr(), numel, threshold, self.relative)
        payload[:4] = u32_bytes(k, payload.device)
        if k > 0:
            form, width, _ = index_layout(numel, k)
            place = payload.data_ptr() + 4
            kernels.large_encode(values.data_ptr(), numel, k, memo, FORMS.index(form), width, place)
        return self._size(numel, k)

    def _decode_native(self, kernels, payload, out, add):
        k = read_u32(payload)
        if k == 0:
            if not add:
                out.zero_()
            return 0
        form, width, _ = index_layout(out.numel(), k)
        return kernels.topk_decode(
            payload.data_ptr() + 4, out.numel(), k, FORMS.index(form), width, 0, add, out.data_ptr()
        )

    def _encode_reference(self, values, seed):
        keys = packing.magnitude_keys(values)
        kept = keys >= self._key(int(keys.max()))
        k = int(kept.sum())
        header = u32_bytes(k, values.device)
        if k == 0:
            return header
        form, width, _ = index_layout(values.numel(), k)
        return torch.cat([header, encode_kept(values, kept, form, width)])

    def _decode_reference(self, payload, numel):
        k = read_u32(payload)
        if k == 0:
            return torch.zeros(numel, device=payload.device)
        form, width, _ = index_layout(numel, k)
        return decode_kept(payload[4:], numel, k, form, width)


# What the GPU launches.


@device_kernel
def count_large(gpu, x, n, threshold, relative):
    """How many entries reach a threshold (see Threshold), and a memo of them for `large_encode`.

    Waits for the device, once: nobody knew the size of the payload.
    """
    tiles, empty = ceil_div(n, TILE), gpu.launcher.empty
    largest, selection = gpu.launcher.zeros(4), gpu.launcher.zeros(SELECTION_BYTES)
    above, equal = empty(4 * tiles), empty(4 * tiles)
    if relative:
        gpu.launch("select", "largest_key", ceil_div(n, FOUR), x, n, largest.data_ptr())
    places = largest.data_ptr(), float(threshold), relative, selection.data_ptr()
    gpu.launch("select", "threshold_key", 1, *places)
    selected = Selected(tiles, selection, None, None, above, equal)
    gpu.launch("select", "select_count", tiles, x, 0, n, True, *selected.places())
    gpu.launch("select", "select_scan", 1, above.data_ptr(), equal.data_ptr(), tiles, selection.data_ptr())
    return gpu.launcher.read(selection)[4] & 0xFFFFFFFF, selected


@device_kernel
def large_encode(gpu, x, n, k, selected, form, width, payload):
    """Values and index of the k entries that `count_large` found."""
    send_kept(gpu, x, n, k, form, width, selected, payload)
