"""Exchanges of several rounds side by side: none waits for another, and no order of waiting can deadlock.

An exchange is a generator. It yields the collective operation that it wants next, as the name of
an engine's method and its arguments, a tensor first (see engine.py; "local.alltoall" is that of a part of an engine,
node_engine.py), and is sent the result. `Schedule` starts each
operation. Whenever it is called, it moves every exchange whose operation has ended on to its next
one. So a rank that waits for one exchange still takes part in all the others.

On an engine that is `in_order`, `Schedule` starts the operations of one lane in the same order on
all ranks, provided that they begin their exchanges in the same order.

All that an exchange does passes through here, so here the clock is read (times.py): until a generator's first operation
it encodes, after its last one it decodes, and between two it does both.
"""

import operator
import time
from collections.abc import Generator, Iterable
from typing import Any

from .engine import Engine
from .times import DECODE, ENCODE, RECODE, GroupTimes, Times

POLL_SECONDS = 1e-4
Steps = Generator[tuple, Any, Any]  # of an exchange: (method of the engine, arguments…) out, its result in


class Task:
    """One exchange under way; `result` is what its generator returned, once `done`."""

    def __init__(self, name: str, steps: Steps, group: GroupTimes, times: Times):
        self.name, self.done, self.result, self.group = name, False, None, group
        self._steps, self._rounds, self._times = steps, 0, times
        self._operation: Any = None
        self._sent: tuple[str, int, float] | None = None  # what is on the wire: method, bytes, since when

    def _step(self, engine: Engine, result: Any, start: float):
        """Hand a result to the generator and start what it wants next; start: the time now."""
        try:
            method, *arguments = self._steps.send(result)
        except StopIteration as stop:
            self.done, self.result, self._operation = True, stop.value, None
            self._times.worked(DECODE if self._rounds else ENCODE, self.group, start, self._times.clock())
            return
        now = self._times.clock()
        self._times.worked(RECODE if self._rounds else ENCODE, self.group, start, now)
        nbytes = arguments[0].nbytes
        self._times.departed(self.group, nbytes, now)
        self._sent = method, nbytes, now
        name = f"{self.name}.{self._rounds}" if self._rounds else self.name
        self._operation = operator.attrgetter(method)(engine)(name, self._rounds, *arguments)
        self._rounds += 1

    def _take(self, engine: Engine):
        """Go on with the result of an operation that is ready."""
        ready = self._times.clock()
        result = self._operation.wait()
        now = self._times.clock()
        self._arrived(now)  # unless it was: an engine may be "ready" at once, and wait then
        self._times.waited(self.group, ready, now)
        self._step(engine, result, now)

    def _arrived(self, now: float):
        """The operation was seen to be ready."""
        if self._sent is not None:
            self._times.arrived(self.group, *self._sent, now)
            self._sent = None


class Schedule:
    """The exchanges of one rank that are under way; times: of its report, which are told when what is done."""

    def __init__(self, times: Times | None = None):
        self._tasks: list[Task] = []
        self._times = times or Times()

    def start(self, engine: Engine, name: str, steps: Steps, parameters: Iterable[str] = ()) -> Task:
        """Begin an exchange and return its Task; its first operation is under way. parameters: that travel in it."""
        task = Task(name, steps, self._times.group(name, tuple(parameters) or (name,)), self._times)
        task._step(engine, None, self._times.clock())
        if not task.done:
            self._tasks.append(task)
        return task

    def advance(self, engine: Engine) -> bool:
        """Move every exchange as far as it goes without waiting; returns whether any moved."""
        moved, ahead = False, None
        for task in self._tasks:
            while not task.done and task._operation.ready():
                if engine.in_order and ahead is not None and not ahead.done and ahead._rounds <= task._rounds:
                    task._arrived(self._times.clock())
                    break  # its next operation would overtake that of the exchange begun before it
                task._take(engine)
                moved = True
            ahead = task
        self._tasks = [task for task in self._tasks if not task.done]
        return moved

    def wait(self, engine: Engine, task: Task) -> Any:
        """The task's result, once it is there; all others move on meanwhile."""
        try:
            while not task.done:
                self._times.wait_begins(task.group)
                if not self.advance(engine):
                    time.sleep(POLL_SECONDS)  # spinning would take the core from ranks that still compute
        finally:
            self._times.wait_ends()
        return task.result

    def clear(self) -> None:
        """Forget everything under way: the engine has been reset."""
        self._tasks = []
        self._times.abandon()
