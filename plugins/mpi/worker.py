"""A worker's side: gradients out as payloads, means back in, a partition at a time."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from mpi4py import MPI

from gcompress.checks import check_integer
from gcompress.errors import ConfigError, ExchangeError
from gcompress.exchange.engine import agree
from gcompress.exchange.parameter_server import memory_sizes
from gcompress.exchange.partition import PartitionCodec, partition
from gcompress.exchange.results import Results
from gcompress.exchange.saved_state import check_counts
from gcompress.exchange.scaling import unscaled
from gcompress.exchange.times import DECODE, ENCODE
from gcompress.feedback import new_memory
from gcompress.forecast.decide import decide
from gcompress.packing import saturated, to_type
from gcompress.policy import as_policy

from .configuration import check_configuration
from .messages import leave_tag, memory_tag, pull_tag, push_tag, sum_tag

SMALLEST_PARTITION, LARGEST_PARTITION = 1 << 16, 1 << 20  # entries
STATE_KEYS = ("rank", "world_size", "policy", "partition_numel", "sizes", "report", "steps", "feedback", "servers")


class Worker(Results):
    """One worker's connection to the servers, for tensors of fixed names and sizes.

    Args:
        job: a Job, on a worker rank. Each job has one connection.
        sizes: {name: number of entries}, the same on all workers.
        compression: what `gcompress.as_policy` takes, or None to send float32.
        partition_bytes: tensors are cut into parts of that many bytes of float32; None: so that each
            server gets about four, of 256 KiB to 4 MiB.
        staleness, momentum: see `gcompress.exchange.parameter_server.ParameterServer`.
        scaler: the loss scale that gradients carry, see `gcompress.exchange.scaling.LossScale`.

    All workers must give the same; ConfigMismatchError on every rank otherwise.

    Memory follows the steps that are applied. Without `watch`, `end_step` says that all were; with it,
    a result whose step was skipped leaves memory on both sides as it was. Under bounded staleness
    what a worker pushed is delivered to all others whatever becomes of its own step, so only what
    it pulled can be taken back: it is in the servers' residual again.
    """

    def __init__(self, job, sizes, compression=None, *, partition_bytes=None, staleness=0, momentum=0.0, scaler=None):
        if job.is_server:
            raise ConfigError(f"job: got server {job.rank}, expected a worker; a server calls job.serve()")
        if job.connection is not None:
            raise ConfigError("job: it has a connection already, expected one for all parameters")
        if partition_bytes is None:
            share = -(-sum(sizes.values()) // (4 * job.servers))
            partition_bytes = 4 * min(max(share, SMALLEST_PARTITION), LARGEST_PARTITION)
        check_integer("partition_bytes", partition_bytes, 4)
        check_integer("staleness", staleness, 0)
        super().__init__(None if compression is None else as_policy(compression), scaler)
        if self.policy and self.policy.undecided:
            self.policy = decide(self.policy, job.all_workers, {name: torch.Size([n]) for name, n in sizes.items()})
        self.job = job
        configuration = {
            **job.settings,
            "compression": self.policy.to_dict() if self.policy else None,
            "partition_numel": partition_bytes // 4,
            "staleness": staleness,
            "momentum": momentum,
            "sizes": list(sizes.items()),  # in their order, which decides the keys
        }
        agree(job.all_ranks, configuration)
        check_configuration(configuration)
        self.partitions = partition(sizes, self.policy, job.servers, partition_bytes // 4)
        if sum_tag(self.partitions) > job.world.Get_attr(MPI.TAG_UB):
            raise ConfigError(f"partition_bytes: {len(self.partitions)} partitions are more than MPI has tags for")
        job.connection = self
        self._sizes = dict(sizes)
        self._codec = PartitionCodec(self.partitions, self.policy, f"worker {job.rank}")
        self._keys = {name: [] for name in sizes}  # an empty tensor has none
        for key, part in enumerate(self.partitions):
            self._keys[part.name].append(key)
        self._pushed = {}  # name: (shape, type) of what was pushed and not pulled
        self._asked = {}  # {id of a buffer: (request, buffer)} of answers that have not come
        self._on_the_wire = {}  # name: what `Times.arrived` is to be told
        self._waiting = set()  # names pulled whose mean has not been taken
        self._partition_numel, self._staleness = partition_bytes // 4, staleness

    def _whose(self):
        return self.job.rank, self.job.size

    def _settle(self, names, applied):
        self._codec.settle([key for name in names for key in self._keys[name]], applied)

    def _continue(self, name):
        """The servers take the result as applied."""
        for key in self._keys[name]:
            self._codec.carry_on(key)

    def push(self, name: str, tensor: torch.Tensor, *, absent: bool = False) -> None:
        """Encode a tensor part by part and start sending each; pull it before the next push of this name.

        absent: this worker has no gradient: `tensor` is only looked at for its shape and type.
        """
        if name not in self._keys:
            raise ConfigError(f"name: got {name!r}, expected one of the {len(self._keys)} that were connected")
        if name in self._pushed:
            raise ExchangeError(f"gradient {name!r}: pushed again before it was pulled")
        scale = self.loss_scale()
        expected = sum(self.partitions[key].numel for key in self._keys[name])
        if tensor.numel() != expected:
            raise ConfigError(f"gradient {name!r}: got {tensor.numel()} entries, expected {expected}")
        applied = self._open(name)
        self._pushed[name] = (tensor.shape, tensor.dtype, tensor.device, scale)
        if not absent:
            values = to_type(unscaled(tensor.detach().reshape(-1), scale), torch.float32).cpu()
            self._measure(name, values)
        begun, sent = self.report.times.clock(), 0
        for key in self._keys[name]:
            part = self.partitions[key]
            payload = torch.empty(0, dtype=torch.uint8)
            if not absent:
                payload = self._codec.encode(key, values[part.start : part.start + part.numel], self.steps)
            self.job.send(payload.numpy(), self.job.server_rank(part.server), push_tag(key, applied))
            self.report.add_push_pull(part.numel, payload.numel(), 0, self.job.size)
            sent += payload.numel()
        self._departed(name, begun, sent)
        if self._staleness:  # what is pushed is delivered, whatever becomes of this worker's step
            self._codec.settle(self._keys[name], True)

    def _measure(self, name, values):
        """Take up the error of what is about to be encoded, in a step in which that is asked for."""
        found = self.report.encoding_errors
        for key in self._keys[name] if found.due(self.report.steps) else ():
            part = self.partitions[key]
            if part.compressor:
                mine = values[part.start : part.start + part.numel]
                found.add(name, *self._codec.coded(key, mine, self.steps))

    def _departed(self, name, begun, nbytes):
        """A gradient, encoded since `begun`, is on its way: until all of its mean is seen to be here."""
        times, now = self.report.times, self.report.times.clock()
        group = times.group(name, (name,))
        times.worked(ENCODE, group, begun, now)
        times.departed(group, nbytes, now)
        self._on_the_wire[name] = group, "push_pull", nbytes, now

    def pull(self, name: str) -> Callable[[], torch.Tensor]:
        """Ask for the workers' mean of what was pushed; returns a function that waits for it and returns it."""
        if name not in self._pushed:
            raise ExchangeError(f"gradient {name!r}: pulled before it was pushed")
        shape, dtype, device, scale = self._pushed.pop(name)
        pending = {key: self._ask(key, pull_tag(key), self.partitions[key].nbytes) for key in self._keys[name]}
        total = torch.empty(sum(self.partitions[key].numel for key in pending))
        self._waiting.add(name)

        def finish():
            times, sent = self.report.times, self._on_the_wire.pop(name)
            try:
                self.job.wait(lambda: self._take(pending, total, sent[0]), f"gradient {name!r}")
            finally:
                times.wait_ends()
            times.arrived(*sent, times.clock())
            self._waiting.discard(name)
            for key in self._keys[name]:
                part = self.partitions[key]
                self._codec.deliver(key, total[part.start : part.start + part.numel])
            self._note_empty(name, total)
            mean, beyond = saturated(total if scale == 1.0 else total * scale, dtype)
            for key in self._keys[name] if beyond is not None else ():
                part = self.partitions[key]
                self._codec.add(key, beyond[part.start : part.start + part.numel] / scale)
            return mean.to(device).view(shape)

        return finish

    def push_pull(self, name: str, tensor: torch.Tensor, *, absent: bool = False) -> Callable[[], torch.Tensor]:
        """`push`, then `pull`."""
        self.push(name, tensor, absent=absent)
        return self.pull(name)

    def _ask(self, key, tag, largest, question=0):
        """Ask a key's server, with `question` zero bytes, for at most `largest`; returns what `_answer` takes."""
        rank, buffer = self.job.server_rank(self.partitions[key].server), torch.empty(largest, dtype=torch.uint8)
        request = self.job.world.Irecv([buffer.numpy(), MPI.BYTE], rank, tag)
        self._asked[id(buffer)] = request, buffer  # MPI writes there even if nobody asks for it any more
        self.job.send(torch.zeros(question, dtype=torch.uint8).numpy(), rank, tag)
        return request, buffer

    def _answer(self, key, request, buffer):
        """The bytes that have come, or None."""
        status, part = MPI.Status(), self.partitions[key]
        try:
            if not request.Test(status):
                return None
        except MPI.Exception as error:
            self.job.check_failure(error)
            rank = self.job.server_rank(part.server)
            raise ExchangeError(f"gradient {part.name!r}: {self.job.describe(rank)} died") from error
        del self._asked[id(buffer)]
        size = status.Get_count(MPI.BYTE)
        if size == 0:
            raise ExchangeError(f"gradient {part.name!r}: the servers have given this worker up for its silence")
        return buffer[:size]

    def _take(self, pending, total, group):
        """Decode what has come; returns whether that was all. group: whose times they are."""
        times = self.report.times
        for key, asked in list(pending.items()):
            payload = self._answer(key, *asked)
            if payload is None:
                times.wait_begins(group)
                continue
            del pending[key]
            part, begun = self.partitions[key], times.clock()
            self.report.pulled_bytes += payload.numel()
            self._codec.decode(key, payload, total[part.start : part.start + part.numel])
            times.worked(DECODE, group, begun, times.clock())
        return not pending

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of a list of numbers over the workers that are left; see `Job.sum`."""
        own, total = np.array(values, dtype=np.float64), np.empty(len(values), dtype=np.float64)
        status, server = MPI.Status(), self.job.server_rank(0)
        request = self.job.world.Irecv([total.view(np.uint8), MPI.BYTE], server, sum_tag(self.partitions))
        self.job.send(own.view(np.uint8), server, sum_tag(self.partitions))
        try:
            self.job.wait(lambda: request.Test(status), "summing over the workers")
        except MPI.Exception as error:
            self.job.check_failure(error)
            raise ExchangeError(f"summing over the workers: {self.job.describe(server)} died") from error
        if status.Get_count(MPI.BYTE) != own.nbytes:
            raise ExchangeError("summing over the workers: the servers have given this worker up for its silence")
        return total.tolist()

    def _all_came(self):
        try:
            return MPI.Request.Testall([request for request, _ in self._asked.values()])
        except MPI.Exception as error:
            self.job.check_failure(error)  # of a server that died, which owes nothing
            return True

    def leave(self) -> None:
        """Tell the servers that this worker is done, once all that it asked for has come."""
        self.job.wait(self._all_came, "what the servers still owe this worker")
        nothing = torch.empty(0, dtype=torch.uint8).numpy()
        for server in range(self.job.servers):
            self.job.send(nothing, self.job.server_rank(server), leave_tag(self.partitions))

    def state_dict(self) -> dict:
        """This worker's memory and counts: save one per worker and load each on its own.

        Worker 0's has the memory of the servers too, unless `staleness` lets them be amid a
        round: to be called between steps.
        """
        if self._pushed or self._waiting:
            raise ExchangeError(f"state_dict: {len(self._pushed) + len(self._waiting)} gradients are on their way")
        return {
            "rank": self.job.rank,
            "world_size": self.job.size,
            "policy": self.policy.to_dict() if self.policy else None,
            "partition_numel": self._partition_numel,
            "sizes": self._sizes,
            "report": self.report.counts(),
            "steps": self.steps,
            "feedback": self._codec.state_dict(),
            "servers": self._memory_of_servers() if self.job.rank == 0 and not self._staleness else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`, or from what `merge_states` made of all workers', between steps.

        Raises:
            ConfigError: it was of other settings, another model or another worker. Nothing has changed then.
        """
        self._check_settings(state)
        tensors = self._codec.checked(state["feedback"])
        for key, memory in state["servers"].items():
            known = isinstance(key, int) and key in range(len(self.partitions)) and isinstance(memory, torch.Tensor)
            if not known or memory.dtype != torch.uint8 or memory.numel() not in memory_sizes(self._codec, key):
                raise ConfigError(f"state: got servers' memory of {key!r} that is none of this job's partitions'")
        self.discard()
        self._not_applied.clear()
        self.report.load(state["report"])
        self.steps = state["steps"]
        self._codec.load(tensors)
        for key, memory in state["servers"].items() if self.job.rank == 0 else ():
            rank = self.job.server_rank(self.partitions[key].server)
            self.job.send(memory.numpy(), rank, memory_tag(key))

    def _check_settings(self, state):
        if not isinstance(state, dict):
            raise ConfigError(f"state: got {type(state).__name__}, expected what state_dict() returned")
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ConfigError(f"state: it has no {missing[0]!r}, expected what state_dict() of this release returned")
        check_counts(state)
        if not isinstance(state["servers"], dict):
            raise ConfigError(f"state: got servers={state['servers']!r}, expected their memory by key")
        policy = self.policy.to_dict() if self.policy else None
        if (as_policy(state["policy"]).to_dict() if state["policy"] else None) != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        if state["partition_numel"] != self._partition_numel:
            raise ConfigError(
                f"partition_bytes: the saved state is of {4 * state['partition_numel']}, "
                f"this run uses {4 * self._partition_numel}"
            )
        if state["sizes"] != self._sizes:
            raise ConfigError(f"state: got sizes {state['sizes']}, expected {self._sizes}: it is another model's")
        if state["servers"] and self._staleness:
            raise ConfigError(f"staleness: the saved state is of synchronous rounds, this run uses {self._staleness}")
        if (
            state["rank"] not in (None, self.job.rank)
            or state["rank"] is not None
            and state["world_size"] != self.job.size
        ):
            raise ConfigError(
                f"state: got that of worker {state['rank']} of {state['world_size']}, expected one that worker "
                f"{self.job.rank} of {self.job.size} saved; for another number of workers merge those of all: "
                "gcompress.plugins.mpi.merge_states"
            )

    def _memory_of_servers(self):
        """{key: `ParameterServer.memory`}."""
        pending = {}
        for key, part in enumerate(self.partitions):
            skipped = part.name in self._not_applied or (part.name in self.open_names and self._watch is not None)
            pending[key] = self._ask(key, memory_tag(key), max(memory_sizes(self._codec, key)), question=int(skipped))
        found = {}

        def all_came():
            for key, asked in pending.items():
                if found.get(key) is None:
                    found[key] = self._answer(key, *asked)
            return None not in found.values()

        self.job.wait(all_came, "the servers' memory")
        return found


def merge_states(states: Iterable[dict]) -> dict:
    """One state of those that all workers saved after one step, for every worker of a job of any size.

    Each worker then takes the mean of all residuals, which is what the mean over the new workers' residuals stays.
    """
    states = sorted(states, key=lambda state: state["rank"])
    ranks = [state["rank"] for state in states]
    if not states or ranks != list(range(states[0]["world_size"])):
        raise ConfigError(f"states: got those of workers {ranks}, expected one of each of all workers of a job")
    first = states[0]
    for key in ("policy", "partition_numel", "sizes", "steps", "world_size"):
        if any(state[key] != first[key] for state in states):
            raise ConfigError(f"states: got workers that differ in {key}, expected states of one run after one step")
    return {
        **first,
        "rank": None,
        "feedback": _merged_feedback(first["policy"], [state["feedback"] for state in states]),
    }


def _merged_feedback(policy, feedbacks):
    """The mean of workers' memories, as each of them keeps it."""
    memory = new_memory(as_policy(policy)) if policy else None
    if memory is None:
        return {}
    vectors = [memory.vectors_of(memory.checked(feedback)) for feedback in feedbacks]
    memory.load_vectors(_mean_of(vectors))
    return memory.state_dict()


def _mean_of(states):
    """The mean of nested dicts of tensors, of which a missing one is zero."""
    mean = {}
    for state in states:
        for name, value in state.items():
            if isinstance(value, dict):
                mean[name] = _mean_of([state.get(name, {}) for state in states])
            else:
                mean[name] = mean.get(name, 0.0) + value / len(states)
    return mean
