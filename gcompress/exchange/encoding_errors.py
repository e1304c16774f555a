"""How much an encoding loses, measured in some steps.

The relative squared error of one rank's encoding of a parameter is |corrected - decoded|^2 / |corrected|^2, where
`corrected` is what was encoded: the gradient plus the residual (with momentum correction the velocity plus the
residual, with EF21 the gradient minus its estimate). It is 0 of nothing but zeros and NaN of what is not finite. A
contraction such as top-k stays below 1; where it is near 1, a step sends almost nothing of that parameter.

All of it is done by a further encoding with the same seed beside the one that is sent, which changes no bit of that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..checks import check_integer
from ..compressors import Compressor
from ..feedback import NoFeedback, Slice

if TYPE_CHECKING:
    from .exchange import GradientExchange
    from .ways import Ways


class EncodingErrors:
    """The errors of one rank's encodings, in the steps in which they are measured.

    Attributes:
        last: {parameter: relative squared error} of the last step that was measured and ended.
        step: the number of that step, as the report counts, or None.
    """

    def __init__(self):
        self.last: dict[str, float] = {}
        self.step: int | None = None
        self._every = self._first = 0
        self._squares: dict[str, tuple[float, float]] = {}  # of this step: what was lost, and the whole

    def measure(self, every: int, first: int) -> None:
        """Measure in step `first` and then in every `every`-th; 0: no more."""
        check_integer("every", every, 0)
        self._every, self._first = every, first
        self._squares.clear()

    def due(self, step: int) -> bool:
        """Whether this step is to be measured."""
        return self._every > 0 and (step - self._first) % self._every == 0

    def add(self, name: str, corrected: torch.Tensor, decoded: torch.Tensor) -> None:
        """Take up (a part of) a parameter: what was encoded, and what that decodes to, of one shape."""
        lost, total = self._squares.get(name, (0.0, 0.0))
        self._squares[name] = (lost + _square(corrected - decoded), total + _square(corrected))

    def end_step(self, step: int) -> None:
        """Make what was measured in a step the last."""
        if self._squares:
            self.last = {name: _ratio(*squares) for name, squares in self._squares.items()}
            self.step = step
            self._squares.clear()

    def forget(self) -> None:
        """The step has failed."""
        self._squares.clear()


def _square(values):
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _ratio(lost, total):
    if total:
        return lost / total
    return math.nan if lost else 0.0


def add_errors(exchange: GradientExchange, ways: Ways, way: str, gradients: dict) -> None:
    """Measure what is about to be encoded of {name: Gradient} by a way of `Ways.in_buckets`, or by "scatter".

    What is summed measures itself (`GradientExchange.error_taker`).
    """
    if way == "summed":
        return
    found = exchange.report.encoding_errors
    for name, gradient in gradients.items():
        compressor = exchange.compressor_for(name, gradient.values.numel())
        if compressor is None or name in exchange.absent:
            continue
        memory = exchange.feedback if ways.remembers(compressor, name) else NoFeedback
        corrected = memory.preview(name, gradient.values)
        for part in _parts(exchange, ways, way, name, gradient.values.shape):
            found.add(name, *coded(compressor, corrected, part))


def _parts(exchange, ways, way, name, shape):
    """The Slices of a parameter that this rank encodes."""
    rank, entry = exchange.engine.rank(), exchange.plan.entries[name]
    if way == "allgather":
        return [Slice(0, shape.numel(), shape, ways._seed(name, rank))]
    pieces = entry.pieces
    if way == "turns":
        turn = exchange.steps if exchange.turn is None else exchange.turn
        pieces = [piece for piece in pieces if piece.owner == (rank - turn) % exchange.engine.world_size()]
    return [
        Slice(piece.start, piece.stop, entry.shape_of(piece), ways._seed(name, rank, piece.start)) for piece in pieces
    ]


def coded(compressor: Compressor, corrected: torch.Tensor, part: Slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(A part of what is encoded, what it decodes to), 1-D float32."""
    payload, _ = compressor.compress(part.of(corrected), seed=part.seed)
    decoded = torch.empty(part.stop - part.start, device=corrected.device)
    compressor.decode_into(payload, decoded)
    return corrected[part.start : part.stop], decoded
