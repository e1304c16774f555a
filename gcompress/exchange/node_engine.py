"""Nodes of several ranks: who shares a node, and an engine whose operations run within nodes or among peers.

The ranks of a node are numbered one after the other, node by node. Rank `local` of a node and the ranks of that number
on the other nodes are each other's peers: what they send is what leaves their nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..policy import Policy
from .engine import Engine, Operation

# Rounds of the longest exchange among peers: two-phase has two, summed methods up to three.
PEER_ROUNDS = 3
LOCAL_ROUNDS = 2  # within a node: one before them, one after


class Topology(NamedTuple):
    """How the ranks of a job lie on nodes, as far as an exchange makes use of it.

    Attributes:
        nodes: how many there are; the number of ranks if the exchange is flat.
        local_size: ranks on each of them; 1: the exchange is flat, every rank is by itself.
        why: it is so, for the log.
    """

    nodes: int
    local_size: int
    why: str

    @property
    def by_nodes(self) -> bool:
        """Whether gradients are summed within nodes before they travel among these."""
        return self.local_size > 1

    def __str__(self):
        if self.by_nodes:
            return f"by nodes: {self.nodes} nodes of {self.local_size} ranks ({self.why})"
        return f"flat, not by nodes: {self.why}"


class Place(NamedTuple):
    """Where a launcher has put a rank: the node's number, the rank's on it, and how many are on it."""

    node: int
    local: int
    local_size: int


def topology_of(places: Sequence[Place | None], policy: Policy) -> Topology:
    """The topology of a job, the same on all ranks; see docs/NODES.md for the rule.

    Args:
        places: of all ranks, in rank order; None: the launcher did not tell.
        policy: whose `local_size` decides where it is a number.

    Raises:
        ConfigError: `local_size` is a number that does not go with the ranks or the policy.
    """
    size, wanted = len(places), policy.local_size
    cannot = _flat_because(policy)
    if wanted == 1:
        return Topology(size, 1, "the policy says local_size=1")
    if isinstance(wanted, int):
        if size <= wanted:
            return Topology(size, 1, f"local_size={wanted} puts all {size} ranks on one node")
        if cannot or size % wanted:
            expected = f"'auto' or 1: {cannot}" if cannot else f"'auto', 1, or a divisor of the {size} ranks"
            raise ConfigError(f"local_size: got {wanted}, expected {expected}")
        return Topology(size // wanted, wanted, f"the policy says local_size={wanted}")
    why = cannot or _flat_places(places)
    if why:
        return Topology(size, 1, why)
    local_size = next(place.local_size for place in places if place)
    return Topology(size // local_size, local_size, "as the launcher has placed them")


def _flat_because(policy):
    """Why a policy's exchange cannot be by nodes, or None."""
    if policy.clip is not None:
        return "clip limits the gradients of single ranks"
    if policy.mean == "senders":
        return "mean=senders counts single ranks"
    return "turns go from rank to rank" if policy.exchange == "turns" else None


def _flat_places(places):
    """Why ranks at these places exchange without regard to nodes, or None."""
    if None in places:
        return "the launcher does not tell which ranks share a node (policy: local_size=K)"
    sizes = {place.local_size for place in places}
    if len(sizes) > 1:
        return f"nodes have different numbers of ranks: {', '.join(map(str, sorted(sizes)))}"
    (local_size,) = sizes
    if local_size == 1:
        return "every node has one rank"
    if local_size >= len(places):
        return "all ranks are on one node"
    nodes, first = [place.node for place in places], [rank - rank % local_size for rank in range(len(places))]
    numbered = all(
        (place.node, place.local) == (nodes[start], rank - start)
        for rank, (place, start) in enumerate(zip(places, first, strict=True))
    )
    if not numbered or len(set(nodes)) * local_size != len(places):
        return "ranks are not numbered node by node"
    return None


def groups_of(topology: Topology) -> tuple[list[list[int]], list[list[int]]]:
    """([the ranks of each node], [those of each local number])."""
    nodes, local_size = topology.nodes, topology.local_size
    of_nodes = [list(range(node * local_size, (node + 1) * local_size)) for node in range(nodes)]
    return of_nodes, [list(range(local, nodes * local_size, local_size)) for local in range(local_size)]


class NodeEngine:
    """All ranks' engine (`Engine`), with those of this node and of this rank's peers.

    An exchange by nodes begins with an operation within the node, has up to PEER_ROUNDS among peers, and ends with
    another one within the node. It asks for "local.alltoall", "peers.allgather" and so on. Ranks of one node may have
    different numbers of rounds, or none: `pause` fills up, so that on an engine that is `in_order` every rank starts
    the last operations in one order.

    Args:
        everyone: engine of all ranks, for what is neither within a node nor among peers.
        local: of the ranks of this node.
        peers: of the ranks with this rank's number on their nodes.
        topology: by nodes.
    """

    def __init__(self, everyone: Engine, local: Engine, peers: Engine, topology: Topology):
        self._everyone, self.topology = everyone, topology
        self.local, self.peers = (
            PartEngine(local, lambda round_: 1 if round_ else 0),
            PartEngine(peers, lambda round_: round_ - 1),
        )

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._everyone, name)

    def pause(self, name: str, lane: int, nothing: torch.Tensor) -> Operation:
        """No operation, in place of one."""
        return Pause(nothing)


class PartEngine:
    """The engine of some ranks (`Engine`), in whose lanes only some rounds of an exchange run.

    Args:
        engine: theirs.
        lane_of: gives the lane of a round.
    """

    def __init__(self, engine: Engine, lane_of: Callable[[int], int]):
        self._engine, self._lane_of = engine, lane_of

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._engine, name)

    def allgather(self, name, lane, *arguments):
        return self._engine.allgather(name, self._lane_of(lane), *arguments)

    def alltoall(self, name, lane, *arguments):
        return self._engine.alltoall(name, self._lane_of(lane), *arguments)

    def allreduce(self, name, lane, *arguments):
        return self._engine.allreduce(name, self._lane_of(lane), *arguments)


class Pause:
    """An operation that does nothing; its result is what it is given."""

    def __init__(self, nothing):
        self._nothing = nothing

    def ready(self):
        return True

    def wait(self):
        return self._nothing
