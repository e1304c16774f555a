"""The link between ranks: how long a collective operation takes on it."""

from __future__ import annotations

import dataclasses

from ..checks import check_integer, check_number, check_positive

# What TCP over Ethernet leaves of a link's rate: 1448 bytes of data in 1538 on the cable.
EFFICIENCY = 1448 / 1538
MESSAGE_SECONDS = 2e-5  # that an engine takes for one message beside its bytes


@dataclasses.dataclass(frozen=True)
class Network:
    """What the ranks send their payloads over.

    Args:
        rate: bits per second, in each direction.
        latency: seconds that a message is under way.
        shared: whether all ranks share one link of that rate, such as the loopback of a machine; otherwise each
            machine has one of its own.
        local: ranks on a machine, which share its link. What they send each other takes none.
        efficiency: the part of `rate` that is left for payloads.
        burst: bytes that pass at once after a pause, as through the token bucket of Linux' tc.
        within: bits per second, in each direction, that a rank has to the others of its machine; None: nothing but
            processors limits that.
    """

    rate: float
    latency: float = 1e-4
    shared: bool = False
    local: int = 1
    efficiency: float = EFFICIENCY
    burst: int = 0
    within: float | None = None

    def __post_init__(self):
        check_positive("rate", self.rate)
        check_number("latency", self.latency, 0, 3600)
        check_integer("local", self.local, 1)
        check_number("efficiency", self.efficiency, 0.01, 1)
        check_integer("burst", self.burst, 0)
        if self.within is not None:
            check_positive("within", self.within)

    def seconds_of(self, nbytes: float) -> float:
        """What that many bytes take on a link."""
        return 8 * nbytes / (self.rate * self.efficiency)

    def seconds_within(self, nbytes: float) -> float:
        """What that many bytes from a rank to others of its machine take."""
        return 8 * nbytes / self.within if self.within else 0.0

    def load(self, kind: str, sizes: tuple[int, ...], ranks: int) -> float:
        """Bytes that the busiest link carries in one direction.

        Args:
            kind: "allreduce", "allgather" or "alltoall", by the algorithms of Gloo: rings, and direct messages for an
                all-to-all and for an all-gather of different sizes.
            sizes: bytes from each rank (all-gather), for each rank (all-to-all: from each alike), or those of the
                tensor alone (all-reduce).
            ranks: how many there are.
        """
        others, crossing = ranks - 1, ranks - min(ranks, 1 if self.shared else self.local)
        if kind == "allreduce":
            return (ranks if self.shared else crossing > 0) * 2 * others * sizes[0] / ranks
        total, most, least = sum(sizes), max(sizes), min(sizes)
        if self.shared:
            return others * total
        if kind == "allgather" and most == least:
            return others * most if crossing else 0
        members = ranks - crossing
        if kind == "allgather":
            return members * crossing * most
        return max(members * total * crossing / ranks, min(total, members * most) * crossing)

    def hops(self, kind: str, sizes: tuple[int, ...], ranks: int) -> int:
        """How many messages of an operation can only be sent one after the other, by rank after rank."""
        others = ranks - 1
        if kind == "alltoall" or (kind == "allgather" and min(sizes) < max(sizes)):
            return min(others, 1)
        return (2 if kind == "allreduce" else 1) * others

    def delay(self, kind: str, sizes: tuple[int, ...], ranks: int, waits: float = 0.0) -> float:
        """Seconds of an operation that do not depend on its bytes; waits: of a message, for its receiver's core."""
        hops = self.hops(kind, sizes, ranks)
        return hops * (self.latency + waits) + max(hops, ranks - 1) * MESSAGE_SECONDS
