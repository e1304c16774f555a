"""What computes the parts of a polar payload: torch (reference.py), C++ (native.py) or CUDA (device.py).

All make the same numbers, so that coding.py makes the same bytes with any of them. Tensors are on the
device of the entries; numpy arrays are on the host.
"""

from typing import Protocol

import numpy as np
import torch

from .layout import Layout
from .outliers import Limits
from .spending import Spending


class Backend(Protocol):
    """An object or a module with these functions; `values` are always contiguous 1-D float32 entries."""

    def sums(self, values: torch.Tensor, columns: int, by_column: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Sums of |x| 2^-24 over the rows and the columns of a matrix, float32 (columns: None unless `by_column`)."""

    def beyond(self, values: torch.Tensor, layout: Layout, limits: Limits, expected: int) -> torch.Tensor:
        """The places of entries whose magnitude reaches their limit, int64, rising; about `expected` are likely."""

    def energies(self, values: torch.Tensor, layout: Layout, scales: np.ndarray) -> np.ndarray:
        """The sum of squares of every class's entries, int64; an entry is scaled by its class's scale and rounded."""

    def encode(
        self, values: torch.Tensor, spending: Spending, scales: np.ndarray, list_size: int
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The code of entries.

        Args:
            scales: float32, what an entry of each coded class is multiplied by to become a sample.
            list_size: candidates that are kept, 1, 2, 4 or 8.

        Returns:
            (words, a 1-D uint8 tensor; int64 [coded classes, 2]: the sum of products of samples and codewords, and that
            of the codewords' squares).
        """

    def decode(self, words: torch.Tensor, spending: Spending, out: torch.Tensor, add: bool) -> None:
        """The values that words stand for into, or added to, `out`, in the order of the tiles."""

    def scatter(self, values: torch.Tensor, spending: Spending, out: torch.Tensor, add: bool) -> None:
        """Values in the order of the tiles back to their entries in `out`, 0 to those that are not coded."""

    def turn(self, values: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(entries turned at random, float32; the length of every block of 16384, float64)."""

    def turn_scales(self, turned: torch.Tensor, decoded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The float32 scale with which every block's decoded entries are free of bias."""

    def turn_back(
        self, decoded: torch.Tensor, seed: int, of_blocks: torch.Tensor, out: torch.Tensor, add: bool
    ) -> None:
        """Turned entries, times their blocks' scales, back into, or added to, `out`."""
