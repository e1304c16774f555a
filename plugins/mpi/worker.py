"""A worker's side: gradients out as payloads, means back in, a partition at a time."""

import numpy as np
import torch
from mpi4py import MPI

from gcompress.compressors.base import check_integer
from gcompress.errors import ConfigError, ExchangeError
from gcompress.policy import as_policy
from gcompress.report import Report
from gcompress.server import Codec, partition

from .messages import leave_tag, memory_tag, pull_tag, push_tag, sum_tag

SMALLEST_PARTITION, LARGEST_PARTITION = 1 << 16, 1 << 20  # entries


class Worker:
    """One worker's connection to the servers, for tensors of fixed names and sizes.

    Args:
        job: a Job, on a worker rank. Each job has one connection.
        sizes: {name: number of entries}, the same on all workers.
        compression: what `gcompress.as_policy` takes, or None to send float32.
        partition_bytes: tensors are cut into parts of so many bytes of float32; None: so that each
            server gets about four, of 256 KiB to 4 MiB.
        staleness, momentum: see `gcompress.server.ParameterServer`.

    All workers must give the same; ConfigMismatchError on every rank otherwise.
    """

    def __init__(self, job, sizes, compression=None, *, partition_bytes=None, staleness=0, momentum=0.0):
        if job.is_server:
            raise ConfigError(f"job: got server {job.rank}, expected a worker; a server calls job.serve()")
        if job.connection is not None:
            raise ConfigError("job: it has a connection already, expected one for all parameters")
        if partition_bytes is None:
            share = -(-sum(sizes.values()) // (4 * job.servers))
            partition_bytes = 4 * min(max(share, SMALLEST_PARTITION), LARGEST_PARTITION)
        check_integer("partition_bytes", partition_bytes, 4)
        check_integer("staleness", staleness, 0)
        self.job, self.policy = job, None if compression is None else as_policy(compression)
        configuration = {
            "compression": self.policy.to_dict() if self.policy else None,
            "partition_numel": partition_bytes // 4,
            "staleness": staleness,
            "momentum": momentum,
            "sizes": list(sizes.items()),  # in their order, which decides the keys
        }
        job.agree(configuration)
        self.partitions = partition(sizes, self.policy, job.servers, partition_bytes // 4)
        if sum_tag(self.partitions) > job.world.Get_attr(MPI.TAG_UB):
            raise ConfigError(f"partition_bytes: {len(self.partitions)} partitions are more than MPI has tags for")
        job.connection = self
        self.report = Report()
        self._codec = Codec(self.partitions, self.policy, f"worker {job.rank}")
        self._keys = {name: [] for name in sizes}  # an empty tensor has none
        for key, part in enumerate(self.partitions):
            self._keys[part.name].append(key)
        self._pushed = {}  # name: (shape, type) of what was pushed and not pulled
        self._waiting = set()  # names pulled whose mean has not been taken
        self._partition_numel, self._staleness = partition_bytes // 4, staleness

    def push(self, name, tensor):
        """Encode a tensor part by part and start sending each; pull it before the next push of this name."""
        if name not in self._keys:
            raise ConfigError(f"name: got {name!r}, expected one of the {len(self._keys)} that were connected")
        if name in self._pushed:
            raise ExchangeError(f"gradient {name!r}: pushed again before it was pulled")
        values = tensor.detach().reshape(-1).to(device="cpu", dtype=torch.float32)
        expected = sum(self.partitions[key].numel for key in self._keys[name])
        if values.numel() != expected:
            raise ConfigError(f"gradient {name!r}: got {values.numel()} entries, expected {expected}")
        self._pushed[name] = (tensor.shape, tensor.dtype, tensor.device)
        for key in self._keys[name]:
            part = self.partitions[key]
            payload = self._codec.encode(key, values[part.start : part.start + part.numel], self.report.steps)
            self.job.send(payload.numpy(), self.job.server_rank(part.server), push_tag(key))
            self.report.add_push_pull(part.numel, payload.numel(), 0, self.job.size)

    def pull(self, name):
        """Ask for the workers' mean of what was pushed; returns a function that waits for it and returns it."""
        if name not in self._pushed:
            raise ExchangeError(f"gradient {name!r}: pulled before it was pushed")
        shape, dtype, device = self._pushed.pop(name)
        pending = {key: self._ask(key, pull_tag(key), self.partitions[key].nbytes) for key in self._keys[name]}
        total = torch.empty(sum(self.partitions[key].numel for key in pending))
        self._waiting.add(name)

        def finish():
            self.job.wait(lambda: self._take(pending, total), f"gradient {name!r}")
            self._waiting.discard(name)
            return total.to(device=device, dtype=dtype).view(shape)

        return finish

    def push_pull(self, name, tensor):
        """`push`, then `pull`."""
        self.push(name, tensor)
        return self.pull(name)

    def _ask(self, key, tag, largest):
        """Ask a key's server for something of at most so many bytes; what `_answer` takes."""
        rank, buffer = self.job.server_rank(self.partitions[key].server), torch.empty(largest, dtype=torch.uint8)
        request = self.job.world.Irecv([buffer.numpy(), MPI.BYTE], rank, tag)
        self.job.send(torch.empty(0, dtype=torch.uint8).numpy(), rank, tag)
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
        size = status.Get_count(MPI.BYTE)
        if size == 0:
            raise ExchangeError(f"gradient {part.name!r}: the servers have given this worker up for its silence")
        return buffer[:size]

    def _take(self, pending, total):
        """Decode what has come; returns whether that was all."""
        for key, asked in list(pending.items()):
            payload = self._answer(key, *asked)
            if payload is None:
                continue
            del pending[key]
            part = self.partitions[key]
            self.report.pulled_bytes += payload.numel()
            self._codec.decode(key, payload, total[part.start : part.start + part.numel])
        return not pending

    def end_step(self):
        """To be called once after all gradients of a step."""
        self.report.end_step()

    def sum(self, values):
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

    def leave(self):
        """Tell the servers that this worker is done."""
        nothing = torch.empty(0, dtype=torch.uint8).numpy()
        for server in range(self.job.servers):
            self.job.send(nothing, self.job.server_rank(server), leave_tag(self.partitions))

    def state_dict(self):
        """This worker's memory and counts: save one per worker and load each on its own.

        Worker 0's has the memory of the servers too, unless `staleness` lets them be amid a
        round: to be called between steps.
        """
        if self._pushed or self._waiting:
            raise ExchangeError(f"state_dict: {len(self._pushed) + len(self._waiting)} gradients are on their way")
        return {
            "policy": self.policy.to_dict() if self.policy else None,
            "partition_numel": self._partition_numel,
            "report": self.report.as_dict(),
            "feedback": self._codec.state_dict(),
            "servers": self._memory_of_servers() if self.job.rank == 0 and not self._staleness else {},
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()`, before the first push; ConfigError if it was of other settings."""
        policy = self.policy.to_dict() if self.policy else None
        if state["policy"] != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        if state["partition_numel"] != self._partition_numel:
            raise ConfigError(
                f"partition_bytes: the saved state is of {4 * state['partition_numel']}, "
                f"this run uses {4 * self._partition_numel}"
            )
        if state["servers"] and self._staleness:
            raise ConfigError(f"staleness: the saved state is of synchronous rounds, this run uses {self._staleness}")
        self.report.load(state["report"])
        self._codec.load_state_dict(state["feedback"])
        for key, memory in state["servers"].items():
            rank = self.job.server_rank(self.partitions[key].server)
            self.job.send(memory.numpy(), rank, memory_tag(key))

    def _memory_of_servers(self):
        """{key: bytes}: a round number and two flags, then a residual and a velocity, as far as there are."""
        pending = {
            key: self._ask(key, memory_tag(key), 24 + 8 * part.numel) for key, part in enumerate(self.partitions)
        }
        found = {}

        def all_came():
            for key, asked in pending.items():
                if found.get(key) is None:
                    found[key] = self._answer(key, *asked)
            return None not in found.values()

        self.job.wait(all_came, "the servers' memory")
        return found
