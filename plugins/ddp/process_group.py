"""torch.distributed as an engine (gcompress/exchange/engine.py)."""

import atexit
import datetime
import json
import weakref

import torch
import torch.distributed as dist

from gcompress.errors import ConfigError, ExchangeError
from gcompress.exchange.node_engine import Topology

from .lanes import Lanes, take
from .process_group_ranks import ProcessGroupRanks

# Rounds of the longest exchange: two-phase has two, summed methods up to three.
LANES = 3


class ProcessGroupEngine(ProcessGroupRanks):
    """Collective operations of a process group, whose ranks must start them in one order.

    On Gloo an operation is over when the host sees it, which is at another moment on each rank:
    every lane gets a process group of its own, so that the order within it is all that counts.
    On NCCL operations queue on the device and need not be waited for: one group serves all, in
    the order in which the exchanges are started. So it does for a part of the ranks on Gloo, which
    then wait in every bucket's hook, unless `every_rank`: torch numbers new groups by how many a rank has
    made, so that all ranks of the job must make the lanes of all groups.

    Args:
        group: a process group, or None for all ranks. All of its ranks must make an engine;
            ExchangeError within the group's time-out if one does not.
        every_rank: every rank of the job makes an engine at this moment, each of its own group, as of one
            dimension of a DeviceMesh. No rank is in two of these groups.
        lanes: process groups of the same ranks, one for each lane that will be used; None: as many as an exchange may
            need, where it needs any.
        device_type: of the tensors, "cpu" or "cuda", for groups that have a backend for each; None: by the backend.
    """

    in_order = True
    topology: Topology | None = None  # why it is flat, where that was looked at

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        every_rank: bool = False,
        device_type: str | None = None,
        lanes: Lanes | None = None,
    ):
        super().__init__(group)
        self._on_device = self._on_device if device_type is None else device_type != "cpu"
        of_all = self.world_size() == dist.get_world_size()
        self._at_once = self._on_device or not (lanes or of_all or every_rank)
        if self._at_once:
            self._lanes = Lanes([self.group] * LANES)
            return
        self._lanes = lanes or self._take_lanes(self.group if of_all else dist.group.WORLD)
        weakref.finalize(self, self._lanes.release).atexit = False
        atexit.register(_let_go, weakref.ref(self))

    def _take_lanes(self, everyone):
        timeout = wait_for(everyone, self.group)
        return take(everyone, _groups_of(everyone, self.group), LANES, timeout)

    def allgather(self, name, lane, payload, sizes):
        if min(sizes) < max(sizes):  # which an all-gather of torch's cannot
            repeated = payload.repeat(self.world_size())
            return self.alltoall(name, lane, repeated, [payload.numel()] * self.world_size(), sizes)
        result = payload.new_empty(sum(sizes))
        # Newer releases of torch have the second name and warn of the first.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return self._operation(gather(result, payload, group=self._lane(lane), async_op=True), result, payload)

    def alltoall(self, name, lane, payload, to, back):
        result = payload.new_empty(sum(back))
        work = dist.all_to_all_single(result, payload, list(back), list(to), self._lane(lane), async_op=True)
        return self._operation(work, result, payload)

    def allreduce(self, name, lane, tensor, op):
        result = tensor.clone()
        operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        return self._operation(dist.all_reduce(result, operation, self._lane(lane), async_op=True), result)

    def _lane(self, lane):
        if lane >= len(self._lanes.groups):
            raise ExchangeError(f"an exchange of more than {len(self._lanes.groups)} rounds cannot run here")
        return self._lanes.groups[lane]

    def _operation(self, work, result, *used):
        self._lanes.under_way += 1
        return GroupOperation(work, result, used, self._at_once, self._lanes)


class GroupOperation:
    """An operation under way; keeps the tensors that it uses."""

    def __init__(self, work, result, used, at_once, lanes):
        self._work, self._result, self._used, self._at_once, self._lanes = work, result, used, at_once, lanes

    def ready(self):
        return self._at_once or self._work.is_completed()

    def wait(self):
        self._work.wait()
        self._lanes.under_way -= 1
        return self._result


def wait_for(everyone: dist.ProcessGroup, group: dist.ProcessGroup) -> datetime.timedelta:
    """Wait until every rank of the job makes its engine; returns how long that may take.

    Args:
        everyone: all ranks; without Gloo, which alone has such a barrier, nothing is waited for.
        group: this rank's, whose time-out counts then.

    Raises:
        ExchangeError: a rank did not come in that time.
    """
    has_barrier = dist.get_backend(everyone) == "gloo"
    timed = everyone if has_barrier else group
    timeout = timed._get_backend(torch.device("cpu")).options._timeout
    if not has_barrier:
        return timeout
    try:
        dist.monitored_barrier(everyone, timeout=timeout)
    except RuntimeError as error:
        raise ExchangeError(
            f"register or engine: not every rank called it within the process group's time-out, {timeout}: {error}"
        ) from error
    return timeout


def _let_go(reference):
    """Drop an engine's group while Python runs, as lanes.py does those of its lanes."""
    made = reference()
    if made is not None:
        made.group = None


def _groups_of(everyone, group):
    """The ranks of every rank's group, [[ranks], …], the same list everywhere; all ranks of the job must call it."""
    own = dist.get_process_group_ranks(group)
    if own != sorted(own):
        raise ConfigError(f"group: got the ranks {own}, expected them in order")
    texts = ProcessGroupRanks(everyone).gather_texts(json.dumps(own))
    groups = [json.loads(text) for text in dict.fromkeys(texts)]
    members = [rank for ranks in groups for rank in ranks]
    if len(set(members)) < len(members):
        raise ConfigError(f"group: got {groups} on the ranks of the job, expected groups that share no rank")
    return groups


def engine(group: dist.ProcessGroup | None = None, every_rank: bool = False) -> ProcessGroupEngine:
    """torch.distributed for `gcompress.OuterOptimizer`: the ranks of a group, or all; each must call it.

    every_rank: see `ProcessGroupEngine`.
    """
    return ProcessGroupEngine(group, every_rank)
