"""The plan of an exchange by nodes: which rank of a node has which share, and how shares travel among nodes.

Every parameter is cut into shares for the ranks of a node, as two-phase cuts it for its owners (plan.py): matrix rows
stay whole, and no piece is so small that its payload costs more. Parameters whose payloads the engine adds up
(`summable` compressors) are not cut. The exchange among nodes is chosen as for one rank a node.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from .node_engine import Topology
from .plan import Entry, Piece, Plan, borders, dealt


class PeersPlan(Plan):
    """How the shares of one local rank travel among its peers; an Entry's pieces count from the share's start.

    Args:
        plan: the NodePlan.
        local: the rank's number on its node.
    """

    def __init__(self, plan: NodePlan, local: int):
        self.policy, self.world_size, self.buckets = plan.policy, plan.topology.nodes, []
        self.entries, self.offsets = {}, {}
        for name, entry in plan.entries.items():
            for piece in entry.pieces:
                if piece.owner == local:
                    self.entries[name] = Entry(entry.shape_of(piece), entry.compressor, entry.exchange)
                    self.offsets[name] = piece.start
        self._cut()


class NodePlan(Plan):
    """The plan of all parameters; of a compressed one, an Entry's pieces are the shares of the local ranks.

    Args:
        topology: by nodes; others: see `Plan`.
    """

    by_nodes = True
    topology: Topology

    def __init__(self, policy, shapes, topology: Topology, alone=()):
        self.topology = topology
        super().__init__(policy, shapes, topology.nodes, alone)
        self.world_size = topology.nodes * topology.local_size
        self.of_local = [PeersPlan(self, local) for local in range(topology.local_size)]

    def _cut(self):
        load = [0] * self.topology.local_size
        for entry in self.entries.values():
            if entry.compressor is None:
                continue
            if entry.exchange == "summed":
                sizes = {(0, entry.numel): entry.compressor.summed_nbytes(entry.shape, self.topology.nodes)}
            else:
                cuts = borders(entry.compressor, entry.shape, self.topology.local_size)
                sizes = {(start, stop): entry.compressor.nbytes(stop - start) for start, stop in cuts}
            entry.pieces = dealt(sizes, load)

    def share(self, name: str, rank: int) -> tuple[int, int]:
        local = rank % self.topology.local_size
        return next((piece[1:] for piece in self.entries[name].pieces if piece.owner == local), (0, 0))

    def spans(self, names: Iterable[str]) -> list[list[tuple[str, int, int]]]:
        """[(name, start, stop) of every local rank's shares] of parameters, in their order."""
        found: list[list[tuple[str, int, int]]] = [[] for _ in self.of_local]
        for name in names:
            for piece in self.entries[name].pieces:
                found[piece.owner].append((name, piece.start, piece.stop))
        return found

    def owned(self, name: str, rank: int) -> list[Piece]:
        node, local = divmod(rank, self.topology.local_size)
        peers = self.of_local[local]
        if name not in peers.entries:
            return []
        first = peers.offsets[name]
        return [Piece(rank, first + piece.start, first + piece.stop) for piece in peers.owned(name, node)]

    def digest(self) -> int:
        pieces = [(name, entry.pieces) for name, entry in self.entries.items()]
        return zlib.crc32(repr((super().digest(), self.topology[:2], pieces)).encode())

    def between_nodes_bytes(self) -> float:
        """The mean over nodes of the bytes of compressed gradients that leave a node in a step."""
        return sum(sum(peers.wire_bytes().values()) for peers in self.of_local)

    def wire_bytes(self) -> dict[str, float]:
        local_size, nodes = self.topology.local_size, self.topology.nodes
        total = {way: 0.0 for way in (entry.exchange for entry in self.entries.values())}
        for peers in self.of_local:
            for way, sent in peers.wire_bytes().items():
                total[way] += sent / local_size
        plain = sum(entry.numel for entry in self.entries.values() if entry.compressor is None)
        if plain:
            total["allreduce"] += 8 * plain / local_size * (nodes - 1) / nodes
        return total

    def reference_bytes(self) -> int:
        return super().reference_bytes() // self.topology.local_size  # a ring of all ranks leaves a node once

    def scratch_bytes(self) -> int:
        return max(peers.scratch_bytes() for peers in self.of_local)

    def memory_bytes(self) -> int:
        return sum(peers.memory_bytes() for peers in self.of_local) // self.topology.local_size

    def __str__(self):
        sent = round(self.between_nodes_bytes())
        return f"{super().__str__()}\n{sent:,} bytes of compressed gradients leave each node per step"
