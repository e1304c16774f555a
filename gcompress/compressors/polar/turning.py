"""Blocks of entries turned at random, which makes the polar code unbiased, in plain torch (csrc/polar/turn.h).

EDEN (Vargaftik et al., arXiv 2108.08842): signs at random and a Hadamard transform, here over
16384 entries. After it, any entries look Gaussian. The decoded block is multiplied so that its
component along the original is the original; the rest points anywhere, and over seeds to nowhere.
"""

import struct

import torch

from ... import packing
from ...errors import PayloadError
from ..rotation import flip, gain, rotate, rotate_back

BLOCK = 16384
SEED = struct.Struct("<I")
LARGEST = packing.LARGEST


def section_bytes(numel):
    """Seed and a float32 scale per block."""
    return SEED.size + 4 * -(-numel // BLOCK)


def pack(seed, scales):
    """The section's bytes."""
    return SEED.pack(seed) + scales.cpu().numpy().astype("<f4").tobytes()


def unpack(payload, at, numel):
    """(seed, float32 scales, where the section ends)."""
    size = section_bytes(numel)
    if payload.numel() < at + size:
        raise PayloadError(f"payload: {size - SEED.size} bytes of scales do not fit {payload.numel()} bytes")
    (seed,) = SEED.unpack(bytes(payload[at : at + SEED.size].tolist()))
    return seed, packing.bytes_to_float(payload[at + SEED.size : at + size]), at + size


def turn(values, seed):
    """(entries turned and scaled to mean square 1, float64 lengths by which blocks are multiplied when turned back)."""
    parts, lengths = [], []
    for rows, first in _blocks(values):
        exponent = packing.magnitude_keys(rows).amax(1, keepdim=True) >> 23
        usable = exponent > 0
        factor = (torch.where(usable, 255 - exponent, 127) << 23).view(torch.float32)
        turned = rotate(torch.where(usable, rows, 1.0) * factor, first, seed)
        power = packing.ordered_sum(turned.double().square()).unsqueeze(1)
        unit = (1.0 / torch.sqrt(power / rows.shape[1])).to(torch.float32)
        parts.append(torch.where(usable, turned * unit, 0.0).view(-1))
        back = ((exponent.to(torch.int64) - 128 + 1023) << 52).view(torch.float64)  # 2^(exponent - 128)
        length = back / gain(rows.shape[1]) / unit.double()
        lengths.append(torch.where(usable, length, 0.0).view(-1))
    return torch.cat(parts), torch.cat(lengths)


def scales(turned, decoded, lengths):
    """The float32 scale of every block: length |turned|^2 / <turned, decoded>."""
    found = []
    for (rows, first), (others, _) in zip(_blocks(turned), _blocks(decoded), strict=True):
        power = packing.ordered_sum(rows.double().square())
        dot = packing.ordered_sum(rows.double() * others.double())
        length = lengths[first // BLOCK :][: len(rows)]
        found.append(torch.where(dot > 0, length * (power / dot), 0.0).clamp(max=LARGEST).to(torch.float32))
    return torch.cat(found)


def turn_back(decoded, seed, of_blocks, out, add):
    """Turned entries back into, or added to, a float32 vector."""
    for (rows, first), (target, _) in zip(_blocks(decoded), _blocks(out), strict=True):
        scale = of_blocks[first // BLOCK :][: len(rows)].unsqueeze(1)
        values = (rotate_back(rows, first, seed) * scale).clamp(-LARGEST, LARGEST)
        values = flip(values, first // 32, seed)
        target.add_(values) if add else target.copy_(values)


def _blocks(values):
    """(blocks of one size as rows, index of their first entry): the whole ones, then the last one."""
    whole = values.numel() // BLOCK * BLOCK
    if whole:
        yield values[:whole].view(-1, BLOCK), 0
    if whole < values.numel():
        yield values[whole:].view(1, -1), whole
