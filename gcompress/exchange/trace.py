"""What one rank does when, as a file in Chrome's trace format.

Open it in Perfetto (ui.perfetto.dev) or chrome://tracing. Rows of a rank: "steps"; "host": encoding, decoding and
waiting; "wire 1" and so on: operations on the wire, in as many rows as there are at once; and how many bytes that is,
as a curve. `args` say the bytes, the parameters that travel and the number of the step. Times are the host's, as in
times.py, since the same moment in the files of all ranks of one machine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pathlib
from typing import TYPE_CHECKING

from ..checks import check_integer, shown
from ..errors import ConfigError

if TYPE_CHECKING:
    from .report import Report
    from .times import GroupTimes

log = logging.getLogger(__name__)

STEPS_ROW, HOST_ROW, FIRST_WIRE_ROW = 0, 1, 2
GRID = 8  # parts of a microsecond to which times are rounded: what touches on the clock touches in the file


class Trace:
    """A trace that is being written; a context, whose end closes it.

    It closes itself after `steps` steps and at the end of the process. Of a process that is killed the file lacks its
    last "]", which both viewers forgive.

    Args:
        path: the file, which is replaced. With more than one rank its name gets the rank: `trace.json` is
            `trace.rank0.json` of rank 0.
        report: the exchange's; its `times` tell what happens from now on.
        rank, world_size: whose trace it is, of how many.
        steps: how many steps are recorded, the one that is under way included.

    Attributes:
        path: of the file that is written.

    A disk that is full ends the trace with a warning in the log, not the training.

    Raises:
        ConfigError: `path` is no file that can be written, or the report has a trace that is still open.
    """

    def __init__(self, path: str | os.PathLike, report: Report, rank: int = 0, world_size: int = 1, *, steps: int = 20):
        check_integer("steps", steps, 1)
        if report.times.trace is not None:
            raise ConfigError(f"trace: got a second one, expected {report.times.trace.path} to be closed before")
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"path: got {shown(path)}, expected the name of a file")
        self.path = pathlib.Path(path)
        if world_size > 1:
            self.path = self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")
        try:
            self._file = open(self.path, "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"path: got {shown(str(path))}, expected a file that can be written: {error}") from None
        self._report, self._rank, self._left = report, rank, steps
        self._begin = self._step_begun = report.times.clock()
        self._events: list[dict] = []
        self._written = self._bytes = 0
        self._rows: list[float] = []  # of operations: when the last one of each row ended
        self._name("process_name", HOST_ROW, f"rank {rank}")
        self._name("thread_name", STEPS_ROW, "steps")
        self._name("thread_name", HOST_ROW, "host")
        report.times.trace = self
        atexit.register(self.close)

    def host(self, phase: str, group: GroupTimes, start: float, stop: float) -> None:
        """This rank was busy with a group, or waited for it."""
        self._span(f"{phase} {group.name}", phase, HOST_ROW, start, stop, {"parameters": list(group.parameters)})

    def under_way(self, nbytes: int, at: float) -> None:
        """So many bytes more are on the wire, or fewer."""
        self._bytes += nbytes
        counted = {"name": "bytes on the wire", "ph": "C", "pid": self._rank, "ts": _microseconds(at)}
        self._events.append({**counted, "args": {"bytes": max(0, self._bytes)}})

    def abandon(self, at: float) -> None:
        """Nothing is on the wire any more."""
        self.under_way(-self._bytes, at)

    def wire(self, what: str, group: GroupTimes, nbytes: int, start: float, stop: float) -> None:
        """An operation, the engine's method `what`, was on the wire."""
        if start < self._begin:
            return
        row = next((number for number, ended in enumerate(self._rows) if ended <= start), len(self._rows))
        if row == len(self._rows):
            self._rows.append(stop)
            self._name("thread_name", FIRST_WIRE_ROW + row, f"wire {row + 1}")
        self._rows[row] = stop
        found = {"bytes": nbytes, "parameters": list(group.parameters)}
        self._span(f"{what} {group.name}", "wire", FIRST_WIRE_ROW + row, start, stop, found)
        self.under_way(-nbytes, stop)

    def end_step(self, at: float) -> None:
        """A step is over; called before the report counts it."""
        self._span(f"step {self._report.steps}", "step", STEPS_ROW, self._step_begun, at, {})
        self._step_begun = at
        self._left -= 1
        self._write() if self._left else self.close()

    def close(self) -> None:
        """Finish the file; a second call changes nothing. What is still on the wire is not in it."""
        if not self._file.closed:
            self._write(end="\n]\n")
            self._end()

    def _end(self):
        with contextlib.suppress(OSError):  # of what a full disk did not take
            self._file.close()
        self._report.times.trace = None
        atexit.unregister(self.close)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _span(self, name, kind, row, start, stop, found):
        begun = _microseconds(start)
        event = {"name": name, "cat": kind, "ph": "X", "pid": self._rank, "tid": row}
        times = {"ts": begun, "dur": _microseconds(stop) - begun}
        self._events.append({**event, **times, "args": {**found, "step": self._report.steps}})

    def _name(self, what, row, name):
        self._events.append({"name": what, "ph": "M", "pid": self._rank, "tid": row, "args": {"name": name}})
        if what == "thread_name":
            place = {"name": "thread_sort_index", "ph": "M", "pid": self._rank, "tid": row}
            self._events.append({**place, "args": {"sort_index": row}})

    def _write(self, end=""):
        lines = [f"{',' if self._written + i else '['}\n{json.dumps(event)}" for i, event in enumerate(self._events)]
        self._written += len(lines)
        self._events.clear()
        try:
            self._file.write("".join(lines) + end)
            self._file.flush()
        except OSError as error:  # training is worth more than its trace
            log.warning("the trace %s ends here, it cannot be written: %s", self.path, error)
            self._end()


def _microseconds(seconds):
    return round(1e6 * GRID * seconds) / GRID
