"""What a parameter server computes, for any engine that carries the bytes.

A model's gradients are cut into partitions (partition.py), each the task of one server. A worker
encodes its part of a gradient, a server decodes what all workers pushed, adds it up (server_rounds.py),
and encodes the mean again for the way back, with an error feedback of its own (Zheng et al.,
arXiv 1905.10936). An engine hands a `ParameterServer` what arrives and sends what it returns. It
computes, and knows no clock and no network.
"""

from typing import NamedTuple

import torch

from ..checks import check_integer
from ..errors import ConfigError, ExchangeError, PayloadError
from ..packing import bytes_to_float
from ..policy import Policy
from .partition import PartitionCodec
from .server_rounds import BoundedStaleness, SynchronousRounds, memory_of

HEAD = 24  # bytes before the vectors of a memory: a round number and two flags, int64


def check_for_servers(policy: Policy | None) -> None:
    """ConfigError if a policy asks for what only an exchange among ranks has."""
    if policy is None:
        return
    if policy.exchange == "turns":
        raise ConfigError("exchange: got 'turns', which parameter servers have not, expected another one")
    if policy.mean != "ranks":
        raise ConfigError(f"mean: got {policy.mean!r}, expected 'ranks' with parameter servers")
    if policy.local_size not in ("auto", 1):
        raise ConfigError(f"local_size: got {policy.local_size}, expected 'auto' or 1 with parameter servers")


class Answer(NamedTuple):
    """What can be sent to a worker."""

    worker: int
    key: int
    payload: torch.Tensor  # 1-D uint8


def memory_sizes(codec: PartitionCodec, key: int) -> list[int]:
    """The bytes that `ParameterServer.memory(key)` may have: with and without a residual, and a velocity."""
    residual, velocity = codec.residual_nbytes(key), 4 * codec.partitions[key].numel
    return [HEAD + some + more for some in (0, residual) for more in (0, velocity)]


class ParameterServer:
    """One server's rounds over its partitions.

    `push`, `pull` and `remove` return what can be sent now, a list of Answers.
    A payload belongs to its round and to whoever still sends it: nothing is written into it
    again. Each worker pushes a key, then pulls it, then pushes the next round; with that push it
    says whether it applied what it pulled. If it did not, the server's memory is what it was
    before that round. An empty payload says that a worker had no gradient.

    Args:
        codec: a PartitionCodec of side "server".
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
            key: BoundedStaleness(codec, key, self.workers, momentum, staleness)
            if staleness
            else SynchronousRounds(codec, key, self.workers, momentum)
            for key, part in enumerate(codec.partitions)
            if part.server == server
        }

    def push(self, worker: int, key: int, payload: torch.Tensor, applied: bool = True) -> list[Answer]:
        """A worker's payload for its next round of a key; whether it applied the result of the last one."""
        state = self._state(worker, key)
        if state.pushed[worker] > state.pulled[worker]:
            raise ExchangeError(f"gradient {self._name(key)!r}: worker {worker} pushed again before it pulled")
        return [Answer(to, key, answer) for to, answer in state.push(worker, payload, applied)]

    def pull(self, worker: int, key: int) -> list[Answer]:
        """A worker asks for the result of its round."""
        state = self._state(worker, key)
        if state.pulled[worker] >= state.pushed[worker]:
            raise ExchangeError(f"gradient {self._name(key)!r}: worker {worker} pulled before it pushed")
        return [Answer(to, key, answer) for to, answer in state.pull(worker)]

    def remove(self, worker: int) -> list[Answer]:
        """Go on without a worker: it has left, or died. What it had pushed counts."""
        self.workers.discard(worker)
        answers = [Answer(to, key, answer) for key, state in self._keys.items() for to, answer in state.remove(worker)]
        self._codec.forget(memory_of(worker))
        return answers

    def memory(self, key: int, applied: bool = True) -> torch.Tensor:
        """What this server keeps of a key from round to round, as bytes (1-D uint8) for `load_memory`.

        Complete when all workers have their results of the last round; applied: whether they have
        applied them. Of synchronous rounds only.
        """
        rounds, residual, velocity = self._synchronous(key).memory(applied)
        head = torch.tensor([rounds, residual is not None, velocity is not None])
        vectors = [vector for vector in (residual, velocity) if vector is not None]
        return torch.cat([head.view(torch.uint8), *(vector.view(torch.uint8) for vector in vectors)])

    def load_memory(self, key: int, memory: torch.Tensor) -> None:
        """Go on from `memory(key)`, between rounds; PayloadError if it is not one of this key."""
        state, numel = self._synchronous(key), self._codec.partitions[key].numel
        head = memory[:HEAD].clone()
        rounds, *there = head.view(torch.int64).tolist() if head.numel() == HEAD else [0, 0, 0]
        sizes = [self._codec.residual_nbytes(key) * bool(there[0]), 4 * numel * bool(there[1])]
        if memory.numel() != HEAD + sum(sizes):
            raise PayloadError(f"memory of {self._name(key)!r}: got {memory.numel()} bytes for {numel} entries")
        residual, velocity = memory[HEAD:].split(sizes)
        try:
            state.load(rounds, residual.clone() if there[0] else None, bytes_to_float(velocity) if there[1] else None)
        except ConfigError as error:
            raise PayloadError(f"memory of {self._name(key)!r}: {error}") from None

    def missing(self) -> dict[int, str]:
        """{worker: the name of a parameter} for those whose push others wait for."""
        found: dict[int, str] = {}
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
