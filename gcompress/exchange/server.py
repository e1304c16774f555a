"""What parameter servers and their workers compute, for any engine that carries the bytes.

A model's gradients are cut into partitions (`partition`), each the task of one server. A worker
encodes its part of a gradient (`Codec`), a server decodes what all workers pushed, adds it up,
and encodes the mean again for the way back, with an error feedback of its own (Zheng et al.,
arXiv 1905.10936). `ParameterServer` is one server's side of that: an engine hands it what
arrives and sends what it returns. It computes, and knows no clock and no network.
"""

import heapq
import math
import zlib
from typing import NamedTuple

import torch

from ..checks import check_integer
from ..compressors import Compressor
from ..errors import ConfigError, ExchangeError, PayloadError
from ..feedback import ErrorFeedback, new_memory
from ..memory import Memory
from ..packing import bytes_to_float, float_to_bytes, to_type


class Partition(NamedTuple):
    """A run of entries of one flattened parameter, and who is responsible for it."""

    name: str
    start: int
    numel: int
    server: int
    compressor: Compressor | None  # None: the entries travel as float32

    @property
    def nbytes(self):
        """The size of its payload in either direction; the largest possible if it is not `fixed_size`."""
        return self.compressor.nbytes(self.numel) if self.compressor else 4 * self.numel


def partition(sizes, policy, servers, partition_numel=1 << 20):
    """Cut parameters into partitions and balance these over servers by payload bytes.

    Args:
        sizes: {name: number of entries}, in the same order on all ranks.
        policy: a Policy, or None to compress nothing.
        servers: how many there are.
        partition_numel: the most entries of one partition, so that a large tensor uses all
            servers and its parts are encoded, sent, added and decoded at the same time.

    Returns:
        A list of Partition, a parameter's in order; a partition's index in it is its key.
    """
    check_integer("servers", servers, 1)
    check_integer("partition_numel", partition_numel, 1)
    parts = []
    for name, numel in sizes.items():
        compressor = policy.compressor_for(name, numel) if policy else None
        for start in range(0, numel, partition_numel):
            parts.append(Partition(name, start, min(partition_numel, numel - start), 0, compressor))
    # The largest first, each to the server that has least to do.
    loads = [(0, server) for server in range(servers)]
    for key in sorted(range(len(parts)), key=lambda key: -parts[key].nbytes):
        load, server = heapq.heappop(loads)
        parts[key] = parts[key]._replace(server=server)
        heapq.heappush(loads, (load + parts[key].nbytes, server))
    return parts


class Codec:
    """One side's encoder and decoder of partitions, with its error feedback.

    What an encoding leaves over is only proposed until `apply` or `discard` (see gcompress/memory.py).

    Args:
        partitions: from `partition`.
        policy: the same that it was called with. Momentum correction is a worker's; a warm-up
            is refused, since a server does not know at which step a job was taken up again.
        side: "worker 3" or "server": enters the seeds of compressors that round at random.
    """

    def __init__(self, partitions, policy, side):
        if policy and policy.warmup_steps:
            raise ConfigError(f"warmup_steps: got {policy.warmup_steps}, expected 0 with parameter servers")
        self.partitions, self._side, self._policy = partitions, side, policy
        self._feedback = new_memory(policy, at_once=False) if policy else None
        if self._feedback and side == "server":
            self._feedback = ErrorFeedback(at_once=False)

    def encode(self, key, values, step, peer=""):
        """The payload (1-D uint8) of a 1-D float32 tensor; `peer` names a memory of its own for one receiver."""
        part = self.partitions[key]
        if values.numel() != part.numel:
            raise ConfigError(f"gradient {part.name!r}: got {values.numel()} entries, expected {part.numel}")
        if part.compressor is None:
            return float_to_bytes(to_type(values, torch.float32)).clone()
        seed = zlib.crc32(f"{part.name}/{part.start}/{step}/{self._side}/{peer}".encode())
        if self._policy.feedback_for(part.compressor):
            return self._feedback.compress(_memory_name(part) + peer, values, part.compressor, seed=seed)[0]
        return part.compressor.compress(values, seed=seed)[0]

    def encode_nothing(self, key):
        """The payload of zeros, without memory: no one had anything to send."""
        part = self.partitions[key]
        zeros = torch.zeros(part.numel)
        return part.compressor.compress(zeros)[0] if part.compressor else float_to_bytes(zeros)

    def decode(self, key, payload, out, add=False):
        """Decode into, or add to, a 1-D float32 tensor; PayloadError on bytes that do not fit."""
        part = self.partitions[key]
        try:
            if part.compressor is not None:
                part.compressor.decode_into(payload, out, add=add)
            elif payload.numel() != part.nbytes:
                raise PayloadError(f"got {payload.numel()} bytes, expected {part.nbytes}")
            else:
                out.add_(bytes_to_float(payload)) if add else out.copy_(bytes_to_float(payload))
        except PayloadError as error:
            raise PayloadError(f"gradient {part.name!r} from entry {part.start} on: {error}") from None

    def settle(self, keys, applied, peer=""):
        """The last results of these keys were applied, or not: memory follows them or stays."""
        if self._feedback:
            names = [_memory_name(self.partitions[key]) + peer for key in keys]
            self._feedback.apply(names) if applied else self._feedback.discard(names)

    def carry_on(self, key):
        """The next gradient contains the last result: go on from what is proposed."""
        if self._feedback:
            self._feedback.carry_on(_memory_name(self.partitions[key]))

    def add(self, key, values):
        """Owe what was not delivered after all, if this partition's losses are remembered."""
        part = self.partitions[key]
        if self._feedback and part.compressor and self._policy.feedback_for(part.compressor):
            self._feedback.add(_memory_name(part), values)

    def residual(self, key, proposed=False):
        """What error feedback holds of a partition, or proposes if that is asked for; or None."""
        if self._feedback is None:
            return None
        name = _memory_name(self.partitions[key])
        return self._feedback.memories["residual"].latest(name) if proposed else self._feedback.residual(name)

    def load_residual(self, key, values):
        """Go on from `residual(key)`."""
        if self._feedback is None:
            return
        residuals, name = self._feedback.memories["residual"], _memory_name(self.partitions[key])
        residuals.drop(lambda other: other == name)
        if values is not None:
            residuals.put(name, values)
            residuals.apply([name])

    def forget(self, peer):
        """Drop the memories of a receiver that is gone."""
        if self._feedback:
            self._feedback.memories["residual"].drop(lambda name: name.endswith(peer))

    def state_dict(self):
        """This side's residuals by name; see `ErrorFeedback`."""
        return self._feedback.state_dict() if self._feedback else {}

    def checked(self, state):
        """What `load` takes, of a `state_dict()` that a job with this policy and partitions saved; ConfigError else."""
        sizes = {_memory_name(part): part.numel for part in self.partitions if part.compressor}
        return self._feedback.checked(state, sizes) if self._feedback else {}

    def load(self, tensors):
        """Go on from tensors that `checked` returned."""
        if self._feedback:
            self._feedback.load_tensors(tensors)


class ParameterServer:
    """One server's rounds over its partitions.

    `push`, `pull` and `remove` return what can be sent now: a list of (worker, key, payload).
    A payload belongs to its round and to whoever still sends it: nothing is written into it
    again. Each worker pushes a key, then pulls it, then pushes the next round; with that push it
    says whether it applied what it pulled. If it did not, the server's memory is what it was
    before that round. An empty payload says that a worker had no gradient.

    Args:
        codec: a Codec of side "server".
        server: this server's number; it answers for the partitions that carry it.
        workers: the workers' numbers.
        staleness: 0 for synchronous rounds: all get one result, the mean of the round added in
            the order of the workers' numbers, the same bits on each. s > 0 for bounded
            staleness: a worker gets at once all that arrived since its last pull, and waits
            only when the slowest worker is more than s rounds behind it (Ho et al., "More
            effective distributed ML via a stale synchronous parallel parameter server", 2013).
        momentum: m in u = m u + mean, and u is what workers get; use a plain optimizer with it.

    A mean is over the workers that took part: all that have not been removed.
    """

    def __init__(self, codec, server, workers, *, staleness=0, momentum=0.0):
        check_integer("staleness", staleness, 0)
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ConfigError(f"momentum: got {momentum!r}, expected a number, 0 <= momentum < 1")
        self.workers = set(workers)
        self._codec, self._staleness = codec, staleness
        self._keys = {
            key: Stream(codec, key, self.workers, momentum, staleness)
            if staleness
            else Rounds(codec, key, self.workers, momentum)
            for key, part in enumerate(codec.partitions)
            if part.server == server
        }

    def push(self, worker, key, payload, applied=True):
        """A worker's payload for its next round of a key; whether it applied the result of the last one."""
        state = self._state(worker, key)
        if state.pushed[worker] > state.pulled[worker]:
            raise ExchangeError(f"gradient {self._name(key)!r}: worker {worker} pushed again before it pulled")
        return [(to, key, answer) for to, answer in state.push(worker, payload, applied)]

    def pull(self, worker, key):
        """A worker asks for the result of its round."""
        state = self._state(worker, key)
        if state.pulled[worker] >= state.pushed[worker]:
            raise ExchangeError(f"gradient {self._name(key)!r}: worker {worker} pulled before it pushed")
        return [(to, key, answer) for to, answer in state.pull(worker)]

    def remove(self, worker):
        """Go on without a worker: it has left, or died. What it had pushed counts."""
        self.workers.discard(worker)
        answers = [(to, key, answer) for key, state in self._keys.items() for to, answer in state.remove(worker)]
        self._codec.forget(_memory_of(worker))
        return answers

    def memory(self, key, applied=True):
        """What this server keeps of a key from round to round, as bytes (1-D uint8) for `load_memory`.

        Complete when all workers have their results of the last round; applied: whether they have
        applied them. Of synchronous rounds only.
        """
        rounds, residual, velocity = self._synchronous(key).memory(applied)
        head = torch.tensor([rounds, residual is not None, velocity is not None])
        floats = [values for values in (residual, velocity) if values is not None]
        return torch.cat([head.view(torch.uint8), *map(float_to_bytes, floats)])

    def load_memory(self, key, memory):
        """Go on from `memory(key)`, between rounds; PayloadError if it is not one of this key."""
        state, numel = self._synchronous(key), self._codec.partitions[key].numel
        rounds, *there = memory[:24].clone().view(torch.int64).tolist() if memory.numel() >= 24 else [0]
        if memory.numel() != 24 + 4 * numel * sum(there):
            raise PayloadError(f"memory of {self._name(key)!r}: got {memory.numel()} bytes for {numel} entries")
        floats = iter(bytes_to_float(memory[24:].clone()).split(numel))
        residual, velocity = (next(floats) if here else None for here in there)
        state.load(rounds, residual, velocity)

    def missing(self):
        """{worker: the name of a parameter} for those whose push others wait for."""
        found = {}
        for key, state in self._keys.items():
            for worker in state.missing():
                found.setdefault(worker, self._name(key))
        return found

    def _name(self, key):
        return self._codec.partitions[key].name

    def _synchronous(self, key):
        if self._staleness:
            raise ConfigError(f"staleness: got {self._staleness}, expected 0: memory is what is left between rounds")
        return self._state_of(key)

    def _state(self, worker, key):
        if worker not in self.workers:
            raise ExchangeError(f"key {key} from worker {worker}: this server answers for no such worker")
        return self._state_of(key)

    def _state_of(self, key):
        if key not in self._keys:
            raise ExchangeError(f"key {key}: this server answers for no such key")
        return self._keys[key]


def _memory_of(worker):
    return f"@{worker}"


def _memory_name(part):
    return f"{part.name}/{part.start}"


class Rounds:
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
        self._said = None  # (worker, whether the last round was applied), from the first that said so
        self._results = {}  # round: (payload, the workers that have not pulled it)

    def push(self, worker, payload, applied):
        self._settle(worker, applied)
        self.pushed[worker] += 1
        self._payloads[worker] = payload
        return self._finish_if_complete()

    def _settle(self, worker, applied):
        """All workers must have applied a result, or none: their weights would differ ever after."""
        if self._unsettled:
            self._unsettled, self._said = False, (worker, applied)
            self._rounds += applied
            self._codec.settle([self._key], applied)
            self._velocity.apply() if applied else self._velocity.discard()
        elif self._said is not None and self._said[1] != applied:
            did, did_not = (worker, self._said[0]) if applied else (self._said[0], worker)
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
        self._results[self._collecting] = (payload, set(self._workers))
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
                answers.append((worker, self._results[number][0]))
                self._waiting.discard(worker)
                self._drop(number, worker)
        return answers

    def _drop(self, number, worker):
        self._results[number][1].discard(worker)
        if not self._results[number][1]:
            del self._results[number]


class Stream:
    """One key under bounded staleness: for every worker, all that it has not got yet.

    The sum of what a worker applies is that of all contributions, however they were cut into
    pulls: what one answer loses is in the error feedback of the next, and what a worker did not
    apply is owed to it again. A contribution that is not finite reaches all as a NaN, once.
    """

    def __init__(self, codec, key, workers, momentum, staleness):
        self._codec, self._key, self._workers = codec, key, workers
        self._momentum, self._staleness = momentum, staleness
        self.pushed = dict.fromkeys(workers, 0)
        self.pulled = dict.fromkeys(workers, 0)
        self._numel = codec.partitions[key].numel
        self._owed = {worker: torch.zeros(self._numel) for worker in workers}
        self._given = {worker: torch.zeros(self._numel) for worker in workers}  # in the last answer
        self._poisoned = set()  # workers that have yet to see a NaN
        self._waiting = set()
        # For momentum: the sums of rounds that not all have pushed, and the velocity of those that all have.
        self._open, self._closed, self._velocity = {}, 0, None

    def push(self, worker, payload, applied):
        if not applied:
            self._owed[worker].add_(self._given[worker])
        self._given[worker].zero_()
        self._codec.settle([self._key], applied, _memory_of(worker))
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
                self._owe(part)
        return self._close_rounds()

    def pull(self, worker):
        self._waiting.add(worker)
        self.pulled[worker] += 1
        return self._answer()

    def remove(self, worker):
        self._waiting.discard(worker)
        self._owed.pop(worker, None)
        self._given.pop(worker, None)
        return self._close_rounds()

    def missing(self):
        slowest = self._slowest()
        held = [w for w in self._waiting if self.pushed[w] - self._staleness > slowest]
        return [w for w in self._workers if held and self.pushed[w] == slowest]

    def _slowest(self):
        return min((self.pushed[worker] for worker in self._workers), default=0)

    def _owe(self, values):
        for owed in self._owed.values():
            owed.add_(values)

    def _close_rounds(self):
        """u = m u + mean as soon as all have pushed a round; m u is owed on top of what was passed on at once."""
        while self._momentum and self._closed < self._slowest():
            mean = self._open.pop(self._closed, None)
            if self._velocity is not None:
                self._velocity.mul_(self._momentum)
            if mean is not None:
                self._velocity = mean if self._velocity is None else self._velocity.add_(mean)
            if self._velocity is not None:
                self._owe(self._velocity * self._momentum)
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
        step, peer = self.pushed[worker], _memory_of(worker)
        if worker in self._poisoned:
            self._poisoned.discard(worker)
            return self._codec.encode(self._key, torch.full((self._numel,), math.nan), step, peer)
        self._owed[worker], self._given[worker] = self._given[worker], self._owed[worker]
        return self._codec.encode(self._key, self._given[worker], step, peer)


def _finite(values):
    return bool(torch.isfinite(torch.linalg.vector_norm(values, float("inf"))))
