"""The cosine transform of a matrix in blocks, whose coefficients another compressor codes.

DeMo sends its momentum this way (Peng et al., arXiv 2411.19870). A layer is cut into blocks of up to 64 x 64. Each is
transformed by the orthonormal DCT-II along rows and columns, and its largest coefficients are kept. Values that
change slowly along rows and columns have few large coefficients.

The tensor's first dimension gives the rows of a matrix, all others give its columns; a tensor of one dimension is one
row. A block has tall x wide entries: tall is the largest divisor of the number of rows that is at most `size`, wide
that of the number of columns. So multiples of 64 do well, and a large prime gives blocks of 1.

Bytes: 4 (columns, uint32) + those of `then` for as many entries, the coefficients, block after block.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import torch

from .. import packing
from ..checks import check_integer
from ..errors import ConfigError, PayloadError
from ..packing import read_u32, u32_bytes
from .base import Compressor, Section
from .spec import read_parts
from .topk import TopK

SCALED_FROM = 227  # exponent bits of 2^100: sums of such entries might not be finite
DOWN = 2.0**-30


@dataclasses.dataclass(frozen=True)
class Dct(Compressor):
    """The coefficients of a blockwise cosine transform (DCT-II), coded by another compressor.

    Args:
        then: any compressor; it sees the coefficients as a tensor of one dimension, block after block, in a block row
            after row. With topk, chunk=4096 makes each block of 64 x 64 a chunk, as in DeMo.
        size: the most rows and columns of a block, 2 to 128.

    Unbiased if `then` is. A contraction if `then` is one, since the transform keeps lengths. A block with a non-finite
    entry decodes to NaN. An entry takes tall + wide multiplications in each direction. An exchange cuts a parameter
    into pieces of whole rows, whose numbers of rows may have other divisors than the parameter's.

    >>> slow = torch.outer(torch.linspace(0, 1, 512), torch.linspace(1, 2, 512))
    >>> coder, topk = Dct(TopK(sparsity=0.99, chunk=4096)), TopK(sparsity=0.99, chunk=4096)
    >>> errors = [(slow - each.decompress(*each.compress(slow))).norm() / slow.norm() for each in (coder, topk)]
    >>> [round(float(error), 2) for error in errors], coder.nbytes(512 * 512) - topk.nbytes(512 * 512)
    ([0.0, 0.99], 4)
    """

    name: ClassVar[str] = "dct"
    examples: ClassVar[tuple] = (
        "dct:(topk:sparsity=0.99,chunk=4096)",
        "dct:(chain:(topk:sparsity=0.9,index=places,chunk=64),(binmean:bits=2)),size=16",
        "dct:(quantize:bits=4),size=8",
        "dct:(threshold:threshold=2.0),size=128",
    )
    kernels: ClassVar[tuple] = ("dct_blocks",)
    parts: ClassVar[tuple] = ("then",)
    uses_shape: ClassVar[bool] = True

    then: Compressor = TopK(sparsity=0.99, chunk=4096)
    size: int = 64

    def __post_init__(self):
        read_parts(self)
        check_integer("size", self.size, 2, 128)

    @property
    def unbiased(self) -> bool:
        return self.then.unbiased

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]  # of the part
        return self.then.fixed_size

    def nbytes(self, numel: int) -> int:
        if numel >= 2**32:
            raise ConfigError(f"tensor: got {numel} entries, expected fewer than 2^32")
        return 4 + self.then.nbytes(numel) if numel else 0

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        return 4 + self.then.payload_nbytes(start[4:], numel)

    def sections(self, numel: int) -> list[Section]:
        return [Section(4), *self.then.sections(numel)]

    def check(self, payload: torch.Tensor, numel: int) -> None:
        self.then.check(payload[4:], numel)

    def _encode_native(self, kernels, values, payload, seed):
        coefficients = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
        columns = _columns_of(values)
        self._run(kernels, values, columns, False, False, coefficients)
        coded = self._coded(coefficients, columns, seed)
        payload[: coded.numel()] = coded
        return coded.numel()

    def _decode_native(self, kernels, payload, out, add):
        coefficients, columns = self._coefficients(payload, out.numel())
        self._run(kernels, coefficients, columns, True, add, out)

    def _run(self, kernels, values, columns, inverse, add, out):
        rows = values.numel() // columns
        tall, wide = largest_divisor(rows, self.size), largest_divisor(columns, self.size)
        left, right = sides(tall, wide, inverse, values.device)
        shape = rows, columns, tall, wide, left.data_ptr(), right.data_ptr()
        kernels.dct_blocks(values.data_ptr(), *shape, inverse, add, out.data_ptr())

    def _encode_reference(self, values, seed):
        columns = _columns_of(values)
        blocks = self._grid(values.view(-1), columns).transpose(1, 2).contiguous()
        coefficients = self._transformed(blocks.view(-1, *blocks.shape[2:]), False)
        return self._coded(coefficients.view(-1), columns, seed)

    def _decode_reference(self, payload, numel):
        coefficients, columns = self._coefficients(payload, numel)
        out = torch.empty_like(coefficients)
        grid = self._grid(out, columns).transpose(1, 2)
        blocks = self._transformed(coefficients.view(-1, *grid.shape[2:]), True)
        grid.copy_(blocks.view(grid.shape))
        return out

    def _grid(self, flat, columns):
        """A view of shape [blocks below each other, tall, blocks beside each other, wide]."""
        rows = flat.numel() // columns
        tall, wide = largest_divisor(rows, self.size), largest_divisor(columns, self.size)
        return flat.view(rows // tall, tall, columns // wide, wide)

    def _transformed(self, blocks, inverse):
        """Blocks of shape [count, tall, wide], transformed; products are added in turn."""
        count, tall, wide = blocks.shape
        left, right = sides(tall, wide, inverse, blocks.device)
        largest = packing.magnitude_keys(blocks.view(count, -1)).amax(1).view(-1, 1, 1)
        finite, down = largest < packing.INFINITY_KEY, torch.where(largest >> 23 >= SCALED_FROM, DOWN, 1.0)
        entries = torch.where(finite, blocks, 0.0) * down
        half = torch.zeros_like(entries)
        for j in range(tall):
            half += left[:, j].view(-1, 1) * entries[:, j : j + 1]
        found = torch.zeros_like(entries)
        for j in range(wide):
            found += half[:, :, j : j + 1] * right[j]
        found = (found * (1 / down)).clamp(-packing.LARGEST, packing.LARGEST)
        return torch.where(finite, found, float("nan"))

    def _coded(self, coefficients, columns, seed):
        coded, _ = self.then.compress(coefficients, seed=seed)
        return torch.cat([u32_bytes(columns, coefficients.device), coded])

    def _coefficients(self, payload, numel):
        """(coefficients, 1-D float32, columns); PayloadError if the number of columns does not fit that of entries."""
        columns = read_u32(payload)
        if columns == 0 or numel % columns:
            raise PayloadError(f"payload: says it has {columns} columns, expected a divisor of {numel}")
        coefficients = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.then.decode_into(payload[4:], coefficients)
        return coefficients, columns


def _columns_of(values):
    """Columns of a tensor as a matrix."""
    return values.numel() // values.shape[0] if values.dim() > 1 else values.numel()


@functools.lru_cache(maxsize=4096)
def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


@functools.lru_cache(maxsize=256)
def sides(tall: int, wide: int, inverse: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 matrices by which a block is multiplied from the left and from the right."""
    left, right = cosines(tall).to(device), cosines(wide).to(device)
    return (left.t().contiguous(), right) if inverse else (left, right.t().contiguous())


@functools.lru_cache
def cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix: row k has the frequency k. Rounded from double precision."""
    frequencies = range(size)
    scales = [math.sqrt((2 if frequency else 1) / size) for frequency in frequencies]
    # Angles below a full turn, of which the cosine is most exact.
    turns = [[frequency * (2 * place + 1) % (4 * size) for place in range(size)] for frequency in frequencies]
    rows = [[scales[k] * math.cos(math.pi * turn / (2 * size)) for turn in turns[k]] for k in frequencies]
    return torch.tensor(rows, dtype=torch.float32)
