"""The bytes of one step, before there is one: what each rank hands over for which collective operation, exactly.

It follows a real Plan, in the buckets that an engine forms, as gcompress/exchange/ways.py does with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..exchange.plan import Plan
from ..policy import Policy

FIRST_BUCKET_BYTES = 1 << 20  # DistributedDataParallel's: its first bucket is small, to begin early
BUCKET_BYTES = 25 << 20
WITHIN = "within a machine"
LENGTH_BYTES = 4  # of a payload whose size is known late


class Transfer(NamedTuple):
    """A collective operation of one task; `sizes` as in `Network.load`.

    Of kind WITHIN it is one among the ranks of a machine, and sizes are the bytes that a rank sends.
    """

    kind: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """For a Schedule, which counts what it hands over."""
        return sum(self.sizes)

    def sent(self, rank: int, ranks: int) -> int:
        """Bytes that a rank hands over, as `Report.sent_bytes` counts them."""
        return sum(self.sizes) if self.kind == "alltoall" else self.sizes[0 if self.kind == "allreduce" else rank]

    def wire(self, rank: int, ranks: int) -> int:
        """Bytes that then leave the rank, as `Report.wire_bytes` counts them, for other machines."""
        if self.kind == WITHIN:
            return 0
        if self.kind == "alltoall":
            return sum(self.sizes) - self.sizes[rank]
        return 2 * (ranks - 1) * self.sizes[0] // ranks if self.kind == "allreduce" else (ranks - 1) * self.sizes[rank]


class Parcel(NamedTuple):
    """Gradients of one bucket that take one way together."""

    way: str
    names: tuple[str, ...]
    entries: int
    transfers: tuple[Transfer, ...]


def buckets_of(shapes: dict[str, torch.Size], nbytes: int = BUCKET_BYTES) -> list[list[str]]:
    """Names in the buckets that DistributedDataParallel forms of {name: shape}, in the order of the backward pass.

    Args:
        nbytes: float32 bytes at which a bucket is closed (the first one at 1 MiB, if that is less).
    """
    buckets: list[list[str]] = [[]]
    filled, limit = 0, min(FIRST_BUCKET_BYTES, nbytes)
    for name in reversed(list(shapes)):
        if filled >= limit:
            buckets.append([])
            filled, limit = 0, nbytes
        buckets[-1].append(name)
        filled += 4 * torch.Size(shapes[name]).numel()
    return [bucket for bucket in buckets if bucket]


def parcels_of(plan: Plan, names: Sequence[str]) -> list[Parcel]:
    """What a bucket of these parameters is sent as, in order."""
    ways: dict[tuple, list[str]] = {}
    for name in names:
        ways.setdefault(plan.entries[name].way, []).append(name)
    return [
        Parcel(way, tuple(members), sum(plan.entries[name].numel for name in members), _transfers(plan, way, members))
        for (way, *_), members in ways.items()
    ]


def _transfers(plan, way, names):
    ranks, entries = plan.world_size, [plan.entries[name] for name in names]
    if way == "allreduce":
        return (Transfer("allreduce", (4 * sum(entry.numel for entry in entries),)),)
    if way == "summed":
        return (Transfer("allreduce", (sum(e.compressor.summed_nbytes(e.shape, ranks) for e in entries),)),)
    if way == "allgather":
        payload = Transfer("allgather", (sum(entry.compressor.nbytes(entry.numel) for entry in entries),) * ranks)
        known = all(entry.compressor.fixed_size for entry in entries)
        return (payload,) if known else (Transfer("allgather", (LENGTH_BYTES,) * ranks), payload)
    sizes = [0] * ranks
    for entry in entries:
        for piece in entry.pieces:
            sizes[piece.owner] += entry.compressor.nbytes(piece.numel)
    if way == "turns":
        return (Transfer("allgather", tuple(1 + size for size in sizes)),)
    return Transfer("alltoall", tuple(sizes)), Transfer("allgather", tuple(sizes))


def step_bytes(
    policy: Policy, shapes: dict[str, torch.Size], ranks: int, rank: int = 0, nbytes: int = BUCKET_BYTES
) -> tuple[int, int]:
    """(bytes handed over, bytes on the wire) of one rank in one step, as its Report will count them.

    Exact where compressors are of `fixed_size`; otherwise the most that it can be.

    Args:
        policy: a Policy that is decided.
        shapes: {name: shape}, in the model's order.
        ranks: how many there are.
        rank: whose.
        nbytes: of a bucket, see `buckets_of`.
    """
    plan = Plan(policy, shapes, ranks)
    found = [
        transfer
        for names in buckets_of(shapes, nbytes)
        for each in parcels_of(plan, names)
        for transfer in each.transfers
    ]
    return sum(each.sent(rank, ranks) for each in found), sum(each.wire(rank, ranks) for each in found)
