"""Another compressor's bytes, entropy-coded: for links so slow that every byte counts.

Asymmetric numeral systems with a range (rANS; Duda, arXiv 1311.2540), with 32 states that take
turns (Giesen, arXiv 1402.3392) and frequencies of 12 bits. The inner payload is split into
planes of bytes of the same kind: the four bytes of float32 values, and for codes the bytes in
which codes begin at the same bits. A plane is coded by its own frequencies, or left as it is if
coding would not make it smaller. QSGD (arXiv 1610.02132) and THC count their bits after such a coding.

Bytes, of variable size, with P planes of which some are coded:
    4 (the payload's length, uint32) + P (whether each is coded) + tables + raw planes
    + 128 (states) + coded words of 16 bits
and 4 + P + those of the inner payload at most.
"""

import ctypes
import dataclasses
from typing import ClassVar

import torch

from ..backends.gpu.plans import FOUR, ceil_div, device_kernel
from ..errors import ConfigError, PayloadError
from ..packing import read_u32, u32_bytes
from .base import Compressor
from .quantize import Quantize
from .spec import read_parts

LANES = 32
PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
LOWEST_STATE = 1 << 15
MAX_PLANES = 128
SMALLEST_CODED = 64
STATE_BYTES, CHUNK = 176, 1 << 16  # on the GPU: of its coder, and bytes that a block counts or copies


@dataclasses.dataclass(frozen=True)
class Entropy(Compressor):
    """The payload of a compressor of fixed size, entropy-coded without loss.

    Args:
        inner: the compressor. Codes of few bits gain much (quantize, mask, ternary; those of 3, 5,
            6 or 7 bits less, since some lie in two bytes), float32 values an eighth, gap-coded
            indices nothing.

    All traits but the size are those of `inner`; `nbytes` is a bound.

    >>> _ = torch.manual_seed(0)  # how much it saves depends on the largest entry
    >>> payload, ctx = Entropy(Quantize(bits=4, bucket=0)).compress(torch.randn(1 << 20))
    >>> payload.numel() < 0.7 * Quantize(bits=4, bucket=0).nbytes(1 << 20)
    True
    """

    name: ClassVar[str] = "entropy"
    examples: ClassVar[tuple] = (
        "entropy:(quantize:bits=4)",
        "entropy:(quantize:bits=3,bucket=0,rounding=stochastic)",
        "entropy:(topk:sparsity=0.9)",
        "entropy:(hybrid:(topk:sparsity=0.99),(mask:sparsity=0.99,bits=5))",
    )
    kernels: ClassVar[tuple] = ("entropy_encode", "entropy_decode")
    device_kernels: ClassVar[tuple] = ("entropy_payload", "entropy_inner")
    parts: ClassVar[tuple] = ("inner",)
    fixed_size: ClassVar[bool] = False

    inner: Compressor = Quantize()

    def __post_init__(self):
        read_parts(self)
        if not self.inner.fixed_size:
            raise ConfigError(f"inner: got {self.inner}, expected a compressor of fixed size")
        planes = sum(section.stride for section in self.inner.sections(1 << 20))
        if planes > MAX_PLANES:
            raise ConfigError(f"inner: got {self.inner} with {planes} planes of bytes, expected at most {MAX_PLANES}")

    @property
    def unbiased(self) -> bool:
        return self.inner.unbiased

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # of the parts
        return self.inner.sparse

    @property
    def exact(self) -> bool:  # type: ignore[override]  # of the parts
        return self.inner.exact

    def nbytes(self, numel: int) -> int:
        if numel == 0:
            return 0
        size = 4 + len(self._planes(numel)) + self.inner.nbytes(numel)
        if size >= 2**32:
            raise ConfigError(f"tensor: got {numel} entries, expected fewer than 2^32 bytes of {self.inner}")
        return size

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        size = read_u32(start)
        if size > self.nbytes(numel):
            raise PayloadError(f"payload: says it has {size} bytes, expected at most {self.nbytes(numel)} of {self}")
        return size

    def _planes(self, numel):
        """The slices of the inner payload that are coded each by itself."""
        planes, start = [], 0
        for size, stride, _ in self.inner.sections(numel):
            planes += [slice(start + phase, start + size, stride) for phase in range(min(stride, size))]
            start += size
        return planes

    def _native_sections(self, numel):
        sections = self.inner.sections(numel)
        flat = [number for section in sections for number in (section.nbytes, section.stride)]
        return (ctypes.c_int64 * len(flat))(*flat), len(sections)

    def _encode_native(self, kernels, values, payload, seed):
        inner, _ = self.inner.compress(values, seed=seed)
        if kernels.on_device:
            sections = [section[:2] for section in self.inner.sections(values.numel())]
            return kernels.entropy_payload(inner.data_ptr(), inner.numel(), sections, payload.data_ptr())
        workspace = torch.empty(inner.numel() + 2 * LANES, dtype=torch.uint8)
        sections, count = self._native_sections(values.numel())
        return kernels.entropy_encode(inner.data_ptr(), sections, count, workspace.data_ptr(), payload.data_ptr())

    def _decode_native(self, kernels, payload, out, add):
        inner = torch.empty(self.inner.nbytes(out.numel()), dtype=torch.uint8, device=out.device)
        if kernels.on_device:
            return self._decode_device(kernels, payload, inner, out, add)
        sections, count = self._native_sections(out.numel())
        if kernels.entropy_decode(payload.data_ptr(), payload.numel(), sections, count, inner.data_ptr()):
            raise PayloadError(f"payload: no entropy coding of {inner.numel()} bytes of {self.inner}")
        self.inner.decode_into(inner, out, add)

    def _decode_device(self, kernels, payload, inner, out, add):
        """Bytes that no encoder writes become NaN: to raise an error, the host would have to wait for the device."""
        inner.zero_()
        sections = [section[:2] for section in self.inner.sections(out.numel())]
        wrong = kernels.entropy_inner(payload.data_ptr(), payload.numel(), sections, inner.data_ptr())
        self.inner.decode_into(inner, out, add)
        kernels.poison(wrong, out.numel(), out.data_ptr())

    def _encode_reference(self, values, seed):
        payload, _ = self.inner.compress(values, seed=seed)
        inner = payload.cpu()
        planes = [inner[plane] for plane in self._planes(values.numel())]
        frequencies = [_worthwhile_frequencies(plane) for plane in planes]
        raw_size = 4 + len(planes) + inner.numel()
        coded = None
        if sum(saved for saved, _ in frequencies) > 4 * LANES:
            coded = self._coded(planes, [found for _, found in frequencies])
        if coded is None or coded.numel() + 4 >= raw_size:
            coded = torch.cat([torch.zeros(len(planes), dtype=torch.uint8), *planes])
        return torch.cat([u32_bytes(coded.numel() + 4, "cpu"), coded]).to(values.device)

    def _coded(self, planes, frequencies):
        pairs = list(zip(planes, frequencies, strict=True))
        modes = torch.tensor([found is not None for found in frequencies]).to(torch.uint8)
        tables = [_write_table(found) for found in frequencies if found is not None]
        raw = [plane for plane, found in pairs if found is None]
        states, words = _encode([(plane, found) for plane, found in pairs if found is not None])
        return torch.cat([modes, *tables, *raw, states, words])

    def _decode_reference(self, payload, numel):
        inner = torch.empty(self.inner.nbytes(numel), dtype=torch.uint8)
        planes = self._planes(numel)
        data = payload.cpu()
        modes, start = data[4 : 4 + len(planes)].tolist(), 4 + len(planes)
        if len(modes) < len(planes) or max(modes) > 1:
            raise PayloadError(f"payload: expected {len(planes)} bytes of 0 or 1 behind its length")
        tables = {}
        for number, mode in enumerate(modes):
            if mode:
                tables[number], used = _read_table(data[start : start + 1024].tolist())
                start += used
        for plane, mode in zip(planes, modes, strict=True):
            if not mode:
                target = inner[plane]
                if data.numel() - start < target.numel():
                    raise PayloadError(f"payload: ends within its raw bytes, {data.numel()} bytes")
                target.copy_(data[start : start + target.numel()])
                start += target.numel()
        _decode(data[start:], [(inner[planes[number]], table) for number, table in tables.items()])
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.inner.decode_into(inner.to(payload.device), out)
        return out


def _worthwhile_frequencies(plane):
    """(bytes saved, frequencies) of coding a plane, or (0, None)."""
    count = plane.numel()
    if count < SMALLEST_CODED:
        return 0, None
    histogram = torch.bincount(plane.long(), minlength=256).tolist()
    frequency = [(members * TOTAL + count // 2) // count or int(members > 0) for members in histogram]
    while sum(frequency) != TOTAL:
        frequency[frequency.index(max(frequency))] += 1 if sum(frequency) < TOTAL else -1
    pairs = [(members, part) for members, part in zip(histogram, frequency, strict=True) if members]
    cost = sum(members * (256 * PROBABILITY_BITS - _log2_fixed(part)) for members, part in pairs)
    table = (sum(2 * (part + 1).bit_length() - 1 for part in frequency) + 7) // 8
    saved = count - table - (cost + 2047) // 2048
    return (saved, frequency) if saved > 0 else (0, None)


def _log2_fixed(value):
    """256 log2(value), rounded down bit by bit."""
    exponent = value.bit_length() - 1
    mantissa, result = value << (16 - exponent), exponent
    for _ in range(8):
        mantissa = mantissa * mantissa >> 16
        carry = mantissa >> 17
        mantissa >>= carry
        result = 2 * result + carry
    return result


def _write_table(frequency):
    """Elias's gamma code of every frequency plus 1: as many zeros as bits follow the leading one."""
    bits = []
    for part in frequency:
        low = (part + 1).bit_length() - 1
        bits += [0] * low + [1] + [(part + 1) >> bit & 1 for bit in range(low)]
    bits += [0] * (-len(bits) % 8)
    stream = torch.tensor(bits, dtype=torch.uint8).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _read_table(data):
    """(frequencies, bytes read) from a list of bytes."""
    position, frequency = 0, []

    def bit():
        nonlocal position
        position += 1
        return data[(position - 1) // 8] >> (position - 1) % 8 & 1 if position <= 8 * len(data) else 0

    while len(frequency) < 256:
        low = 0
        while low <= PROBABILITY_BITS and not bit():
            low += 1
        if low > PROBABILITY_BITS:
            break
        frequency.append((1 << low) - 1 + sum(bit() << place for place in range(low)))
    used = (position + 7) // 8
    if len(frequency) < 256 or sum(frequency) != TOTAL or used > len(data):
        raise PayloadError("payload: a table of frequencies does not sum to 4096")
    return frequency, used


def _encode(planes):
    """(states, words) as bytes: symbols from the last to the first, 32 states at a time."""
    states = torch.full((LANES,), LOWEST_STATE, dtype=torch.int64)
    groups = []
    for plane, frequency in reversed(planes):
        frequency = torch.tensor(frequency)
        start = frequency.cumsum(0) - frequency
        for symbols in reversed(plane.long().split(LANES)):
            own, part = states[: symbols.numel()], frequency[symbols]
            full = own >> 19 >= part
            groups.append(own[full] & 0xFFFF)
            own = torch.where(full, own >> 16, own)
            states[: symbols.numel()] = (own // part << PROBABILITY_BITS) + own % part + start[symbols]
    words = torch.cat([torch.empty(0, dtype=torch.int64), *reversed(groups)])
    return _little_endian(states, 4), _little_endian(words, 2)


def _decode(data, planes):
    """Fill the planes from `data`: states, then words; it must hold nothing else."""
    if not planes:
        if data.numel():
            raise PayloadError(f"payload: {data.numel()} bytes too many")
        return
    words = data[4 * LANES :].view(-1).long()
    if data.numel() < 4 * LANES or words.numel() % 2:
        raise PayloadError("payload: ends within its states or words")
    states = data[: 4 * LANES].view(-1, 4).long() @ (256 ** torch.arange(4))
    words, read = words.view(-1, 2) @ torch.tensor([1, 256]), 0
    if bool(((states < LOWEST_STATE) | (states >= 1 << 31)).any()):
        raise PayloadError("payload: a state is out of range")
    for plane, frequency in planes:
        frequency = torch.tensor(frequency)
        start = frequency.cumsum(0) - frequency
        symbol_of = torch.repeat_interleave(torch.arange(256), frequency)
        for first in range(0, plane.numel(), LANES):
            own = states[: min(LANES, plane.numel() - first)]
            slot = own & (TOTAL - 1)
            symbols = symbol_of[slot]
            plane[first : first + LANES] = symbols.to(torch.uint8)
            own = frequency[symbols] * (own >> PROBABILITY_BITS) + slot - start[symbols]
            low = own < LOWEST_STATE
            taken = words[read : read + int(low.sum())]
            if taken.numel() != int(low.sum()):
                raise PayloadError("payload: ends within its words")
            own[low] = own[low] << 16 | taken
            states[: own.numel()] = own
            read += taken.numel()
    if read != words.numel() or bool((states != LOWEST_STATE).any()):
        raise PayloadError("payload: its words do not end where its symbols do")


def _little_endian(numbers, width):
    shifts = 8 * torch.arange(width)
    return (numbers.unsqueeze(1) >> shifts & 255).to(torch.uint8).view(-1)


# What the GPU launches.


@device_kernel
def entropy_payload(gpu, inner, size, sections, payload):
    """Encode `size` bytes; returns the payload's, for which it waits for the device, once."""
    planes, count, blocks = _planes_on_device(gpu, sections)
    histograms, frequencies = gpu.launcher.zeros(8 * 256 * count), gpu.launcher.empty(2 * 256 * count)
    state, capacity = gpu.launcher.zeros(STATE_BYTES), size + 2 * LANES
    words, places = gpu.launcher.empty(capacity), gpu.launcher.empty(8 * count)
    modes, which, at = payload + 4, (planes.data_ptr(), count), state.data_ptr()
    codes = frequencies.data_ptr()

    def launch(kernel, blocks, *arguments):
        gpu.launch("entropy", kernel, blocks, *arguments)

    launch("entropy_histogram", blocks, inner, *which, histograms.data_ptr())
    launch("entropy_plan", 1, *which, histograms.data_ptr(), codes, at, modes)
    launch("entropy_code", 1, inner, *which, modes, codes, words.data_ptr(), capacity, at)
    launch("entropy_layout", 1, *which, size, codes, places.data_ptr(), at, payload)
    launch("entropy_raw", blocks, inner, *which, modes, places.data_ptr(), at, 0, payload)
    launch("entropy_words", ceil_div(capacity, FOUR), words.data_ptr(), capacity, at, payload)
    return gpu.launcher.read(state)[8] & 0xFFFFFFFF


@device_kernel
def entropy_inner(gpu, payload, size, sections, inner):
    """Decode to the bytes of the inner payload; returns a memo for `poison` of whether they are any."""
    planes, count, blocks = _planes_on_device(gpu, sections)
    frequencies, places = gpu.launcher.empty(2 * 256 * count), gpu.launcher.empty(8 * count)
    state = gpu.launcher.zeros(STATE_BYTES)
    which, codes, at = (planes.data_ptr(), count), frequencies.data_ptr(), state.data_ptr()
    gpu.launch("entropy", "entropy_parse", 1, payload, size, *which, codes, places.data_ptr(), at)
    gpu.launch("entropy", "entropy_raw", blocks, inner, *which, payload + 4, places.data_ptr(), at, 1, payload)
    gpu.launch("entropy", "entropy_decode", 1, payload, size, *which, codes, at, inner)
    return state[4:8]


def _planes_on_device(gpu, sections):
    """(offset, stride, bytes) of every plane of (bytes, stride) sections: a tensor, their number, the blocks."""
    planes, offset = [], 0
    for nbytes, stride in sections:
        planes += [(offset + p, stride, ceil_div(nbytes - p, stride)) for p in range(min(stride, nbytes))]
        offset += nbytes
    longest = max(count for _, _, count in planes)
    return gpu.launcher.numbers(tuple(planes)), len(planes), len(planes) * ceil_div(longest, CHUNK)
