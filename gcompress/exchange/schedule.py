"""Exchanges of several rounds side by side: none waits for another, and no order of waiting can deadlock.

An exchange is a generator. It yields the collective operation that it wants next, as the name of
an engine's method and its arguments (see engine.py), and is sent the result. `Schedule` starts each
operation. Whenever it is called, it moves every exchange whose operation has ended on to its next
one. So a rank that waits for one exchange still takes part in all the others.

On an engine that is `in_order`, `Schedule` starts the operations of one lane in the same order on
all ranks, provided that they begin their exchanges in the same order.
"""

import time
from collections.abc import Generator
from typing import Any

from .engine import Engine

POLL_SECONDS = 1e-4
Steps = Generator[tuple, Any, Any]  # of an exchange: (method of the engine, arguments…) out, its result in


class Task:
    """One exchange under way; `result` is what its generator returned, once `done`."""

    def __init__(self, name: str, steps: Steps):
        self.name, self.done, self.result = name, False, None
        self._steps, self._rounds, self._operation = steps, 0, None

    def _step(self, engine: Engine, result: Any):
        """Hand a result to the generator and start what it wants next."""
        try:
            method, *arguments = self._steps.send(result)
        except StopIteration as stop:
            self.done, self.result, self._operation = True, stop.value, None
            return
        name = f"{self.name}.{self._rounds}" if self._rounds else self.name
        self._operation = getattr(engine, method)(name, self._rounds, *arguments)
        self._rounds += 1


class Schedule:
    """The exchanges of one rank that are under way."""

    def __init__(self):
        self._tasks = []

    def start(self, engine: Engine, name: str, steps: Steps) -> Task:
        """Begin an exchange and return its Task; its first operation is under way."""
        task = Task(name, steps)
        task._step(engine, None)
        if not task.done:
            self._tasks.append(task)
        return task

    def advance(self, engine: Engine) -> bool:
        """Move every exchange as far as it goes without waiting; returns whether any moved."""
        moved, ahead = False, None
        for task in self._tasks:
            while not task.done and task._operation.ready():
                if engine.in_order and ahead is not None and not ahead.done and ahead._rounds <= task._rounds:
                    break  # its next operation would overtake that of the exchange begun before it
                task._step(engine, task._operation.wait())
                moved = True
            ahead = task
        self._tasks = [task for task in self._tasks if not task.done]
        return moved

    def wait(self, engine: Engine, task: Task) -> Any:
        """The task's result, once it is there; all others move on meanwhile."""
        while not task.done:
            if not self.advance(engine):
                time.sleep(POLL_SECONDS)  # spinning would take the core from ranks that still compute
        return task.result

    def clear(self) -> None:
        """Forget everything under way: the engine has been reset."""
        self._tasks = []
