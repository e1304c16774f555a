"""The rounds of one partition on its parameter server: synchronous ones, or under bounded staleness.

`push`, `pull` and `remove` return what can be sent now, a list of (worker, payload).
"""

import math
from typing import NamedTuple

import torch

from ..errors import ExchangeError
from ..memory import Memory


def memory_of(worker: int) -> str:
    """The name that ends those of a server's residuals for one worker."""
    return f"@{worker}"


class Said(NamedTuple):
    """What the first worker said of the last result: whether it applied it."""

    worker: int
    applied: bool


class Result(NamedTuple):
    """What a round came to."""

    payload: torch.Tensor  # 1-D uint8
    not_pulled: set[int]  # workers that have yet to pull it


class SynchronousRounds:
    """One key in synchronous rounds. At most two are open: one is still pulled while the next is pushed."""

    def __init__(self, codec, key, workers, momentum):
        self._codec, self._key, self._workers, self._momentum = codec, key, workers, momentum
        self.pushed = dict.fromkeys(workers, 0)
        self.pulled = dict.fromkeys(workers, 0)  # asked for, answered or not
        self._waiting = set()
        self._collecting = 0  # the round that is not finished
        self._payloads = {}  # those of that round not yet added up
        self._total, self._count = None, 0
        # Rounds that were applied, before this server's first ones too (they enter the seeds), and the momentum.
        self._rounds, self._velocity = 0, Memory()
        self._unsettled = False  # whether a round is finished and nobody has said that it was applied
        self._said: Said | None = None
        self._results: dict[int, Result] = {}  # by round

    def push(self, worker, payload, applied):
        self._settle(worker, applied)
        self.pushed[worker] += 1
        self._payloads[worker] = payload
        return self._finish_if_complete()

    def _settle(self, worker, applied):
        """All workers must have applied a result, or none: their weights would differ ever after."""
        if self._unsettled:
            self._unsettled, self._said = False, Said(worker, applied)
            self._rounds += applied
            self._codec.settle([self._key], applied)
            self._velocity.apply() if applied else self._velocity.discard()
        elif self._said is not None and self._said.applied != applied:
            did, did_not = (worker, self._said.worker) if applied else (self._said.worker, worker)
            raise ExchangeError(
                f"gradient {self._codec.partitions[self._key].name!r}: worker {did} applied the last result, worker "
                f"{did_not} did not, expected all workers to step or to skip a step alike"
            )

    def memory(self, applied):
        """(rounds, residual, velocity), with the last round if it was applied."""
        newest = applied and self._unsettled
        velocity = self._velocity.latest("u") if newest else self._velocity.get("u")
        return self._rounds + newest, self._codec.residual(self._key, proposed=newest), velocity

    def load(self, rounds, residual, velocity):
        """Go on from `memory`."""
        self._codec.settle([self._key], False)
        self._rounds, self._unsettled, self._said = rounds, False, None
        self._velocity.load({} if velocity is None else {"u": velocity})
        self._codec.load_residual(self._key, residual)

    def pull(self, worker):
        self._waiting.add(worker)
        self.pulled[worker] += 1
        return self._answer()

    def remove(self, worker):
        self._waiting.discard(worker)
        for number in list(self._results):
            self._drop(number, worker)
        return self._finish_if_complete()

    def missing(self):
        return [w for w in self._workers if self._waiting and self.pushed[w] == self._collecting]

    def _finish_if_complete(self):
        # Added in the order of the workers' numbers, as far as they are here: the same bits whoever came first.
        absent = [w for w in self._workers if self.pushed[w] == self._collecting]
        for worker in sorted(self._payloads):
            if absent and worker > min(absent):
                break
            self._add(self._payloads.pop(worker))
        if absent or not self._workers:
            return []
        if self._total is None:
            payload = self._codec.encode_nothing(self._key)
        else:
            mean, self._total = self._total.mul_(1.0 / self._count), None
            payload = self._codec.encode(self._key, self._with_momentum(mean), self._rounds)
        self._results[self._collecting] = Result(payload, set(self._workers))
        self._collecting, self._count = self._collecting + 1, 0
        self._unsettled, self._said = True, None
        return self._answer()

    def _add(self, payload):
        self._count += 1
        if not payload.numel():
            return
        add = self._total is not None
        if not add:
            self._total = torch.empty(self._codec.partitions[self._key].numel)
        self._codec.decode(self._key, payload, self._total, add=add)

    def _with_momentum(self, mean):
        if not self._momentum:
            return mean
        before = self._velocity.get("u")
        velocity = mean if before is None else mean.add_(before * self._momentum)
        if _finite(velocity):  # else everyone sees it, and it is forgotten
            self._velocity.put("u", velocity)
        return velocity

    def _answer(self):
        answers = []
        for worker in sorted(self._waiting):
            number = self.pulled[worker] - 1
            if number in self._results:
                answers.append((worker, self._results[number].payload))
                self._waiting.discard(worker)
                self._drop(number, worker)
        return answers

    def _drop(self, number, worker):
        self._results[number].not_pulled.discard(worker)
        if not self._results[number].not_pulled:
            del self._results[number]


class BoundedStaleness:
    """One key under bounded staleness: for every worker, all that it has not got yet.

    The sum of what a worker applies is that of all contributions, however they were cut into
    pulls: what one answer loses is in the error feedback of the next, and what a worker did not
    apply is given to it again. A contribution that is not finite reaches all as a NaN, once.
    """

    def __init__(self, codec, key, workers, momentum, staleness):
        self._codec, self._key, self._workers = codec, key, workers
        self._momentum, self._staleness = momentum, staleness
        self.pushed = dict.fromkeys(workers, 0)
        self.pulled = dict.fromkeys(workers, 0)
        self._numel = codec.partitions[key].numel
        self._pending = {worker: torch.zeros(self._numel) for worker in workers}
        self._given = {worker: torch.zeros(self._numel) for worker in workers}  # in the last answer
        self._poisoned = set()  # workers that have yet to see a NaN
        self._waiting = set()
        # For momentum: the sums of rounds that not all have pushed, and the velocity of those that all have.
        self._open, self._closed, self._velocity = {}, 0, None

    def push(self, worker, payload, applied):
        if not applied:
            self._pending[worker].add_(self._given[worker])
        self._given[worker].zero_()
        self._codec.settle([self._key], applied, memory_of(worker))
        number = self.pushed[worker]
        self.pushed[worker] += 1
        if payload.numel():
            part = torch.empty(self._numel)
            self._codec.decode(self._key, payload, part)
            part.mul_(1.0 / len(self._workers))
            if not _finite(part):
                self._poisoned.update(self._workers)
            else:
                if self._momentum:
                    self._open[number] = self._open[number].add_(part) if number in self._open else part.clone()
                self._add_to_all(part)
        return self._close_rounds()

    def pull(self, worker):
        self._waiting.add(worker)
        self.pulled[worker] += 1
        return self._answer()

    def remove(self, worker):
        self._waiting.discard(worker)
        self._pending.pop(worker, None)
        self._given.pop(worker, None)
        return self._close_rounds()

    def missing(self):
        slowest = self._slowest()
        held = [w for w in self._waiting if self.pushed[w] - self._staleness > slowest]
        return [w for w in self._workers if held and self.pushed[w] == slowest]

    def _slowest(self):
        return min((self.pushed[worker] for worker in self._workers), default=0)

    def _add_to_all(self, values):
        for pending in self._pending.values():
            pending.add_(values)

    def _close_rounds(self):
        """u = m u + mean as soon as all have pushed a round; m u is given on top of what was passed on at once."""
        while self._momentum and self._closed < self._slowest():
            mean = self._open.pop(self._closed, None)
            if self._velocity is not None:
                self._velocity.mul_(self._momentum)
            if mean is not None:
                self._velocity = mean if self._velocity is None else self._velocity.add_(mean)
            if self._velocity is not None:
                self._add_to_all(self._velocity * self._momentum)
            self._closed += 1
        return self._answer()

    def _answer(self):
        answers, slowest = [], self._slowest()
        for worker in sorted(self._waiting):
            if self.pushed[worker] - self._staleness <= slowest:
                answers.append((worker, self._encoded(worker)))
                self._waiting.discard(worker)
        return answers

    def _encoded(self, worker):
        step, peer = self.pushed[worker], memory_of(worker)
        if worker in self._poisoned:
            self._poisoned.discard(worker)
            return self._codec.encode(self._key, torch.full((self._numel,), math.nan), step, peer)
        self._pending[worker], self._given[worker] = self._given[worker], self._pending[worker]
        return self._codec.encode(self._key, self._given[worker], step, peer)


def _finite(values):
    return bool(torch.isfinite(torch.linalg.vector_norm(values, float("inf"))))
