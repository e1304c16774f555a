"""What happens to residuals when the ranks of a job change.

Horovod's elastic state broadcasts rank 0's to all, which would copy one rank's residuals to
the others. Here each rank keeps its own while the ranks stay the same. When W ranks become
W', every new rank gets the mean of the residuals of those old ranks that are still there (where
results are sums, not means: the sum of the residuals, divided by W'). So the model still gets what
it has not got yet. The residuals of the pieces' owners go to the new owners. The residual of a
rank that was killed is lost.

`hvd.elastic.TorchState(model=model, outer=outer)` keeps a `gcompress.OuterOptimizer` in the same way: after
every change all ranks begin a round at the anchors, with the inner optimizer's state that they had; new ones take
that of a rank that was there. Commit right after an exchange, when `outer.steps % outer.every == 0`: then no local
step is lost.
"""

import copy
import json
import os

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from horovod.torch.elastic import state as elastic_state

from gcompress.errors import ExchangeError
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.hand_on import memory_sums, take_over
from gcompress.exchange.saved_state import put_back
from gcompress.outer import OuterOptimizer, outer_state

from .collectives import HorovodEngine


class ResidualStateHandler(elastic_state.OptimizerStateHandler):
    """Horovod's handler of an optimizer, which also commits, restores and hands on its residuals."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._saved_exchange = state_of(optimizer)

    def save(self):
        super().save()
        self._saved_exchange = state_of(self.value)

    def restore(self):
        super().restore()
        if self._saved_exchange is not None:
            self.value._gcompress.abandon_step()
            put_back(self.value._gcompress, self._saved_exchange)

    def sync(self):
        super().sync()
        enter_world(self.value)
        self.save()


def state_of(optimizer: torch.optim.Optimizer) -> dict | None:
    """The state of the optimizer's exchange, or None if it compresses nothing; tensors in it never change."""
    exchange = getattr(optimizer, "_gcompress", None)
    return exchange.state_dict() if exchange is not None and exchange.policy else None


def enter_world(optimizer: torch.optim.Optimizer) -> None:
    """Hand residuals on if the ranks have changed: once after each `hvd.init()`, on all ranks, elastic or not."""
    exchange = getattr(optimizer, "_gcompress", None)
    if exchange is None or not exchange.policy or optimizer._gcompress_world is mpi_ops._handle_map:
        return
    before, optimizer._gcompress_ranks = optimizer._gcompress_ranks, (hvd.rank(), hvd.size())
    optimizer._gcompress_world = mpi_ops._handle_map
    if os.environ.get("HOROVOD_ELASTIC") != "1":
        return
    if optimizer.process_set.process_set_id != 0:
        raise ExchangeError("process_set: elastic ranks can only be handed residuals among all of them")
    name = f"gcompress.elastic.{exchange.engine.number}"
    # A rank that has no step behind it has nothing to hand on.
    texts = exchange.engine.gather_texts(json.dumps([before, exchange.steps]), "elastic.ranks")
    ranks = [json.loads(text) for text in texts]
    old = [rank for rank, (_, steps) in enumerate(ranks) if steps > 0]
    unchanged = [rank_and_size for rank_and_size, _ in ranks] == [[r, hvd.size()] for r in range(hvd.size())]
    if not old or (unchanged and len({steps for _, steps in ranks}) == 1):
        return
    state = exchange.state_dict()  # before the new plan drops pieces that are now another rank's
    exchange.discard()
    exchange.prepare({name: entry.shape for name, entry in exchange.plan.entries.items()})
    hand_on(exchange, state, old, name)


def hand_on(exchange: GradientExchange, state: dict, old: list[int], name: str) -> None:
    """Give every rank its part of the residuals of the present ranks that are `old`.

    Args:
        exchange: with a plan for the present ranks.
        state: what this rank had before.
        old: ranks that have something to hand on; the residual of the others is zero.
        name: of Horovod's operations.
    """
    sums = memory_sums(exchange, state if hvd.rank() in old else None)
    for key, vector in sums.items():
        sums[key] = hvd.allreduce(vector, op=hvd.Sum, name=f"{name}.{key}")
    steps, memories = broadcast_shared(exchange.engine, state, old[0], name)
    take_over(exchange, sums, len(old), memories, steps)


def broadcast_shared(engine: HorovodEngine, state: dict, root: int, name: str) -> tuple[int, dict]:
    """(steps, memories) of one rank, on all: numbers as JSON, tensors as bytes."""
    tensors = {
        (parameter, key): value
        for parameter, memory in state["memories"].items()
        for key, value in memory.items()
        if isinstance(value, torch.Tensor)
    }
    plain = {
        parameter: {key: value for key, value in memory.items() if not isinstance(value, torch.Tensor)}
        for parameter, memory in state["memories"].items()
    }
    shapes = [[*key, list(value.shape)] for key, value in tensors.items()]
    mine = json.dumps([state["steps"], plain, shapes] if hvd.rank() == root else None)
    steps, memories, shapes = json.loads(engine.gather_texts(mine, "elastic.shared")[root])
    for parameter, key, shape in shapes:
        value = tensors[parameter, key] if hvd.rank() == root else torch.zeros(shape)
        memories[parameter][key] = hvd.broadcast(value, root, name=f"{name}.{parameter}.{key}")
    return steps, memories


class OuterStateHandler(elastic_state.StateHandler):
    """What `hvd.elastic.TorchState` does with a `gcompress.OuterOptimizer`."""

    def __init__(self, outer):
        super().__init__(outer)
        self._ranks = None
        self.save()

    def save(self):
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self):
        outer_state.put_back(self.value, self._saved)

    def sync(self):
        before, self._ranks = self._ranks, [hvd.rank(), hvd.size()]
        enter_round(self.value, before)
        self.save()


def enter_round(outer: OuterOptimizer, before: list[int] | None) -> None:
    """Let all ranks begin a round among those that there are now; on all of them.

    Args:
        before: this rank's number and how many there were, or None if it is new.
    """
    exchange = outer.exchange
    engine, name = exchange.engine, f"gcompress.elastic.{exchange.engine.number}"
    texts = engine.gather_texts(json.dumps([before, outer.counts]), "elastic.ranks")
    ranks = [json.loads(text) for text in texts]
    old = [rank for rank, (_, counts) in enumerate(ranks) if counts[0] > 0]
    root = old[0] if old else 0
    for key, tensor in outer.leave().items():
        tensor.copy_(hvd.broadcast(tensor, root, name=f"{name}.{key}"))
    inner = hvd.broadcast_object(
        outer.optimizer.state_dict() if hvd.rank() == root else None, root, name=f"{name}.inner"
    )
    if hvd.rank() not in old:
        outer.optimizer.load_state_dict(inner)
    if old and [numbers for numbers, _ in ranks] != [[rank, hvd.size()] for rank in range(hvd.size())]:
        state = exchange.state_dict()
        exchange.discard()
        exchange.prepare({key: entry.shape for key, entry in exchange.plan.entries.items()})
        hand_on(exchange, state, old, name)
    outer.enter(ranks[root][1])


def register() -> None:
    """Make `hvd.elastic.TorchState` use the handlers for every optimizer."""
    registry = [(OuterOptimizer, OuterStateHandler)]
    registry += [
        (kind, ResidualStateHandler if handler is elastic_state.OptimizerStateHandler else handler)
        for kind, handler in elastic_state.get_handler_registry()
    ]
    elastic_state.set_handler_registry(registry)
