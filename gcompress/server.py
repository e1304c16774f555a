"""What parameter servers and their workers compute, for any engine that carries the bytes.

A model's gradients are cut into partitions (`partition`), each the task of one server. A worker
encodes its part of a gradient (`Codec`), a server decodes what all workers pushed, adds it up,
and encodes the mean again for the way back, with an error feedback of its own (Zheng et al.,
arXiv 1905.10936). `ParameterServer` is one server's side of that: an engine hands it what
arrives and sends what it returns. It computes, and knows no clock and no network.
"""

import heapq
import zlib
from typing import NamedTuple

import torch

from .compressors import Compressor
from .compressors.base import check_integer
from .errors import ConfigError, ExchangeError, PayloadError
from .feedback import ErrorFeedback, new_memory
from .packing import bytes_to_float, float_to_bytes


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
        self._feedback = new_memory(policy) if policy else None
        if self._feedback and side == "server":
            self._feedback = ErrorFeedback()

    def encode(self, key, values, step, peer=""):
        """The payload (1-D uint8) of a 1-D float32 tensor; `peer` names a memory of its own for one receiver."""
        part = self.partitions[key]
        if values.numel() != part.numel:
            raise ConfigError(f"gradient {part.name!r}: got {values.numel()} entries, expected {part.numel}")
        if part.compressor is None:
            return float_to_bytes(values.to(torch.float32)).clone()
        seed = zlib.crc32(f"{part.name}/{part.start}/{step}/{self._side}/{peer}".encode())
        if self._policy.feedback_for(part.compressor):
            return self._feedback.compress(_memory_name(part) + peer, values, part.compressor, seed=seed)[0]
        return part.compressor.compress(values, seed=seed)[0]

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

    def residual(self, key):
        """What error feedback holds of a partition, or None."""
        return self._feedback.residual(_memory_name(self.partitions[key])) if self._feedback else None

    def load_residual(self, key, values):
        """Go on from `residual(key)`."""
        if self._feedback:
            self._feedback.keep(_memory_name(self.partitions[key]), values, torch.zeros_like(values))

    def forget(self, peer):
        """Drop the memories of a receiver that is gone."""
        if self._feedback:
            kept = {name: value for name, value in self._feedback.state_dict().items() if not name.endswith(peer)}
            self._feedback.load_state_dict(kept)

    def state_dict(self):
        """This side's residuals by name; see `ErrorFeedback`."""
        return self._feedback.state_dict() if self._feedback else {}

    def load_state_dict(self, state):
        """Go on from `state_dict()`."""
        if self._feedback:
            self._feedback.load_state_dict(state)


class ParameterServer:
    """One server's rounds over its partitions.

    `push`, `pull` and `remove` return what can be sent now: a list of (worker, key, payload).
    A payload belongs to its round and to whoever still sends it: nothing is written into it
    again. Each worker pushes a key, then pulls it, then pushes the next round.

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

    def push(self, worker, key, payload):
        """A worker's payload for its next round of a key."""
        state = self._state(worker, key)
        if state.pushed[worker] > state.pulled[worker]:
            raise ExchangeError(f"gradient {self._name(key)!r}: worker {worker} pushed again before it pulled")
        return [(to, key, answer) for to, answer in state.push(worker, payload)]

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

    def memory(self, key):
        """What this server keeps of a key from round to round, as bytes (1-D uint8) for `load_memory`.

        Complete when all workers have their results of the last round. Of synchronous rounds only.
        """
        state, residual = self._synchronous(key), self._codec.residual(key)
        head = torch.tensor([state.rounds, residual is not None, state.velocity is not None])
        floats = [values for values in (residual, state.velocity) if values is not None]
        return torch.cat([head.view(torch.uint8), *map(float_to_bytes, floats)])

    def load_memory(self, key, memory):
        """Go on from `memory(key)`, before the first push; PayloadError if it is not one of this key."""
        state, numel = self._synchronous(key), self._codec.partitions[key].numel
        rounds, *there = memory[:24].clone().view(torch.int64).tolist() if memory.numel() >= 24 else [0]
        if memory.numel() != 24 + 4 * numel * sum(there):
            raise PayloadError(f"memory of {self._name(key)!r}: got {memory.numel()} bytes for {numel} entries")
        floats = iter(bytes_to_float(memory[24:].clone()).split(numel))
        residual, velocity = (next(floats) if here else None for here in there)
        state.rounds, state.velocity = rounds, velocity
        if residual is not None:
            self._codec.load_residual(key, residual)

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
        # Also what a restart goes on from: the rounds before this server's first (they enter the seeds), the momentum.
        self.rounds, self.velocity = 0, None
        self._results = {}  # round: (payload, the workers that have not pulled it)

    def push(self, worker, payload):
        self.pushed[worker] += 1
        self._payloads[worker] = payload
        return self._finish_if_complete()

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
        mean, self._total = self._total.mul_(1.0 / self._count), None
        payload = self._codec.encode(self._key, self._with_momentum(mean), self.rounds)
        self._results[self._collecting] = (payload, set(self._workers))
        self._collecting, self.rounds, self._count = self._collecting + 1, self.rounds + 1, 0
        return self._answer()

    def _add(self, payload):
        if self._total is None:
            self._total = torch.empty(self._codec.partitions[self._key].numel)
        self._codec.decode(self._key, payload, self._total, add=self._count > 0)
        self._count += 1

    def _with_momentum(self, mean):
        if not self._momentum:
            return mean
        velocity = mean if self.velocity is None else mean.add_(self.velocity * self._momentum)
        if _finite(velocity):  # else everyone sees it, and it is forgotten
            self.velocity = velocity
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

    The sum of what a worker gets is that of all contributions, however they were cut into
    pulls: what one answer loses is in the error feedback of the next.
    """

    def __init__(self, codec, key, workers, momentum, staleness):
        self._codec, self._key, self._workers = codec, key, workers
        self._momentum, self._staleness = momentum, staleness
        self.pushed = dict.fromkeys(workers, 0)
        self.pulled = dict.fromkeys(workers, 0)
        numel = codec.partitions[key].numel
        self._owed = {worker: torch.zeros(numel) for worker in workers}
        self._waiting = set()
        # For momentum: the sums of rounds that not all have pushed, and the velocity of those that all have.
        self._open, self._closed, self._velocity = {}, 0, None

    def push(self, worker, payload):
        part = torch.empty_like(self._owed[worker])
        self._codec.decode(self._key, payload, part)
        part.mul_(1.0 / len(self._workers))
        if self._momentum and _finite(part):
            number = self.pushed[worker]
            self._open[number] = self._open[number].add_(part) if number in self._open else part.clone()
        self.pushed[worker] += 1
        self._owe(part)
        return self._close_rounds()

    def pull(self, worker):
        self._waiting.add(worker)
        self.pulled[worker] += 1
        return self._answer()

    def remove(self, worker):
        self._waiting.discard(worker)
        self._owed.pop(worker, None)
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
                step, peer = self.pushed[worker], _memory_of(worker)
                answers.append((worker, self._codec.encode(self._key, self._owed[worker], step, peer)))
                self._owed[worker].zero_()
                self._waiting.discard(worker)
        return answers


def _finite(values):
    return bool(torch.isfinite(torch.linalg.vector_norm(values, float("inf"))))
