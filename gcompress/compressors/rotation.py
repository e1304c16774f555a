"""The random rotation of a block: signs at random, then a Hadamard transform. After it, any entries look Gaussian.

Rows are blocks of one size, float32 of shape [blocks, entries]; `first` is the place of the first entry of all in its
tensor, from which the signs are drawn. A size that is no power of two takes two transforms that overlap.
"""

import torch

from .. import packing

TAIL_WORDS = 0x80000000  # the second rotation of the last block draws from other words


def first_part(entries: int) -> int:
    """The power of two that one Hadamard transform of a block takes."""
    return 1 << (entries.bit_length() - 1)


def gain(entries: int) -> float:
    """What rotating there and back multiplies by."""
    return float(entries) if first_part(entries) == entries else 1.0


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """The Hadamard transform of every row, not normalised: strides 1, 2, 4, … in turn."""
    count, width = rows.shape
    stride = 1
    while stride < width:
        pairs = rows.view(count, -1, 2, stride)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(count, width)
        stride *= 2
    return rows


def flip(rows: torch.Tensor, word: int, seed: int) -> torch.Tensor:
    """Change the sign of an entry where its bit, of 32 a word, is set; rows follow each other from `word` on."""
    count, width = rows.shape
    index = torch.arange(count * -(-width // 32), device=rows.device) + word
    words = packing.hashed(index, seed).view(count, -1, 1)
    bits = (words >> torch.arange(32, device=rows.device)) & 1
    return torch.where(bits.view(count, -1)[:, :width] == 1, -rows, rows)


def rotate(rows: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """Random signs and a Hadamard transform; where the size is no power of two, of the first part, then the last."""
    width = rows.shape[1]
    part = first_part(width)
    rows = flip(rows, first // 32, seed)
    if part == width:
        return hadamard(rows)
    root = torch.tensor(part**-0.5, dtype=torch.float32, device=rows.device)
    rows = torch.cat([hadamard(rows[:, :part]) * root, rows[:, part:]], 1)
    last = flip(rows[:, width - part :], first // 32 + TAIL_WORDS, seed)
    return torch.cat([rows[:, : width - part], hadamard(last) * root], 1)


def rotate_back(rows: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """The inverse of `rotate` but for its first signs and, for a power of two, its gain."""
    width = rows.shape[1]
    part = first_part(width)
    if part == width:
        return hadamard(rows)
    root = torch.tensor(part**-0.5, dtype=torch.float32, device=rows.device)
    last = flip(hadamard(rows[:, width - part :]) * root, first // 32 + TAIL_WORDS, seed)
    rows = torch.cat([rows[:, : width - part], last], 1)
    return torch.cat([hadamard(rows[:, :part]) * root, rows[:, part:]], 1)
