"""Which exchange each parameter takes, how it is cut over its owners, and the bytes that follow.

A plan depends only on what all ranks share: names, shapes, policy and the number of ranks.
So all ranks make the same one without a word, and a parameter's pieces stay with their
owners however an engine forms its buckets.
"""

from __future__ import annotations

import dataclasses
import heapq
import zlib
from typing import NamedTuple

import torch

from ..compressors import Compressor
from ..feedback import new_memory
from ..policy import Rule
from ..residual_types import PACKED, held_nbytes
from .node_engine import Topology

# A piece is a multiple of this (but a parameter's last one), so that quantization's buckets stay whole;
# of whole rows for compressors that look at the shape.
ALIGNMENT = 1024
# Below it a compressor's fixed costs show, and sparse ones choose among too few.
SMALLEST_PIECE = 4096
# Cutting may cost this much more than encoding in one piece.
LARGEST_OVERHEAD = 1.02
# Up to that many bytes per rank and step one round of an all-gather takes less time than two rounds.
SMALL_STEP = 1 << 20
# Up to that many ranks a second encoding is not worth what it saves: a factor of ranks / 2.
FEW_RANKS = 3


class Piece(NamedTuple):
    """Entries start to stop of a parameter, which rank `owner` sums and encodes again, or begins to send in turn."""

    owner: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def key(self, name: str) -> str:
        """The piece's name in its owner's memory."""
        return f"{name}[{self.start}:{self.stop}]"


@dataclasses.dataclass
class Entry:
    """A parameter's part of the plan."""

    shape: torch.Size
    compressor: Compressor | None  # None: uncompressed, by all-reduce
    exchange: str  # "allgather", "twophase", "turns", "summed", "allreduce", or of a ScatterPlan "scatter"
    pieces: tuple = ()
    bucket: int = -1

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def way(self) -> tuple:
        """What those that travel together have in common."""
        return (self.exchange, self.compressor) if self.exchange == "summed" else (self.exchange,)

    @property
    def summed_pieces(self) -> tuple:
        """Those whose owner sums them and remembers what his encoding lost."""
        return self.pieces if self.exchange == "twophase" else ()

    def nbytes_of(self, piece: Piece) -> int:
        """A piece's payload."""
        return self.compressor.nbytes(piece.numel) if self.compressor else 4 * piece.numel

    def shape_of(self, piece: Piece) -> torch.Size:
        """The shape in which a piece is encoded: rows of the parameter where they are whole ones."""
        row = self.shape[1:].numel()
        whole = len(self.shape) > 1 and piece.start % row == piece.stop % row == 0
        return torch.Size((piece.numel // row, *self.shape[1:]) if whole else (piece.numel,))


class Plan:
    """The plan of all parameters.

    Args:
        policy: a Policy; of a warm-up, the plan is for what follows it.
        shapes: {name: shape} in the model's order; buckets follow the backward pass, which is
            taken to go the other way.
        world_size: the number of ranks.
        alone: names that came later, each in a bucket of its own, so that the others' stay what they are.
    """

    reference, reference_rounds = "all-reduce", 2  # what uncompressed gradients would take
    by_nodes = False  # whether a rank encodes its shares of parameters, for other nodes; otherwise whole ones, for all
    topology: Topology | None = None  # where the engine knows it

    def __init__(self, policy, shapes, world_size, alone=()):
        self.world_size, self.policy = world_size, policy
        self.entries = {}
        for name, shape in shapes.items():
            compressor = policy.compressor_for(name, torch.Size(shape).numel())
            self.entries[name] = Entry(torch.Size(shape), compressor, "allreduce")
        for compressor in {entry.compressor: None for entry in self.entries.values() if entry.compressor}:
            members = [entry for entry in self.entries.values() if entry.compressor == compressor]
            for entry in members:
                entry.exchange = choose(policy, compressor, [e.numel for e in members], world_size)
        self.buckets = []
        self._cut()
        self._fill_buckets(alone)

    def _cut(self):
        """Give every rank its pieces, the next one always to a rank that has the fewest bytes."""
        load = [0] * self.world_size
        for entry in self.entries.values():
            if entry.exchange not in ("twophase", "turns"):
                continue
            cuts = borders(entry.compressor, entry.shape, self.world_size)
            entry.pieces = dealt({(a, b): entry.compressor.nbytes(b - a) for a, b in cuts}, load)

    def _fill_buckets(self, alone):
        filled: dict[tuple, int] = {}  # {way: bytes in its last bucket}
        last: dict[tuple, int] = {}  # {way: the number of that}
        for name in [*(name for name in reversed(self.entries) if name not in alone), *alone]:
            entry, way = self.entries[name], self.entries[name].way
            if entry.exchange not in ("twophase", "turns", "allgather", "summed"):
                continue
            if name in alone or filled.get(way, self.policy.bucket_bytes) >= self.policy.bucket_bytes:
                last[way], filled[way] = len(self.buckets), 0
                self.buckets.append([])
            entry.bucket = last[way]
            self.buckets[entry.bucket].append(name)
            filled[way] += 4 * entry.numel

    def share(self, name: str, rank: int) -> tuple[int, int]:
        """(start, stop): the entries of a parameter that a rank encodes and remembers; (0, 0) if none."""
        return 0, self.entries[name].numel

    def owned(self, name: str, rank: int) -> list[Piece]:
        """The pieces of a parameter of which a rank sums all payloads, and remembers what its encoding lost."""
        return [piece for piece in self.entries[name].summed_pieces if piece.owner == rank]

    def unused_rules(self) -> list[Rule]:
        """The policy's rules for gradients that match none of the parameters."""
        return [
            rule
            for rule in self.policy.rules
            if rule.role != "activation"
            and not any(rule.matches(name, entry.numel, "gradient") for name, entry in self.entries.items())
        ]

    def digest(self) -> int:
        """A number that differs when ranks plan differently."""
        return zlib.crc32(
            repr([(name, tuple(entry.shape), entry.exchange) for name, entry in self.entries.items()]).encode()
        )

    def wire_bytes(self) -> dict[str, float]:
        """{exchange: the mean over ranks of the gradient bytes a rank sends in a step}."""
        total: dict[str, float] = {}
        for entry in self.entries.values():
            total[entry.exchange] = total.get(entry.exchange, 0) + wire_bytes(entry, self.world_size)
        return total

    def reference_bytes(self) -> int:
        """What a rank would send of uncompressed float16 gradients."""
        half = 2 * sum(entry.numel for entry in self.entries.values())
        return self.reference_rounds * (self.world_size - 1) * half // self.world_size

    def memory_bytes(self) -> int:
        """The mean over ranks of the bytes that error feedback holds between steps."""
        kinds = len(memory.kinds) if (memory := new_memory(self.policy)) else 0
        total = 0
        for entry in self.entries.values():
            if entry.compressor and self.policy.feedback_for(entry.compressor):
                total += held_nbytes(self.policy.residual, entry.numel) * kinds
                owned = sum(held_nbytes(self.policy.residual, piece.numel) for piece in entry.summed_pieces)
                total += owned // self.world_size
        return total

    def scratch_bytes(self) -> int:
        """The float32 bytes in which a rank unpacks what error feedback holds, the largest tensor's at a time."""
        if self.policy.residual not in PACKED:
            return 0
        feeding = [e for e in self.entries.values() if e.compressor and self.policy.feedback_for(e.compressor)]
        whole = max((e.numel for e in feeding if e.exchange in ("allgather", "twophase")), default=0)
        return 4 * (whole + max((piece.numel for e in feeding for piece in e.summed_pieces), default=0))

    def __str__(self):
        lines = []
        for exchange, sent in self.wire_bytes().items():
            members = [entry for entry in self.entries.values() if entry.exchange == exchange]
            numel = sum(entry.numel for entry in members)
            compressors = ", ".join(sorted({str(entry.compressor or "uncompressed") for entry in members}))
            number = len({entry.bucket for entry in members if entry.bucket >= 0})
            buckets = f" in {_counted(number, 'bucket')}" if number else ""
            lines.append(
                f"{exchange} ({compressors}): {_counted(len(members), 'tensor')}, {numel:,} entries"
                f"{buckets}, {round(sent):,} bytes per rank and step"
            )
        total = round(sum(self.wire_bytes().values()))
        if remembered := self.memory_bytes():
            kept = "" if self.policy.residual == "float32" else f" ({self.policy.residual})"
            scratch = f"; {self.scratch_bytes():,} to unpack it" if self.scratch_bytes() else ""
            lines.append(
                f"memory of what is not sent{kept}: {remembered:,} bytes per rank, and as much for what is "
                f"proposed{scratch}"
            )
        lines.append(
            f"{self.world_size} ranks send {total:,} bytes each {'to other nodes ' if self.by_nodes else ''}per step; "
            f"a float16 {self.reference} would send {self.reference_bytes():,}"
        )
        if self.topology is not None:
            lines.append(str(self.topology))
        return "\n".join(lines)


def _counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def choose(policy, compressor, numels, world_size):
    """The exchange for all tensors of one compressor: by its traits, their size, and the number of ranks."""
    if not compressor.fixed_size or policy.mean == "senders":
        return "allgather"  # the others need to know the sizes of all ranks' payloads, or sum them before they decode
    if policy.exchange != "auto" and (policy.exchange != "summed" or compressor.summable):
        return policy.exchange
    if compressor.summable:
        return "summed"  # one encoding, and its bytes do not grow with the ranks
    gathered = (world_size - 1) * sum(compressor.nbytes(numel) for numel in numels)
    if world_size <= FEW_RANKS or gathered <= SMALL_STEP:
        return "allgather"
    # The second encoding's error is not averaged over the ranks. Where it is not remembered
    # either, it is only worth having when all-gather has become larger than float16.
    if not policy.feedback_for(compressor) and gathered <= 2 * (world_size - 1) * 2 * sum(numels) / world_size:
        return "allgather"
    return "twophase"


def dealt(sizes, load):
    """Pieces of {(start, stop): bytes}, the next always to a rank that has the fewest bytes, which `load` counts.

    A rank has one piece of a parameter at most: so who is next does not depend on the sizes of its pieces.
    """
    owners = heapq.nsmallest(len(sizes), range(len(load)), key=lambda rank: (load[rank], rank))
    for owner, nbytes in zip(owners, sizes.values(), strict=True):
        load[owner] += nbytes
    return tuple(Piece(owner, *border) for owner, border in zip(owners, sizes, strict=True))


def borders(compressor, shape, world_size):
    """[(start, stop)] of a parameter's pieces: as many as keep each of them worth encoding, up to one a rank."""
    numel = shape.numel()
    by_rows = getattr(compressor, "uses_shape", False) and len(shape) > 1
    unit = shape[1:].numel() if by_rows else ALIGNMENT
    blocks = -(-numel // unit)
    count = max(1, min(world_size, numel // SMALLEST_PIECE, blocks))
    allowed = LARGEST_OVERHEAD * compressor.nbytes(numel)
    while True:
        edges = [blocks * i // count * unit for i in range(count)] + [numel]
        pieces = list(zip(edges, edges[1:], strict=False))
        if count == 1 or sum(compressor.nbytes(stop - start) for start, stop in pieces) <= allowed:
            return pieces
        count -= 1


def wire_bytes(entry: Entry, world_size: int) -> float:
    """The mean over ranks of what a rank sends for one tensor."""
    share = 2 * (world_size - 1) / world_size
    if entry.exchange == "scatter":
        return share / 2 * sum(entry.nbytes_of(piece) for piece in entry.pieces)
    if entry.compressor is None:
        return share * 4 * entry.numel
    if entry.exchange == "allgather":
        return (world_size - 1) * entry.compressor.nbytes(entry.numel)
    if entry.exchange == "turns":
        return (world_size - 1) / world_size * sum(entry.compressor.nbytes(piece.numel) for piece in entry.pieces)
    if entry.exchange == "twophase":
        return share * sum(entry.compressor.nbytes(piece.numel) for piece in entry.pieces)
    return share * entry.compressor.summed_nbytes(entry.shape, world_size)
