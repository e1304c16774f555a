"""Where the time of one rank's steps goes: encoding, on the wire, waiting, decoding.

Whoever moves an exchange (schedule.py, a parameter server's worker) says when it did what; that is always on and takes
two to seven microseconds for an exchange. All are the host's seconds (`time.perf_counter`). On a GPU a kernel runs
after the host has gone on, and nothing waits for it here: encoding and decoding are then the time that it takes to
launch their kernels, and torch.profiler shows the kernels themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .trace import Trace

PHASES = ("encode", "recode", "wire", "wait", "decode")
ENCODE, RECODE, WIRE, WAIT, DECODE = range(len(PHASES))


class Seconds(NamedTuple):
    """Seconds by phase.

    encode: until a gradient's bytes are there. recode: between two operations: a piece's owner decodes, adds and
    encodes again; a summed method goes on to its next sum. decode: after the last operation.
    wire: from handing bytes to the engine until this rank sees that the operation has ended: it looks whenever it is
    given a gradient, and all the time while it waits.
    wait: this rank had nothing to do but to wait for others. What of `wire` is not in it ran beside other work.
    """

    encode: float = 0.0
    recode: float = 0.0
    wire: float = 0.0
    wait: float = 0.0
    decode: float = 0.0


class GroupTimes:
    """What parameters that travel together took, in all steps.

    Attributes:
        name: the engine's name of their first operation.
        parameters: their names, as they travelled last.
        sent_bytes: handed to the engine.
    """

    def __init__(self, name: str, parameters: tuple[str, ...]):
        self.name, self.parameters, self.sent_bytes = name, parameters, 0
        self._sums = [0.0] * len(PHASES)

    @property
    def seconds(self) -> Seconds:
        """By phase; of all groups together `wire` may be more than the time that passed, since they travel at once."""
        return Seconds(*self._sums)


class Times:
    """One rank's seconds, in all and by parameters that travel together.

    Attributes:
        steps: how many are in `total`; seconds are of this process and not saved, so it may be less than the report's.
        total, last_step: Seconds of those steps, and of the last one. `wire` counts once what is on the wire at once.
        groups: {name: GroupTimes}.
        clock: returns seconds.
        trace: the Trace that is told of everything, too, or None.
    """

    def __init__(self):
        self.clock: Callable[[], float] = time.perf_counter
        self.trace: Trace | None = None
        self._travelling, self._since = 0, 0.0  # operations on the wire; since when there is one
        self._waiting: tuple[GroupTimes, float] | None = None  # for whom, since when
        self.clear()

    def clear(self) -> None:
        """Forget all that was measured, to leave out first steps."""
        self.steps, self.total, self.last_step = 0, Seconds(), Seconds()
        self.groups: dict[str, GroupTimes] = {}
        self._step = [0.0] * len(PHASES)

    def abandon(self) -> None:
        """Nothing is on the wire or waited for any more: the engine has failed or was reset."""
        self._travelling, self._waiting, self._step = 0, None, [0.0] * len(PHASES)
        if self.trace is not None:
            self.trace.abandon(self.clock())

    def group(self, name: str, parameters: tuple[str, ...]) -> GroupTimes:
        """The group of this name; `parameters` are those that travel in it this time."""
        found = self.groups.get(name)
        if found is None:
            found = self.groups[name] = GroupTimes(name, parameters)
        found.parameters = parameters
        return found

    def worked(self, phase: int, group: GroupTimes, start: float, stop: float) -> None:
        """This rank encoded or decoded (phase: ENCODE, RECODE or DECODE) from start to stop, by `clock`."""
        if self._waiting is not None:
            self._close_wait(start)
        group._sums[phase] += stop - start
        self._step[phase] += stop - start
        if self.trace is not None:
            self.trace.host(PHASES[phase], group, start, stop)

    def departed(self, group: GroupTimes, nbytes: int, at: float) -> None:
        """Bytes were handed to the engine."""
        group.sent_bytes += nbytes
        if self._travelling == 0:
            self._since = at
        self._travelling += 1
        if self.trace is not None:
            self.trace.under_way(nbytes, at)

    def arrived(self, group: GroupTimes, what: str, nbytes: int, start: float, stop: float) -> None:
        """An operation that departed at `start` with nbytes was seen to have ended; what: the engine's method."""
        group._sums[WIRE] += stop - start
        self._travelling -= 1
        if self._travelling == 0:
            self._step[WIRE] += stop - self._since
        if self.trace is not None:
            self.trace.wire(what, group, nbytes, start, stop)

    def waited(self, group: GroupTimes, start: float, stop: float) -> None:
        """The engine held this rank up from start to stop."""
        if self._waiting is not None:
            self._close_wait(stop)
        else:
            self._add_wait(group, start, stop)

    def wait_begins(self, group: GroupTimes) -> None:
        """From now on this rank waits for a group, until it works or `wait_ends`; no change if it waits already."""
        if self._waiting is None:
            self._waiting = group, self.clock()

    def wait_ends(self) -> None:
        """This rank goes on."""
        if self._waiting is not None:
            self._close_wait(self.clock())

    def _close_wait(self, stop):
        (group, start), self._waiting = self._waiting, None
        self._add_wait(group, start, stop)

    def _add_wait(self, group, start, stop):
        group._sums[WAIT] += stop - start
        self._step[WAIT] += stop - start
        if self.trace is not None:
            self.trace.host("wait", group, start, stop)

    def end_step(self) -> None:
        """Close the account of one step."""
        self.last_step, self._step = Seconds(*self._step), [0.0] * len(PHASES)
        self.total = Seconds(*map(sum, zip(self.total, self.last_step, strict=True)))
        self.steps += 1
        if self.trace is not None:
            self.trace.end_step(self.clock())

    def as_dict(self) -> dict[str, float]:
        """{"encode_seconds": …, …, "timed_steps": …} of all steps, JSON-able."""
        return {**_named(self.total), "timed_steps": self.steps}

    def last_step_dict(self) -> dict[str, float]:
        """{"encode_seconds": …, …} of the last step."""
        return _named(self.last_step)

    def __str__(self):
        """A table of milliseconds per step, a line for each group."""
        steps = max(1, self.steps)
        rows = [
            (f"{group.name}{_more(group)}", group.seconds, f"{group.sent_bytes // steps:,}")
            for group in self.groups.values()
        ]
        rows.append(("all", self.total, f"{sum(group.sent_bytes for group in self.groups.values()) // steps:,}"))
        width = max(len(row[0]) for row in rows)
        head = f"{'ms per step':{width}s}" + "".join(f"{phase:>9s}" for phase in PHASES) + f"{'bytes':>12s}"
        lines = [
            f"{name:{width}s}" + "".join(f"{1e3 * each / steps:9.2f}" for each in seconds) + f"{sent:>12s}"
            for name, seconds, sent in rows
        ]
        return "\n".join([head, *lines])


def _named(seconds):
    return {f"{phase}_seconds": each for phase, each in zip(PHASES, seconds, strict=True)}


def _more(group):
    return f" and {len(group.parameters) - 1} more" if len(group.parameters) > 1 else ""
