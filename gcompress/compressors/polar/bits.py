"""A polar code for fair bits: N of them in K, near the least share of wrong bits that K allow.

Korada and Urbanke, "Polar codes are optimal for lossy source coding" (IEEE Trans. Inf. Theory
56, 2010, arXiv 0903.0307). It is the code of one level inside `Polar`, by itself.
"""

import dataclasses

import torch

from ... import backends, packing
from ...checks import check_integer, check_power_of_two
from ...errors import ConfigError, PayloadError
from . import reference
from .device import backend_of
from .layout import NO_CODE, Layout
from .method import Polar
from .spending import CodedClass, Spending, Tile
from .tables import LANES, LARGEST_BLOCK, SMALLEST_BLOCK

LARGEST_CODE = 65536
# The sample of a bit is 8 or -8; 7 or -7 at every third position. Equal ones make sums of zero, which say nothing:
# that costs 0.0003 in distortion. Other magnitudes and random ones were tried and give no more.
MAGNITUDE, EVERY_THIRD = 8, 7


@dataclasses.dataclass(frozen=True)
class PolarCode:
    """A lossy source code for bits: every `block` of them becomes `information` bits.

    With rate R = information / block no code gets below a share of h^-1(1 - R) wrong bits,
    h(p) = -p log2 p - (1 - p) log2(1 - p); this one approaches it as the block grows. A block that
    decompresses to itself (a codeword) always does.

    Args:
        block: bits of a block, N: a power of two from 16 to 65536. Above 16384 the torch
            reference works, which is slower.
        information: bits sent for a block, K: from 1 to N.

    >>> code = PolarCode(block=1024, information=512)
    >>> bits = torch.randint(0, 2, (8 * 1024,), dtype=torch.uint8)
    >>> payload = code.compress(bits)
    >>> payload.numel()
    512
    >>> bool((code.decompress(payload, bits.numel()) != bits).float().mean() < 0.135)
    True
    """

    block: int
    information: int

    def __post_init__(self):
        check_power_of_two("block", self.block, SMALLEST_BLOCK, LARGEST_CODE)
        check_integer("information", self.information, 1, self.block)

    def nbytes(self, count):
        """Bytes of the payload for `count` bits: `information` bits a block, ConfigError unless blocks are whole."""
        check_integer("count", count, 0)
        if count % self.block:
            raise ConfigError(f"count: got {count} bits, expected a multiple of the block, {self.block}")
        return packing.packed_bytes(count // self.block, self.information)

    def compress(self, bits):
        """Encode a 1-D uint8 tensor of zeros and ones, or a bool tensor, of whole blocks.

        Returns:
            uint8 [nbytes(len(bits))] on its device: the blocks' information bits as one bit
            stream, those of a block in rising order of their positions (docs/FORMAT.md).
        """
        if not isinstance(bits, torch.Tensor) or bits.dtype not in (torch.uint8, torch.bool) or bits.dim() != 1:
            got = (
                f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, torch.Tensor) else type(bits).__name__
            )
            raise ConfigError(f"bits: got {got}, expected a 1-D uint8 or bool tensor")
        if bits.numel() % self.block:
            raise ConfigError(f"bits: got {bits.numel()} of them, expected a multiple of the block, {self.block}")
        bits = bits.view(torch.uint8)
        if bits.numel() == 0:
            return torch.empty(0, dtype=torch.uint8, device=bits.device)
        if int(bits.max()) > 1:
            raise ConfigError(f"bits: got an entry {int(bits.max())}, expected zeros and ones")
        magnitude = torch.full((self.block,), MAGNITUDE, dtype=torch.int8, device=bits.device)
        magnitude[::3] = EVERY_THIRD
        samples = magnitude * (1 - 2 * bits.view(-1, self.block).to(torch.int8))
        spending = self._spending(len(samples))
        words, _ = self._backend(bits).encode_samples(_side_by_side(samples, spending), spending, 1)
        information = packing.unpack_bits(words, 8 * words.numel(), 1)
        blocks = _one_after_another(information, self.information, spending)[: len(samples)]
        return packing.pack_bits(blocks.reshape(-1), 1)

    def decompress(self, payload, count):
        """Decode the payload of `count` bits, a multiple of `block`, to a uint8 tensor of zeros and ones."""
        expected = self.nbytes(count)
        if not isinstance(payload, torch.Tensor) or payload.dtype != torch.uint8 or payload.shape != (expected,):
            got = f"{tuple(payload.shape)} of {payload.dtype}" if isinstance(payload, torch.Tensor) else repr(payload)
            raise PayloadError(f"payload: got {got}, expected {expected} bytes (uint8) for {count} bits of {self}")
        if count == 0:
            return torch.empty(0, dtype=torch.uint8, device=payload.device)
        blocks = count // self.block
        spending = self._spending(blocks)
        information = packing.unpack_bits(payload, blocks * self.information, 1).view(blocks, -1)
        words = packing.pack_bits(_side_by_side(information, spending), 1)
        signs = torch.empty(spending.layout.numel, dtype=torch.float32, device=payload.device)
        self._backend(payload).decode(words, spending, signs, False)
        return _one_after_another(signs < 0, self.block, spending)[:blocks].reshape(-1).to(torch.uint8)

    def _spending(self, blocks):
        """The plan by which the kernels of `Polar` do this: tiles of up to 64 blocks, one level, amplitude 1."""
        lanes = next(lanes for lanes in (8, 16, 32, LANES) if blocks <= lanes or lanes == LANES)
        tiles = -(-blocks // lanes)
        count = tiles * lanes * self.block
        return Spending(
            Layout(count, count, None, None),
            0,
            [CodedClass(2 * NO_CODE, count, 0, 1.0)],
            [Tile(0, self.block, self.block, lanes, 1, self.information)] * tiles,
        )

    def _backend(self, tensor):
        kernels = backends.kernels(tensor, Polar) if self.block <= LARGEST_BLOCK else None
        return reference if kernels is None else backend_of(kernels)


def _side_by_side(blocks, spending):
    """[blocks, length] to the entries of tiles, a block a lane; missing blocks are zeros."""
    tiles, lanes = len(spending.tiles), spending.tiles[0].lanes
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, tiles * lanes - len(blocks)))
    return padded.view(tiles, lanes, -1).transpose(1, 2).reshape(-1)


def _one_after_another(entries, length, spending):
    """The inverse: [blocks, length]."""
    tiles, lanes = len(spending.tiles), spending.tiles[0].lanes
    return entries.view(tiles, length, lanes).transpose(1, 2).reshape(tiles * lanes, length)
