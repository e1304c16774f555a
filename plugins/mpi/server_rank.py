"""A server rank: receives, lets a `ParameterServer` (gcompress/exchange/) compute, and sends what is ready."""

import logging
import time

import numpy as np
import torch
from mpi4py import MPI

from gcompress.errors import ExchangeError
from gcompress.exchange.engine import agree, timeout_seconds
from gcompress.exchange.parameter_server import ParameterServer
from gcompress.exchange.partition import PartitionCodec, partition
from gcompress.policy import as_policy

from .configuration import check_configuration
from .messages import (
    TAGS,
    given_up_tag,
    leave_tag,
    memory_tag,
    pull_tag,
    push_tag,
    sum_tag,
)

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two looks at what has come

log = logging.getLogger("gcompress.plugins.mpi")


def serve(job) -> tuple[int, int]:
    """Serve until all workers have left; returns (bytes received, bytes sent)."""
    server = ServerRank(job)
    pause = SHORTEST_PAUSE
    while server.state.workers:
        if server.receive():
            pause = SHORTEST_PAUSE
            continue
        job.progress()
        server.look_for_dead_workers()
        server.look_for_late_workers()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    job.flush()
    if server.given_up:
        # MPI would wait for them when the job ends; the others have left, so nothing is lost.
        log.error("ending the job with an error: %s never came back", ", ".join(f"worker {w}" for w in server.given_up))
        job.end_all()
    return server.received, server.sent


class ServerRank:
    """One server's messages, deaths and time-outs."""

    def __init__(self, job):
        self.job = job
        agreed = agree(job.all_ranks, job.settings)
        check_configuration(agreed)
        policy = as_policy(agreed["compression"]) if agreed["compression"] else None
        self.partitions = partition(dict(agreed["sizes"]), policy, job.servers, agreed["partition_numel"])
        codec = PartitionCodec(self.partitions, policy, "server")
        self.state = ParameterServer(
            codec, job.rank, range(job.size), staleness=agreed["staleness"], momentum=agreed["momentum"]
        )
        self.received = self.sent = 0
        self.given_up = set()
        self.numbers = {}  # worker: what it gave to be summed
        self._last_message = self._next_look = time.monotonic()

    def receive(self) -> bool:
        """Take one message, if there is one; returns whether there was."""
        status = MPI.Status()
        try:
            message = self.job.world.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            if message is None:
                return False
            payload = torch.empty(status.Get_count(MPI.BYTE), dtype=torch.uint8)
            message.Recv([payload.numpy(), MPI.BYTE])
        except MPI.Exception as error:
            self.job.check_failure(error)
            self.look_for_dead_workers(at_once=True)
            return False
        self.received += payload.numel()
        self._last_message = time.monotonic()
        self._handle(status.Get_source(), status.Get_tag(), payload)
        return True

    def _handle(self, worker, tag, payload):
        key = tag // TAGS
        if tag == given_up_tag(self.partitions):
            self._give_up(int(payload.numpy().view(np.int32)[0]))
        elif worker in self.given_up:
            if tag in (pull_tag(key), memory_tag(key), sum_tag(self.partitions)):
                self.job.send(np.empty(0, dtype=np.uint8), worker, tag)
        elif tag == leave_tag(self.partitions):
            self._remove(worker)
        elif tag == sum_tag(self.partitions):
            self.numbers[worker] = payload.numpy().view(np.float64)
            self._answer_sum()
        elif tag in (push_tag(key), push_tag(key, applied=False)):
            self._send(self.state.push(worker, key, payload, applied=tag == push_tag(key)))
        elif tag == pull_tag(key):
            self._send(self.state.pull(worker, key))
        elif payload.numel() > 1:
            self.state.load_memory(key, payload)
        else:
            self.job.send(self.state.memory(key, applied=not payload.numel()).numpy(), worker, tag)

    def _remove(self, worker):
        self._send(self.state.remove(worker))
        self.numbers.pop(worker, None)
        self._answer_sum()

    def _answer_sum(self):
        """When all that are left have given their numbers, added in the order of the workers."""
        if self.numbers and self.state.workers <= self.numbers.keys():
            given = [self.numbers.pop(worker) for worker in sorted(self.state.workers)]
            sizes = [numbers.size for numbers in given]
            if len(set(sizes)) > 1:
                raise ExchangeError(f"sum: expected as many numbers from every worker, got {sizes}")
            for worker in self.state.workers:
                self.job.send(sum(given).view(np.uint8), worker, sum_tag(self.partitions))

    def _send(self, answers):
        for worker, key, payload in answers:
            self.sent += payload.numel()
            self.job.send(payload.numpy(), worker, pull_tag(key))

    def look_for_dead_workers(self, at_once=False):
        if not at_once and time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 0.01
        for rank in self.job.newly_dead():
            if rank >= self.job.size or self.job.on_failure == "end":
                raise ExchangeError(f"{self.job.describe(rank)} died: this job ends")
            if rank in self.state.workers:
                log.error("worker %d died: going on with %d workers", rank, len(self.state.workers) - 1)
                self._remove(rank)

    def look_for_late_workers(self):
        """Workers that others have waited for since the time-out began."""
        if time.monotonic() - self._last_message < timeout_seconds() * 0.8:
            return  # before the waiting workers give up themselves
        self._last_message = time.monotonic()
        late = {worker: f"gradient {name!r}" for worker, name in self.state.missing().items()}
        if self.numbers and not late:
            late = dict.fromkeys(self.state.workers - self.numbers.keys(), "numbers to sum")
        told = ", ".join(f"worker {worker} ({what})" for worker, what in sorted(late.items()))
        if late and self.job.on_failure == "end":
            raise ExchangeError(f"nothing came within {timeout_seconds() * 0.8:g} s from {told}: this job ends")
        for worker in late:
            log.error("nothing came within %g s from %s: going on without", timeout_seconds() * 0.8, told)
            self._give_up(worker)
            for other in set(range(self.job.servers)) - {self.job.rank}:
                notice = np.array([worker], dtype=np.int32).view(np.uint8)
                self.job.send(notice, self.job.server_rank(other), given_up_tag(self.partitions))

    def _give_up(self, worker):
        self.given_up.add(worker)
        if worker in self.state.workers:
            self._remove(worker)
