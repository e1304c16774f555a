"""One step of one rank among equals, played through on a clock that nobody waits for.

The order of operations is that of the library's own Schedule (gcompress/exchange/schedule.py), which here runs on an
engine of which only the time passes: a backward pass that hands over bucket after bucket, encoders and decoders on the
same thread, operations on the link beside them, one after the other.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from ..exchange.schedule import Schedule
from .network import Network
from .step_bytes import WITHIN, Transfer

BACKWARD = 0.6  # of a step's computation: the backward pass, beside which buckets are exchanged
TIME_SLICE = 3e-3  # that Linux gives a process while others wait for its core
AFTER = 0.05  # of it: the optimizer, after the exchange


class Errand(NamedTuple):
    """What one bucket's gradients need, one way: seconds of this rank's processor around operations on the link.

    transfers: the operations, one after the other.
    before: seconds before each.
    carrying: seconds that the engine itself takes for each, on another thread.
    after: seconds after the last.
    """

    transfers: tuple[Transfer, ...]
    before: tuple[float, ...]
    carrying: tuple[float, ...]
    after: float


class Computing(NamedTuple):
    """What a rank computes in a step beside the exchange.

    seconds: without any exchange, forward, backward and optimizer.
    share: how many ranks there are for a core of their machine; with more than one, all that a processor does takes
        as many times longer.
    jitter: standard deviation of the ranks' computing times, as a part of `seconds`: all wait for the slowest.
    pause: seconds before the step in which nothing is sent: of a step by itself, not of one that follows another.
    others: ranks that want the core of one, for which messages to it wait; None: share - 1.
    """

    seconds: float = 0.0
    share: float = 1.0
    jitter: float = 0.0
    others: float | None = None
    pause: float = 0.0


class Outcome(NamedTuple):
    """Of a step, in seconds: all of it, what the link was busy, and what this rank did for the exchange."""

    step: float
    link: float
    codec: float


class Clock:
    """What passes for time. `busy`: seconds of a processor's work so far."""

    def __init__(self, slower: float):
        self.now, self.busy, self._slower = 0.0, 0.0, slower

    def work(self, seconds: float) -> None:
        """Let the rank's thread work that long, longer if ranks share its core."""
        self.now += seconds * self._slower
        self.busy += seconds


class Wire:
    """An engine in name: its operations end when the link would be done with them, first come first served."""

    in_order = True

    def __init__(self, clock, network, ranks, slower):
        self._clock, self._network, self._ranks, self._slower = clock, network, ranks, slower
        self._free = self._free_within = 0.0
        self._bucket = 0.0  # bytes that pass at once
        self.waits = 0.0  # of a message, until the rank that it comes to has a core
        self.busy = 0.0
        self.ends: list[float] = []

    def carry(self, name, lane, transfer, carrying):
        network = self._network
        self._clock.busy += carrying
        if transfer.kind == WITHIN:
            seconds = max(network.seconds_within(transfer.nbytes), carrying * self._slower)
            self._free_within = max(self._clock.now, self._free_within) + seconds
            self.ends.append(self._free_within)
            return Passing(self._clock, self.ends[-1])
        start = max(self._clock.now, self._free)
        load = network.load(transfer.kind, transfer.sizes, self._ranks)
        # The link's bucket fills in pauses, and what an operation leaves in it is there for the next.
        self._bucket = min(network.burst, self._bucket + (start - self._free) * network.rate / 8)
        at_once = min(self._bucket, load)
        self._bucket -= at_once
        seconds = network.seconds_of(load - at_once)
        self.busy += seconds
        self._free = start + max(seconds, carrying * self._slower)
        self.ends.append(self._free + network.delay(transfer.kind, transfer.sizes, self._ranks, self.waits))
        return Passing(self._clock, self.ends[-1])


class Passing(NamedTuple):
    """An operation on a Wire."""

    clock: Clock
    end: float

    def ready(self):
        return self.clock.now >= self.end

    def wait(self):
        return None


def _played(errand, clock):
    """The generator of an errand, for Schedule."""
    for transfer, before, carrying in zip(errand.transfers, errand.before, errand.carrying, strict=True):
        clock.work(before)
        yield "carry", transfer, carrying
    clock.work(errand.after)


def slowest_of(ranks: int) -> float:
    """How far the slowest of that many normally distributed times lies above their mean, in standard deviations.

    Blom's approximation; it grows as the root of 2 ln N.
    """
    return statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def play(
    buckets: list[list[Errand]], entries: list[int], network: Network, computing: Computing, ranks: int
) -> Outcome:
    """The Outcome of a step that follows another one.

    Args:
        buckets: the errands of each, in the order of the backward pass.
        entries: of each bucket; the backward pass takes as long for a bucket as its part of all entries.
        network: the link.
        computing: see Computing.
        ranks: how many there are.
    """
    slower = max(1.0, computing.share)
    clock, total = Clock(slower), max(1, sum(entries))
    wire: Any = Wire(clock, network, ranks, slower)  # has what a Schedule needs of an engine
    seconds = computing.seconds * (1 + computing.jitter * slowest_of(ranks))
    begun = 0.0, 0.0, 0.0
    for _ in range(2):  # the first fills the pauses that the second begins with, and tells how busy cores are
        clock.now += computing.pause
        begun = clock.now, clock.busy, wire.busy
        schedule, tasks = Schedule(), []
        clock.now += seconds * (1 - BACKWARD - AFTER)
        for errands, part in zip(buckets, entries, strict=True):
            clock.now += seconds * BACKWARD * part / total
            tasks += [schedule.start(wire, "", _played(errand, clock)) for errand in errands]
            schedule.advance(wire)
        while not all(task.done for task in tasks):
            if not schedule.advance(wire):
                clock.now = min(
                    (end for end in wire.ends if end > clock.now), default=math.nextafter(clock.now, math.inf)
                )
        clock.now += seconds * AFTER
        wire.ends.clear()
        # Cores that ranks share, and the engine's threads, have only so much to give.
        spent = clock.busy - begun[1]
        clock.now = max(clock.now, begun[0] + seconds + computing.share * spent)
        others = slower - 1 if computing.others is None else computing.others
        wire.waits = TIME_SLICE * others * min(1.0, (seconds + slower * spent) / max(clock.now - begun[0], 1e-9))
    return Outcome(clock.now - begun[0], wire.busy - begun[2], clock.busy - begun[1])
