"""HSDP: the mean over replicas of a sharded model, as the all-reduce hook of an FSDPModule."""

import torch

from gcompress.errors import ConfigError
from gcompress.exchange.applied import holds_nothing
from gcompress.exchange.exchange import GradientExchange

from .backward_pass import BackwardPass
from .torch_layout import ParameterGroup


class ReplicaMean:
    """The hook: what torch reduced within this rank's replica becomes the mean over replicas.

    Args:
        group: of the module that has the hook.
        exchange: among the ranks that have the same shards.
        passes: of all hooks of the model.
    """

    def __init__(self, group: ParameterGroup, exchange: GradientExchange, passes: BackwardPass):
        self._group, self._exchange, self._passes = group, exchange, passes

    def __call__(self, row: torch.Tensor) -> None:
        """Exchange a reduce-scatter's result, 1-D, in place; on a device all of it is on the current stream."""
        if not self._group.all_reduces:
            raise ConfigError(
                "set_requires_all_reduce(False): got a backward pass without the replicas' mean, expected "
                "set_requires_gradient_sync(False) to accumulate gradients"
            )
        self._passes.begin()
        parts = self._group.parts(row.numel())
        places = {part.name: part.of(row) for part in parts if part.numel}
        if not places:
            return
        unused = self._group.zeros_for_unused
        absent = [name for name, place in places.items() if holds_nothing(place)] if unused else ()
        bucket = self._exchange.start_bucket(places, absent=absent)
        at_once = row.device.type != "cpu" or self._group.reads_at_once(row)
        # With a factor of the user's, torch sums over replicas: the factor is for all ranks.
        factor = 1.0 if self._group.divide_factor is None else float(self._exchange.engine.world_size())
        self._passes.add(bucket, places, at_once=at_once, factor=factor)
