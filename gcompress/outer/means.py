"""What outer steps and DeMo need of an engine: the mean over ranks of named tensors, agreement, and rank 0's values.

`EngineExchange` is that of every engine with collective operations (gcompress/exchange/engine.py). Where there are
none, an engine object brings its own: it has a method `mean_exchange(policy, tensors)` (plugins/mpi/worker_means.py).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..errors import ConfigError, NotFiniteError
from ..exchange.engine import Ranks, result
from ..exchange.exchange import GradientExchange
from ..exchange.results import Results
from ..policy import Policy


class Means(Protocol):
    """Means under way."""

    def done(self) -> bool:
        """Whether `wait` would return at once; moves the exchange on."""

    def wait(self) -> dict[str, torch.Tensor]:
        """{name: mean over ranks}, the same bits on every rank; called once."""


class MeanExchange(Protocol):
    """One rank's side.

    Attributes:
        results: has the report and the memory.
        ranks: who must agree.
    """

    results: Any
    ranks: Ranks

    @property
    def terms(self) -> dict:
        """On what they must agree, besides what outer steps or DeMo add: {argument: JSON-able value}."""

    def broadcast(self, tensors: dict[str, torch.Tensor]) -> None:
        """Give all ranks rank 0's values, in place."""

    def begin(self, tensors: dict[str, torch.Tensor]) -> Means:
        """Start the exchange of {name: tensor}, on all ranks of the same names; tensors may be written to."""


def mean_exchange(engine: Any, policy: Policy, tensors: dict[str, torch.Tensor]) -> MeanExchange:
    """The MeanExchange of tensors of these names and shapes on an engine."""
    made = getattr(engine, "mean_exchange", None)
    if made is not None:
        return made(policy, tensors)
    if not all(hasattr(engine, needed) for needed in ("allgather", "alltoall", "allreduce", "gather_texts")):
        raise ConfigError(
            f"engine: got {type(engine).__name__}, expected gcompress.plugins.horovod.engine(), "
            "gcompress.plugins.ddp.engine() or a worker's gcompress.plugins.mpi.Job"
        )
    return EngineExchange(engine, policy, tensors)


def finished(results: Results, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """End an exchange: its means, with which memory changes, if all of them are finite.

    Raises:
        NotFiniteError: on every rank, if a mean is not finite. Memory is then as before the exchange.
    """
    wrong = [name for name, mean in means.items() if not bool(torch.isfinite(mean).all())]
    if wrong:
        results.discard(means)
    results.end_step()
    if wrong:
        raise NotFiniteError(f"{wrong[0]!r}: some rank's values are not finite: its training has diverged")
    return means


class EngineExchange:
    """Means by an engine's collective operations.

    Args:
        engine: a `gcompress.exchange.engine.Engine`.
        policy: which compressor for which tensor.
        tensors: {name: tensor} of all that will be exchanged.
    """

    def __init__(self, engine, policy, tensors):
        self.engine = self.ranks = engine
        self.results = GradientExchange(policy, engine, scaler=1.0)  # a loss scale is the inner steps' own
        self.results.prepare({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def terms(self):
        # The plan of now: elastic ranks change it.
        return {"compression": self.results.policy.to_dict(), "plan": self.results.plan.digest()}

    def broadcast(self, tensors):
        rank, world_size = self.engine.rank(), self.engine.world_size()
        for name, tensor in tensors.items():
            values = tensor.detach().contiguous()
            sizes = [values.numel() * values.element_size(), *[0] * (world_size - 1)]
            payload = values.view(-1).view(torch.uint8)[: sizes[rank]]
            operation = self.engine.allgather(f"broadcast.{name}", 0, payload, sizes)
            received = result(operation, f"rank 0's value of {name!r}")
            tensor.detach().copy_(received.view(tensor.dtype).view(tensor.shape))

    def begin(self, tensors):
        return EngineMeans(self.results, [self.results.start_bucket(each) for each in self._buckets(tensors)])

    def _buckets(self, tensors):
        """Tensors that travel together: while one bucket is on its way, the next one is encoded."""
        buckets, room = [], 0
        for name, tensor in tensors.items():
            if room <= 0:
                buckets.append({})
                room = self.results.policy.bucket_bytes
            buckets[-1][name] = tensor
            room -= 4 * tensor.numel()
        return buckets


class EngineMeans:
    """Means under way on an engine."""

    def __init__(self, results, buckets):
        self._results, self._buckets = results, buckets

    def done(self):
        return all([bucket.done() for bucket in self._buckets])

    def wait(self):
        means = {}
        for bucket in self._buckets:
            means.update(bucket())
        return finished(self._results, means)
