"""FSDP2: a reduce-scatter and an all-gather of packed bytes, as the communication objects of an FSDPModule."""

import torch
import torch.distributed as dist

from gcompress.errors import ConfigError
from gcompress.exchange.differences import WeightDifferences
from gcompress.exchange.reduce_scatter import ScatterExchange
from gcompress.memory import Scratch

from .backward_pass import BackwardPass
from .torch_layout import ParameterGroup


class _Allocating:
    def allocate(self, size, *, dtype, device):
        """Memory for what torch copies in or out."""
        return torch.empty(*size, dtype=dtype, device=device)


class PackedReduceScatter(_Allocating):
    """The reduce-scatter of one module's gradients.

    Args:
        group: of the module.
        exchange: among the ranks that have the shards.
        passes: of all modules of the model.
        scratch: float32 memory that modules share.
    """

    def __init__(self, group: ParameterGroup, exchange: ScatterExchange, passes: BackwardPass, scratch: Scratch):
        self._group, self._exchange, self._passes, self._scratch = group, exchange, passes, scratch

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        """Fill this rank's row from all ranks' rows; on a device all of it is on the current stream."""
        self._passes.begin()
        parts = self._group.parts(output_tensor.numel())
        gradients = self._whole(input_tensor.view(group.size(), -1), parts)
        places = {part.name: part.of(output_tensor) for part in parts}
        absent = [part.name for part in parts if part.absent]
        factor = self._factor(op, group.size())
        bucket = self._exchange.start_rows(gradients, places, factor=factor, absent=absent)
        at_once = output_tensor.device.type != "cpu" or self._group.reads_at_once(output_tensor)
        self._passes.add(bucket, places, at_once=at_once)

    def _whole(self, rows, parts):
        """{name: whole gradient} of rows by owner, valid until the next call."""
        blocks = {part.name: rows[:, part.start : part.start + part.padded] for part in parts}
        scattered = {name: block for name, block in blocks.items() if not block.is_contiguous()}
        sizes = [block.numel() for block in scattered.values()]
        room = self._scratch.floats(sum(sizes), rows.device)[: sum(sizes)].split(sizes)
        for place, (name, block) in zip(room, scattered.items(), strict=True):
            blocks[name] = place.view(block.shape).copy_(block)
        shapes = {part.name: part.parameter.shape for part in parts}
        return {name: block.view(-1)[: shapes[name].numel()].view(shapes[name]) for name, block in blocks.items()}

    def _factor(self, op, world_size):
        """What torch multiplies the ranks' sum by."""
        if op == dist.ReduceOp.AVG:
            return 1.0 / world_size
        if op == dist.ReduceOp.SUM:
            return 1.0
        if self._group.divide_factor is not None:  # PREMUL_SUM
            return 1.0 / self._group.divide_factor
        raise ConfigError(f"model: got the reduction {op} of torch's FSDP, expected a sum or a mean")


class DifferenceAllGather(_Allocating):
    """The all-gather of one module's weights as differences.

    Args:
        weights: what all ranks know of them.
        size: how many ranks have the shards.
    """

    def __init__(self, weights: WeightDifferences, size: int):
        self._weights, self._size = weights, size

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        """Fill all ranks' rows; nothing is sent within a backward pass, in which no weights change."""
        if group.size() != self._size:  # reshard_after_forward=int: of weights that were gathered before
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)
        if input_tensor.numel() != self._weights.numel or not input_tensor.is_floating_point():
            raise ConfigError(
                f"weights: got {input_tensor.numel()} entries of {input_tensor.dtype} in an all-gather, expected "
                f"{self._weights.numel} floats: parameters of several types or with extensions are not supported"
            )
        quiet = torch._C._current_graph_task_id() >= 0
        self._weights.gather(input_tensor, output_tensor.view(self._size, -1), quiet=quiet)
