"""The kernels of the GPU under the names and with the arguments of the C++ ones (csrc/gcompress.h).

`DeviceKernels` plans launches and leaves them to a launcher: CuPy's on a device (launcher.py), and in tests one
that runs the same sources and the same plans on the host. Addresses are integers, as torch's `data_ptr()`.

Nothing here waits for the device, and sizes and workspaces depend on arguments alone, except where a method's
docstring says that it reads a number back.
"""

import copy
from typing import Any, NamedTuple

import torch

TILE = 4096  # entries that a block takes to shared memory
THREADS = 256
FOUR = 4 * THREADS  # entries a block has at four a thread
STEP_ALL, STEP_REDUCE, STEP_CODE = range(3)
SCALE_BYTES, PARTIAL_BYTES = 16, 32
CAST_NAMES = ("fp16", "fp8", "mxfp4")
SELECTION_BYTES = 24
DIGIT_BITS = (11, 10, 10)  # of a key, from the top
HISTOGRAM_BYTES = 4 << max(DIGIT_BITS)
MOST_HISTOGRAM_BLOCKS = 1024
BITMAP, FIXED, GAPS = range(3)  # forms of topk's index
LLOYD_BINS = 4096
ENTROPY_STATE_BYTES, ENTROPY_STATES, ENTROPY_CHUNK = 176, 32, 1 << 16


def ceil_div(a, b):
    return -(-a // b)


class Selected(NamedTuple):
    """Workspaces that say which entries are kept: see csrc/cuda/select.cuh."""

    tiles: int
    selection: Any
    survivors: Any  # their places in each tile, or None for all
    counts: Any
    above: Any  # of the tiles before each tile
    equal: Any

    def places(self):
        """Addresses, in the order in which kernels take them."""
        return [0 if part is None else part.data_ptr() for part in self[1:]]


class DeviceKernels:
    """A table of kernels for one device.

    Args:
        launcher: has `launch(module, kernel, blocks, *arguments, shared=0)`, `empty(nbytes)` and `zeros(nbytes)`.
    """

    # Compressors that have kernels; others run the torch reference on the device.
    methods = frozenset(
        (
            *("bf16", "chain", "fp16", "fp8", "hybrid", "mask", "mxfp4", "natural", "onebit", "qsgd", "quantize"),
            *("eden", "entropy", "lowrank", "polar", "randomk", "shared", "sign", "ternary", "threshold", "topk"),
        )
    )
    # Those whose encoder keeps the new residual of error feedback as well.
    remembers = frozenset(
        (
            *("bf16", "eden", "fp16", "fp8", "mask", "mxfp4", "onebit", "qsgd", "quantize", "shared", "sign"),
            *("ternary", "topk"),
        )
    )

    def __init__(self, launcher):
        self.launcher = launcher
        self._feedback = (0, 0, 0)

    def remembering(self, owed, fresh, poisoned):
        """These kernels with error feedback in the encoders: they encode x + owed and write what is lost.

        Args:
            owed: address of the residual, or 0 if there is none yet.
            fresh: address of the new residual, as many float32.
            poisoned: address of a uint32 that becomes 1 where the new residual is not finite.
        """
        other = copy.copy(self)
        other._feedback = (owed, fresh, poisoned)
        return other

    def feedback_restore(self, owed, n, poisoned, fresh):
        """Put the old residual in the place of a new one that is not finite."""
        self._launch("memory", "feedback_restore", ceil_div(n, FOUR), owed, n, poisoned, fresh)

    def _launch(self, module, kernel, blocks, *arguments, shared=0):
        self.launcher.launch(module, kernel, blocks, *arguments, shared=shared)

    def _zeros_into(self, target, nbytes):
        self._launch("memory", "fill_zeros", ceil_div(nbytes, 16 * THREADS), target, nbytes)

    def keep_left(self, x, n, sent):
        """The new residual, for an encoder that could not keep it: by what it decodes to."""
        owed, fresh, poisoned = self._feedback
        self._launch("memory", "feedback_left", ceil_div(n, FOUR), x, owed, sent, n, poisoned, fresh)

    def _copy(self, source, nbytes, target):
        if nbytes:
            self._launch("memory", "copy_bytes", ceil_div(nbytes, FOUR), source, nbytes, target)

    def _encode_buckets(self, module, name, x, n, bucket, payload, *extra, stages=1, codes=True):
        """One launch if buckets lie within a tile; else partial results, their merging and the codes apart.

        Returns the buckets' scales, where they are kept: if `codes` are another kernel's, or buckets large.
        """
        buckets = ceil_div(n, bucket)
        scales = self.launcher.empty(0 if codes and bucket <= TILE else SCALE_BYTES * buckets)
        if bucket <= TILE:
            blocks = ceil_div(n, TILE // bucket * bucket)
            places = 0, scales.data_ptr(), payload
            self._launch(module, f"{name}_encode", blocks, x, *self._feedback, n, bucket, STEP_ALL, 0, *places, *extra)
            return scales
        blocks = buckets * ceil_div(bucket, TILE)
        partials = self.launcher.empty(PARTIAL_BYTES * blocks)

        def launch(kernel, count, step, stage):
            places = partials.data_ptr(), scales.data_ptr(), payload
            self._launch(module, kernel, count, x, *self._feedback, n, bucket, step, stage, *places, *extra)

        for stage in range(stages):
            launch(f"{name}_encode", blocks, STEP_REDUCE, stage)
            launch(f"{name}_finish", buckets, STEP_REDUCE, stage)
        if codes:
            launch(f"{name}_encode", blocks, STEP_CODE, 0)
        return scales

    def quantize_encode(self, x, n, bits, bucket, stochastic, seed, payload):
        stages = 2 if bits == 1 and not stochastic else 1
        self._encode_buckets("quantize", "quantize", x, n, bucket, payload, bits, stochastic, seed, stages=stages)

    def quantize_decode(self, payload, n, bits, bucket, add, out):
        self._launch("quantize", "quantize_decode", ceil_div(n, FOUR), payload, n, bits, bucket, add, out)

    def sign_encode(self, x, n, bucket, means, payload):
        self._encode_buckets("sign", "sign", x, n, bucket, payload, means)

    def sign_decode(self, payload, n, bucket, means, add, out):
        self._launch("sign", "sign_decode", ceil_div(n, FOUR), payload, n, bucket, means, add, out)

    def cast_encode(self, x, n, form, bucket, payload):
        self._encode_buckets("cast", CAST_NAMES[form], x, n, bucket, payload)

    def cast_decode(self, payload, n, form, bucket, add, out):
        self._launch("cast", f"{CAST_NAMES[form]}_decode", ceil_div(n, FOUR), payload, n, bucket, add, out)

    def bf16_encode(self, x, n, payload):
        self._launch("cast", "bf16_encode", ceil_div(n, FOUR), x, *self._feedback, n, payload)

    def bf16_decode(self, payload, n, add, out):
        self._launch("cast", "bf16_decode", ceil_div(n, FOUR), payload, n, add, out)

    def qsgd_encode(self, x, n, bits, bucket, largest_norm, seed, payload):
        self._encode_buckets("qsgd", "qsgd", x, n, bucket, payload, bits, largest_norm, seed)

    def qsgd_decode(self, payload, n, bits, bucket, add, out):
        self._launch("qsgd", "qsgd_decode", ceil_div(n, FOUR), payload, n, bits, bucket, add, out)

    def ternary_encode(self, x, n, bucket, stochastic, clip, seed, payload):
        stages = 1 if stochastic else 2
        extra = stochastic, float(clip)
        scales = self._encode_buckets("ternary", "ternary", x, n, bucket, payload, *extra, stages=stages, codes=False)
        places = x, *self._feedback, n, bucket, scales.data_ptr()
        blocks = ceil_div(ceil_div(n, 5), THREADS)
        self._launch("ternary", "ternary_trits", blocks, *places, stochastic, seed, payload)

    def ternary_decode(self, payload, n, bucket, add, out):
        blocks = ceil_div(ceil_div(n, 5), THREADS)
        self._launch("ternary", "ternary_decode", blocks, payload, n, bucket, add, out)

    def natural_encode(self, x, n, seed, payload):
        self._launch("natural", "natural_encode", ceil_div(n, FOUR), x, n, seed, payload)

    def natural_decode(self, payload, n, add, out):
        self._launch("natural", "natural_decode", ceil_div(n, FOUR), payload, n, add, out)

    def randomk_encode(self, x, n, k, unbiased, seed, payload):
        poisoned = self.launcher.zeros(4)
        self._launch("randomk", "find_poison", ceil_div(n, FOUR), x, n, poisoned.data_ptr())
        places = poisoned.data_ptr(), payload
        self._launch("randomk", "randomk_encode", ceil_div(k, THREADS), x, n, k, unbiased, seed, *places)

    def randomk_decode(self, payload, n, k, add, out):
        if not add:
            self._zeros_into(out, 4 * n)
        self._launch("randomk", "randomk_decode", ceil_div(k, THREADS), payload, n, k, add, out)

    def _select(self, x, n, k, signed, feedback):
        """The k largest of n; `feedback`: (owed, fresh, poisoned), of which fresh gets all entries as not sent."""
        owed, _, _ = feedback
        tiles, empty = ceil_div(n, TILE), self.launcher.empty
        histogram, selection = self.launcher.zeros(HISTOGRAM_BYTES), self.launcher.zeros(SELECTION_BYTES)
        survivors, counts = empty(2 * TILE * tiles), empty(4 * tiles)
        above, equal = empty(4 * tiles), empty(4 * tiles)
        places = selection.data_ptr(), survivors.data_ptr(), counts.data_ptr()

        def launch(kernel, blocks, *arguments):
            self._launch("select", kernel, blocks, *arguments)

        def digit(bits, count):
            launch("select_digit", 1, histogram.data_ptr(), bits, count, selection.data_ptr())

        blocks = min(tiles, MOST_HISTOGRAM_BLOCKS)
        launch("select_histogram", blocks, x, owed, n, signed, tiles, histogram.data_ptr())
        digit(DIGIT_BITS[0], k)
        launch("select_survivors", tiles, x, *feedback, n, signed, *places, histogram.data_ptr())
        digit(DIGIT_BITS[1], 0)
        launch("select_refine", tiles, x, owed, n, signed, *places, histogram.data_ptr())
        digit(DIGIT_BITS[2], 0)
        launch("select_count", tiles, x, owed, n, signed, *places, above.data_ptr(), equal.data_ptr())
        launch("select_scan", 1, above.data_ptr(), equal.data_ptr(), tiles, selection.data_ptr())
        return Selected(tiles, selection, survivors, counts, above, equal)

    def topk_encode(self, x, n, k, form, width, workspace, capacity, payload):
        self._output(x, n, k, form, width, self._select(x, n, k, True, self._feedback), payload)

    def _output(self, x, n, k, form, width, selected, payload):
        """Values and index of what is selected. The bits of an index are put together in words, then copied."""
        owed, fresh, _ = self._feedback
        index, low_bytes = payload + 4 * k, ceil_div(k * width, 8)
        high_bytes = ceil_div(k + (n - 1 >> width), 8) if form == GAPS else 0
        low_words = ceil_div(low_bytes, 4) * 4 + 4
        words = self.launcher.zeros(0 if form == BITMAP else low_words + high_bytes + 4)
        low, high = words.data_ptr(), words.data_ptr() + low_words
        places = *selected.places(), payload, index, low, high
        self._launch("topk", "topk_output", selected.tiles, x, owed, fresh, n, form, width, *places)
        if form != BITMAP:
            self._copy(low, low_bytes, index)
            self._copy(high, high_bytes, index + low_bytes)

    def topk_decode(self, payload, n, k, form, width, add, out):
        """An index that is not k increasing places below n makes all of `out` NaN."""
        wrong, places = self.launcher.zeros(4), self.launcher.empty(4 * k)
        index, low_bytes, selection = payload + 4 * k, ceil_div(k * width, 8), None
        if not add:
            self._zeros_into(out, 4 * n)
        if form == FIXED:
            self._launch("topk", "fixed_places", ceil_div(k, THREADS), index, k, width, places.data_ptr())
        else:
            bitmap = index + (low_bytes if form == GAPS else 0)
            nbytes = ceil_div(k + (n - 1 >> width) if form == GAPS else n, 8)
            before, selection = self._counted("topk", "bitmap_count", ceil_div(8 * nbytes, TILE), bitmap, nbytes)
            low = index, width, form == GAPS, k, places.data_ptr()
            blocks = ceil_div(8 * nbytes, TILE)
            self._launch("topk", "bitmap_places", blocks, bitmap, nbytes, before.data_ptr(), *low)
        total = selection.data_ptr() if selection is not None else 0
        arguments = payload, places.data_ptr(), n, k, total, add, wrong.data_ptr(), out
        self._launch("topk", "topk_place", ceil_div(k, THREADS), *arguments)
        self.poison(wrong, n, out)
        return 0

    def _counted(self, module, kernel, tiles, *arguments):
        """What a kernel counts in each tile, summed over the tiles before; and where their total is."""
        before, selection = self.launcher.empty(4 * tiles), self.launcher.zeros(SELECTION_BYTES)
        self._launch(module, kernel, tiles, *arguments, before.data_ptr())
        self._launch("select", "select_scan", 1, before.data_ptr(), 0, tiles, selection.data_ptr())
        return before, selection

    def count_large(self, x, n, threshold, relative):
        """How many entries reach a threshold (see Threshold), and a memo of them for `large_encode`.

        Waits for the device, once: nobody knew the size of the payload.
        """
        tiles, empty = ceil_div(n, TILE), self.launcher.empty
        largest, selection = self.launcher.zeros(4), self.launcher.zeros(SELECTION_BYTES)
        above, equal = empty(4 * tiles), empty(4 * tiles)
        if relative:
            self._launch("select", "largest_key", ceil_div(n, FOUR), x, n, largest.data_ptr())
        places = largest.data_ptr(), float(threshold), relative, selection.data_ptr()
        self._launch("select", "threshold_key", 1, *places)
        selected = Selected(tiles, selection, None, None, above, equal)
        self._launch("select", "select_count", tiles, x, 0, n, True, *selected.places())
        self._launch("select", "select_scan", 1, above.data_ptr(), equal.data_ptr(), tiles, selection.data_ptr())
        return self.launcher.read(selection)[4] & 0xFFFFFFFF, selected

    def large_encode(self, x, n, k, selected, form, width, payload):
        """Values and index of the k entries that `count_large` found."""
        self._output(x, n, k, form, width, selected, payload)

    def hybrid_split(self, x, n, outliers):
        self._launch("topk", "hybrid_split", ceil_div(n, THREADS), x, n, outliers)

    def hybrid_merge(self, outliers, n, rest):
        self._launch("topk", "hybrid_merge", ceil_div(n, THREADS), outliers, n, rest)

    def mask_encode(self, x, n, k, bits, signed, lloyd, workspace, capacity, payload):
        owed, fresh, _ = self._feedback
        selected = self._select(x, n, k, signed, (owed, 0, 0))
        selection, _, _, above, equal = selected.places()
        chosen = selection, above, equal
        classes = self._lloyd_classes(x, owed, n, bits, signed, selected.tiles, chosen) if lloyd else None
        sums, counts = self.launcher.zeros(8 * 256), self.launcher.zeros(8 * 256)
        totals = sums.data_ptr(), counts.data_ptr()
        class_of_bin = classes.data_ptr() if lloyd else 0
        arguments = x, owed, n, k, bits, signed, *chosen, class_of_bin, *totals, payload
        self._launch("mask", "mask_codes", selected.tiles, *arguments)
        self._launch("mask", "mask_levels", 1, *totals, bits, signed, selection, payload)
        if fresh:  # what a level stands for is known only now
            sent = self.launcher.empty(4 * n)
            self.mask_decode(payload, n, k, bits, signed, False, sent.data_ptr())
            self.keep_left(x, n, sent.data_ptr())

    def _lloyd_classes(self, x, owed, n, bits, signed, tiles, chosen):
        histogram, classes = self.launcher.zeros(4 * LLOYD_BINS), self.launcher.empty(LLOYD_BINS)
        below = self.launcher.empty(2 * 8 * (LLOYD_BINS + 1))
        places = histogram.data_ptr(), bits, signed, below.data_ptr(), below.data_ptr() + 8 * (LLOYD_BINS + 1)
        self._launch("mask", "mask_histogram", tiles, x, owed, n, signed, *chosen, histogram.data_ptr())
        self._launch("mask", "mask_lloyd", 1, *places, classes.data_ptr())
        return classes

    def mask_decode(self, payload, n, k, bits, signed, add, out):
        """A mask that does not keep k entries makes all of `out` NaN."""
        wrong, tiles = self.launcher.zeros(4), ceil_div(n, TILE)
        codes = (1 << bits) - 1
        packed = payload + 4 * ((codes - 1) // 2 if signed else codes) + 4 * k
        before, selection = self._counted("mask", "mask_count", tiles, packed, n, bits)
        places = before.data_ptr(), selection.data_ptr(), add, wrong.data_ptr(), out
        self._launch("mask", "mask_decode", tiles, payload, n, k, bits, signed, *places)
        self.poison(wrong, n, out)
        return 0

    def shared_scales(self, x, n, bucket, scales):
        self._zeros_into(scales, 4 * ceil_div(n, bucket))
        warps = ceil_div(n, bucket) * ceil_div(bucket, TILE)
        self._launch("shared", "shared_scales", ceil_div(warps, THREADS // 32), x, self._feedback[0], n, bucket, scales)

    def shared_encode(self, x, n, bucket, limit, width, stochastic, seed, scales, payload):
        words = _word_count(n, width)
        arguments = x, *self._feedback, n, bucket, limit, width, stochastic, seed, scales, words, payload
        self._launch("shared", "shared_encode", ceil_div(words, THREADS), *arguments)

    def shared_decode(self, payload, n, bucket, limit, width, scales, add, out):
        words = _word_count(n, width)
        arguments = payload, n, bucket, limit, width, scales, words, add, out
        self._launch("shared", "shared_decode", ceil_div(words, THREADS), *arguments)

    def lowrank_decode(self, left, right, rows, columns, rank, n, add, out):
        self._launch("shared", "lowrank_decode", ceil_div(n, THREADS), left, right, columns, rank, n, add, out)

    def eden_encode(self, x, n, bits, block, sent, sent_tail, unbiased, seed, levels, payload):
        owed, fresh, _ = self._feedback
        shape = n, bits, block, sent, sent_tail
        places = x, owed, *shape, unbiased, seed, levels, payload
        self._launch("eden", "eden_encode", ceil_div(n, block), *places, shared=_eden_shared(block))
        if fresh:
            decoded = self.launcher.empty(4 * n)
            self.eden_decode(payload, *shape, levels, False, decoded.data_ptr())
            self.keep_left(x, n, decoded.data_ptr())

    def eden_decode(self, payload, n, bits, block, sent, sent_tail, levels, add, out):
        places = payload, n, bits, block, sent, sent_tail, levels, add, out
        self._launch("eden", "eden_decode", ceil_div(n, block), *places, shared=_eden_shared(block))

    def _planes(self, sections):
        """(offset, stride, bytes) of every plane of (bytes, stride) sections: a tensor, their number, the blocks."""
        planes, offset = [], 0
        for nbytes, stride in sections:
            planes += [(offset + p, stride, ceil_div(nbytes - p, stride)) for p in range(min(stride, nbytes))]
            offset += nbytes
        longest = max(count for _, _, count in planes)
        return self.launcher.numbers(tuple(planes)), len(planes), len(planes) * ceil_div(longest, ENTROPY_CHUNK)

    def entropy_payload(self, inner, size, sections, payload):
        """Encode `size` bytes; returns the payload's, for which it waits for the device, once."""
        planes, count, blocks = self._planes(sections)
        histograms, frequencies = self.launcher.zeros(8 * 256 * count), self.launcher.empty(2 * 256 * count)
        state, capacity = self.launcher.zeros(ENTROPY_STATE_BYTES), size + 2 * ENTROPY_STATES
        words, places = self.launcher.empty(capacity), self.launcher.empty(8 * count)
        modes, which, at = payload + 4, (planes.data_ptr(), count), state.data_ptr()
        codes = frequencies.data_ptr()

        def launch(kernel, blocks, *arguments):
            self._launch("entropy", kernel, blocks, *arguments)

        launch("entropy_histogram", blocks, inner, *which, histograms.data_ptr())
        launch("entropy_plan", 1, *which, histograms.data_ptr(), codes, at, modes)
        launch("entropy_code", 1, inner, *which, modes, codes, words.data_ptr(), capacity, at)
        launch("entropy_layout", 1, *which, size, codes, places.data_ptr(), at, payload)
        launch("entropy_raw", blocks, inner, *which, modes, places.data_ptr(), at, 0, payload)
        launch("entropy_words", ceil_div(capacity, FOUR), words.data_ptr(), capacity, at, payload)
        return self.launcher.read(state)[8] & 0xFFFFFFFF

    def entropy_inner(self, payload, size, sections, inner):
        """Decode to the bytes of the inner payload; returns a memo for `poison` of whether they are any."""
        planes, count, blocks = self._planes(sections)
        frequencies, places = self.launcher.empty(2 * 256 * count), self.launcher.empty(8 * count)
        state = self.launcher.zeros(ENTROPY_STATE_BYTES)
        which, codes, at = (planes.data_ptr(), count), frequencies.data_ptr(), state.data_ptr()
        self._launch("entropy", "entropy_parse", 1, payload, size, *which, codes, places.data_ptr(), at)
        self._launch("entropy", "entropy_raw", blocks, inner, *which, payload + 4, places.data_ptr(), at, 1, payload)
        self._launch("entropy", "entropy_decode", 1, payload, size, *which, codes, at, inner)
        return state[4:8]

    def polar_beyond(self, n, *where):
        """The places of entries that reach their limits, int64, rising; `where`: as polar_count_beyond takes them.

        Waits for the device, once: nobody knew how many there are.
        """
        tiles = ceil_div(n, TILE)
        before, selection = self._counted("polar_scan", "polar_count_beyond", tiles, *where)
        places = self.launcher.empty(8 * (self.launcher.read(selection)[4] & 0xFFFFFFFF)).view(torch.int64)
        if len(places):
            self._launch("polar_scan", "polar_beyond", tiles, *where, before.data_ptr(), places.data_ptr())
        return places

    def poison(self, wrong, n, out):
        """Make all of `out` NaN if a memo says so."""
        self._launch("memory", "poison", ceil_div(n, FOUR), wrong.data_ptr(), n, out)


def _eden_shared(block):
    """Bytes: the entries, with a gap behind every 32, and their codes."""
    return 4 * (block + block // 32) + block


def _word_count(n, width):
    whole = 64 * (64 // width)
    return n // whole * 64 + ceil_div(n % whole, 64 // width)
