"""torch.distributed by nodes: which ranks share one, and the process groups within nodes and among peers."""

import json
import os

import torch.distributed as dist

from gcompress.exchange.node_engine import (
    LOCAL_ROUNDS,
    PEER_ROUNDS,
    NodeEngine,
    Place,
    Topology,
    groups_of,
    topology_of,
)
from gcompress.policy import Policy

from .lanes import Lanes, take
from .process_group import ProcessGroupEngine, wait_for
from .process_group_ranks import ProcessGroupRanks


def engine_for(
    group: dist.ProcessGroup | None, policy: Policy, every_rank: bool = False
) -> ProcessGroupEngine | NodeEngine:
    """The engine of a policy's exchange among the ranks of a group, each of which must call it; None: all ranks.

    A group of some of the ranks stays flat: not all ranks of the job are here to make groups of it.

    Args:
        every_rank: see `ProcessGroupEngine`.

    Raises:
        ExchangeError: a rank did not call it within the process group's time-out.
        ConfigError: see `topology_of`.
    """
    ranks = ProcessGroupRanks(group)
    if ranks.world_size() < dist.get_world_size():
        topology = Topology(ranks.world_size(), 1, "the process group has some of the job's ranks")
    else:
        timeout = wait_for(ranks.group, ranks.group)
        topology = _topology(ranks, policy)
    if not topology.by_nodes:
        engine = ProcessGroupEngine(group, every_rank)
        engine.topology = topology
        return engine
    backend, parts = dist.get_backend(ranks.group), []
    for groups, rounds in zip(groups_of(topology), (LOCAL_ROUNDS, PEER_ROUNDS), strict=True):
        lanes = take(ranks.group, groups, rounds if backend == "gloo" else 1, timeout, backend)
        parts.append(ProcessGroupEngine(lanes.groups[0], lanes=lanes))
    return NodeEngine(ProcessGroupEngine(group, lanes=Lanes([ranks.group])), *parts, topology)


def _topology(ranks, policy):
    told = [json.loads(text) for text in ranks.gather_texts(json.dumps([policy.local_size, _own_place()]))]
    if any(local_size != policy.local_size for local_size, _ in told):
        # which the first step refuses, on all ranks
        return Topology(ranks.world_size(), 1, "ranks have different local_size")
    return topology_of([Place(*place) if place else None for _, place in told], policy)


def _own_place():
    """Where torchrun has put this rank, or None if something else has."""
    names = "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return None
    return [int(os.environ[name]) for name in names]
