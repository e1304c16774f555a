"""Exchanges of several rounds side by side: none waits for another, and no order of waiting can deadlock.

An exchange is a generator. It yields the collective operation it wants next, as the name of
an engine's method and its arguments, and is sent the result. `Schedule` starts each
operation and, whenever it is called, moves every exchange whose operation has finished on
to its next one. So a rank that waits for one exchange still takes part in all the others.

An engine has `world_size()`, `rank()`, `in_order` and three methods that start an operation
on contiguous tensors, by name:
    allgather(name, lane, payload, sizes)     uint8; sizes[r] bytes from rank r
    alltoall(name, lane, payload, to, back)   uint8; to[r] bytes for rank r, back[r] from it
    allreduce(name, lane, tensor, op)         op "sum" or "max"; leaves `tensor` alone
Each returns a handle with `ready()`, and `wait()` for the result: what the ranks gave, in
rank order, one after the other in one tensor. A name is used for one operation at a time
and for the same one on all ranks. Where operations meet by name, in whatever order each
rank starts them (Horovod), `in_order` is False. Where they meet by order (torch.distributed),
it is True: `Schedule` then starts the operations of one lane, a lane being the number of
the round, in the same order on all ranks, provided that they begin their exchanges in the
same order and that the lanes of the engine do not wait for each other.
"""

import time

POLL_SECONDS = 1e-4


class Task:
    """One exchange under way; `result` is what its generator returned, once `done`."""

    def __init__(self, name, steps):
        self.name, self.done, self.result = name, False, None
        self._steps, self._rounds, self._handle = steps, 0, None

    def _step(self, engine, result):
        """Hand a result to the generator and start what it wants next."""
        try:
            operation, *arguments = self._steps.send(result)
        except StopIteration as stop:
            self.done, self.result, self._handle = True, stop.value, None
            return
        name = f"{self.name}.{self._rounds}" if self._rounds else self.name
        self._handle = getattr(engine, operation)(name, self._rounds, *arguments)
        self._rounds += 1


class Schedule:
    """The exchanges of one rank that are under way."""

    def __init__(self):
        self._tasks = []

    def start(self, engine, name, steps):
        """Begin an exchange and return its Task; its first operation is under way."""
        task = Task(name, steps)
        task._step(engine, None)
        if not task.done:
            self._tasks.append(task)
        return task

    def advance(self, engine):
        """Move every exchange as far as it goes without waiting; returns whether any moved."""
        moved, ahead = False, None
        for task in self._tasks:
            while not task.done and task._handle.ready():
                if engine.in_order and ahead is not None and not ahead.done and ahead._rounds <= task._rounds:
                    break  # its next operation would overtake that of the exchange begun before it
                task._step(engine, task._handle.wait())
                moved = True
            ahead = task
        self._tasks = [task for task in self._tasks if not task.done]
        return moved

    def wait(self, engine, task):
        """The task's result, once it is there; all others move on meanwhile."""
        while not task.done:
            if not self.advance(engine):
                time.sleep(POLL_SECONDS)  # spinning would take the core from ranks that still compute
        return task.result

    def clear(self):
        """Forget everything under way: the engine has been reset."""
        self._tasks = []
