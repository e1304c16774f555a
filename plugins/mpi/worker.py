"""A worker's side: gradients out as payloads, means back in, a partition at a time."""

import torch
from mpi4py import MPI

from gcompress.compressors.base import check_integer
from gcompress.errors import ConfigError, ExchangeError
from gcompress.policy import as_policy
from gcompress.report import Report
from gcompress.server import Codec, partition

from .messages import given_up_tag, leave_tag, pull_tag, push_tag

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
        if job.leave is not None:
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
        if given_up_tag(self.partitions) > job.world.Get_attr(MPI.TAG_UB):
            raise ConfigError(f"partition_bytes: {len(self.partitions)} partitions are more than MPI has tags for")
        job.leave = self._leave
        self.report = Report()
        self._codec = Codec(self.partitions, self.policy, f"worker {job.rank}")
        self._keys = {name: [] for name in sizes}  # an empty tensor has none
        for key, part in enumerate(self.partitions):
            self._keys[part.name].append(key)
        self._pushed = {}  # name: (shape, type) of what was pushed and not pulled

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
        pending = {}
        for key in self._keys[name]:
            part = self.partitions[key]
            rank, buffer = self.job.server_rank(part.server), torch.empty(part.nbytes, dtype=torch.uint8)
            pending[key] = (self.job.world.Irecv([buffer.numpy(), MPI.BYTE], rank, pull_tag(key)), buffer)
            self.job.send(torch.empty(0, dtype=torch.uint8).numpy(), rank, pull_tag(key))
        total = torch.empty(sum(self.partitions[key].numel for key in pending))

        def finish():
            self.job.wait(lambda: self._take(pending, total), f"gradient {name!r}")
            return total.to(device=device, dtype=dtype).view(shape)

        return finish

    def push_pull(self, name, tensor):
        """`push`, then `pull`."""
        self.push(name, tensor)
        return self.pull(name)

    def _take(self, pending, total):
        """Decode what has come; returns whether that was all."""
        status = MPI.Status()
        for key, (request, buffer) in list(pending.items()):
            part = self.partitions[key]
            try:
                if not request.Test(status):
                    continue
            except MPI.Exception as error:
                self.job.check_failure(error)
                rank = self.job.server_rank(part.server)
                raise ExchangeError(f"gradient {part.name!r}: {self.job.describe(rank)} died") from error
            size = status.Get_count(MPI.BYTE)
            if size == 0:
                raise ExchangeError(f"gradient {part.name!r}: the servers have given this worker up for its silence")
            del pending[key]
            self.report.pulled_bytes += size
            self._codec.decode(key, buffer[:size], total[part.start : part.start + part.numel])
        return not pending

    def end_step(self):
        """To be called once after all gradients of a step."""
        self.report.end_step()

    def _leave(self):
        nothing = torch.empty(0, dtype=torch.uint8).numpy()
        for server in range(self.job.servers):
            self.job.send(nothing, self.job.server_rank(server), leave_tag(self.partitions))

    def state_dict(self):
        """This worker's memory and counts: save one per worker and load each on its own."""
        return {
            "policy": self.policy.to_dict() if self.policy else None,
            "report": self.report.as_dict(),
            "feedback": self._codec.state_dict(),
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()`; ConfigError if it was another policy's."""
        policy = self.policy.to_dict() if self.policy else None
        if state["policy"] != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        self.report.load(state["report"])
        self._codec.load_state_dict(state["feedback"])
