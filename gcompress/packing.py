"""Bits, indices and selection in plain torch: the readable definition of the bytes.

Bit streams are little-endian: entry i of width b occupies bits [i b, (i + 1) b), bit j of
the stream is bit j % 8 of byte j // 8, and the last byte is filled with zeros. The C++
kernels (csrc/) produce the same bytes; tests compare them on every compressor.
"""

import functools

import torch

from .errors import PayloadError

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
SMALLEST_FIXED = 2.0**-110  # below it a fixed-point scale of 65535 / magnitude overflows
INFINITY_KEY = 0x7F800000
SUM_BLOCK = 4096  # terms of an ordered sum that are added before the sums of blocks are


def to_type(values, dtype):
    """Floats of another type, where what is finite stays finite: the type's largest number of its sign."""
    if values.dtype == dtype:
        return values
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(values.dtype).max or values.numel() == 0:
        return values.to(dtype)
    if values.device.type == "cpu":  # where a look costs less than what it spares, and waits for no device
        low, high = torch.aminmax(values)
        if -limit <= low and high <= limit:
            return values.to(dtype)
    return torch.where(values.isinf(), values, values.clamp(-limit, limit)).to(dtype)


def saturated(mean, dtype):
    """A mean in a gradient's type, without the infinities that a smaller type makes of finite values.

    Returns:
        (result, beyond): `beyond`, like `mean`, is what of it lies outside float16's range and is to
        come with later gradients; None if nothing does.
    """
    if dtype != torch.float16 or mean.numel() == 0:
        return to_type(mean, dtype), None
    limit = torch.finfo(dtype).max
    low, high = torch.aminmax(mean)
    if -limit <= low and high <= limit:
        return mean.to(dtype), None
    over = mean.isfinite() & (mean.abs() > limit)
    return to_type(mean, dtype), torch.where(over, mean - mean.clamp(-limit, limit), 0.0)


def share_of_largest(world_size):
    """The magnitude up to which `world_size` numbers have a finite sum, however it is rounded."""
    return LARGEST * (1 - 2.0**-16) / world_size


def packed_bytes(count, bits):
    """Bytes of `count` entries of `bits` bits each."""
    return (count * bits + 7) // 8


def pack_bits(values, bits):
    """Pack a 1-D tensor of integers in [0, 2^bits), bits <= 32, to uint8."""
    work = values.to(torch.uint8 if bits <= 8 else torch.int64)
    shifts = torch.arange(bits, dtype=work.dtype, device=work.device)
    return _pack_single_bits(((work.unsqueeze(1) >> shifts) & 1).to(torch.uint8).view(-1))


def _pack_single_bits(stream):
    padded = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=stream.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed, count, bits):
    """The `count` integers behind `pack_bits`, as uint8 (bits <= 8) or int64."""
    if bits > 8:
        return bits_at(packed, torch.arange(count, device=packed.device) * bits, bits, bits)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(1) >> shifts) & 1).view(-1)[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(1, dtype=torch.uint8)


def bits_at(packed, first, bits, widest):
    """The integers, as int64, of `bits` bits that begin at the bits `first` of a stream that holds them all.

    `first` is int64; `bits` an int, or int64 of the same shape, at most `widest`.
    """
    word = torch.zeros_like(first)
    for byte in range((widest + 14) // 8):
        # Of bytes behind the last one nothing is used.
        word |= packed[((first >> 3) + byte).clamp_(max=packed.numel() - 1)].to(torch.int64) << 8 * byte
    return word >> (first & 7) & ((1 << bits) - 1)


def hashed(index, seed):
    """A 32-bit hash of every int64 index below 2^32, as int64: the random numbers of all compressors."""
    word = (index * 0x9E3779B9 + seed) & 0xFFFFFFFF
    word = ((word ^ word >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    word = ((word ^ word >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return word ^ word >> 16


def float_to_bytes(values):
    """float32 to its little-endian bytes."""
    return values.contiguous().view(torch.uint8)


def bytes_to_float(payload):
    """The float32 behind `float_to_bytes`, from bytes at any alignment."""
    return payload.clone().view(torch.float32)


def uniform(count, seed, device):
    """A reproducible uniform float32 in [0, 1) for each of the indices below count."""
    return (hashed(torch.arange(count, device=device), seed) >> 8).to(torch.float32) * 2.0**-24


def rows_of(values, width):
    """A 1-D tensor cut into rows of `width`, the last one filled with zeros: shape [rows, width]."""
    return torch.nn.functional.pad(values, (0, -values.numel() % width)).view(-1, width)


def ordered_sum(rows):
    """The sum of every row of a float64 tensor, in the one order that all backends add in.

    A row is cut into blocks of 4096 terms. In a block, lane j of 16 adds up the terms j, j + 16,
    j + 32, …; then lane j takes lane j + 8, j + 4, j + 2, j + 1. Blocks are added in turn.
    """
    count, width = rows.shape
    block = min(SUM_BLOCK, -(-width // 16) * 16)
    terms = torch.nn.functional.pad(rows, (0, -width % block)).view(count, -1, block // 16, 16)
    lanes = torch.zeros_like(terms[:, :, 0])
    for step in range(block // 16):
        lanes += terms[:, :, step]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :, :half] + lanes[:, :, half : 2 * half]
    total = torch.zeros_like(lanes[:, 0, 0])
    for number in range(lanes.shape[1]):
        total = total + lanes[:, number, 0]
    return total


def magnitude_keys(values, signed=True):
    """int32 keys that order like the magnitude, NaN above infinity.

    In the unsigned form finite negative entries have key 0: only what is positive, or not
    finite, is large.
    """
    pattern = values.view(torch.int32)
    keys = pattern & 0x7FFFFFFF
    if not signed:
        keys = torch.where((pattern < 0) & (keys < INFINITY_KEY), 0, keys)
    return keys


def select_largest(keys, k):
    """The k largest keys, ties to the lowest index.

    Returns the k-th largest key (int) and the bool tensor of kept entries.
    """
    threshold = torch.topk(keys, k, sorted=False).values.min()
    kept = keys > threshold
    equal = keys == threshold
    kept |= equal & (torch.cumsum(equal, 0) <= k - kept.sum())
    return int(threshold), kept


@functools.lru_cache(maxsize=4096)  # asked for several times for every gradient
def gap_width(numel, k):
    """The low bits per index that make the gap code (Elias-Fano) of k indices below numel smallest."""
    return min(range((numel - 1).bit_length() + 1), key=lambda width: gap_bytes(numel, k, width))


def gap_bytes(numel, k, width):
    """Bytes of the gap code: the low `width` bits of every index, then gaps of the rest in unary."""
    return packed_bytes(k, width) + packed_bytes(k + ((numel - 1) >> width), 1)


def pack_gaps(indices, numel, width):
    """Elias-Fano code of strictly increasing int64 indices below numel: a fixed size for k and numel."""
    k = indices.numel()
    unary = torch.zeros(k + ((numel - 1) >> width), dtype=torch.uint8, device=indices.device)
    unary[(indices >> width) + torch.arange(k, device=indices.device)] = 1
    low = pack_bits(indices & ((1 << width) - 1), width) if width else unary[:0]
    return torch.cat([low, _pack_single_bits(unary)])


def unpack_gaps(packed, numel, k, width):
    """The int64 indices behind `pack_gaps`; PayloadError if there are not k."""
    low_bytes = packed_bytes(k, width)
    unary = unpack_bits(packed[low_bytes:], 8 * (packed.numel() - low_bytes), 1)
    positions = torch.nonzero(unary).view(-1)
    if positions.numel() != k:
        raise PayloadError(f"index: {positions.numel()} entries are marked, expected {k}")
    high = (positions - torch.arange(k, device=packed.device)) << width
    return high | unpack_bits(packed[:low_bytes], k, width).to(torch.int64) if width else high


def read_u32(start):
    """The little-endian number that a payload begins with; PayloadError if it is shorter."""
    if start.numel() < 4:
        raise PayloadError(f"payload: got {start.numel()} bytes, expected at least 4")
    return int.from_bytes(bytes(start[:4].tolist()), "little")


def u32_bytes(number, device):
    """`number` as four little-endian bytes, a uint8 tensor."""
    return torch.tensor(list(number.to_bytes(4, "little")), dtype=torch.uint8, device=device)
