"""The ranks of one MPI job: who serves, how they talk, and what happens when one dies."""

import atexit
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch

# Read when MPI starts. With `--with-ft ulfm`, the barrier at the end now and then waits for a rank that died.
FAULT_TOLERANT = os.environ.get("OMPI_MCA_mpi_ft_enable") in ("1", "true")
IN_TIME = "mpi4py.MPI" not in sys.modules or "OMPI_MCA_async_mpi_finalize" in os.environ
if FAULT_TOLERANT:
    os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")

from mpi4py import MPI  # noqa: E402

from gcompress.checks import check_choice, check_integer  # noqa: E402
from gcompress.errors import ConfigError, ExchangeError  # noqa: E402
from gcompress.exchange.engine import wait_until  # noqa: E402
from gcompress.policy import Policy  # noqa: E402

from ..launched import die_with_the_launcher  # noqa: E402
from .server_rank import serve  # noqa: E402
from .worker_means import WorkerExchange  # noqa: E402

TIMES_TOLD_TO_END = 10  # once a second

log = logging.getLogger("gcompress.plugins.mpi")


def lets_the_rest_live():
    """Whether the launcher keeps the other ranks when one dies: Open MPI's `mpirun --with-ft ulfm`."""
    return hasattr(MPI.Comm, "Get_failed") and FAULT_TOLERANT


class Job:
    """This rank's part in the job. Every rank makes one, with the same arguments.

    Args:
        servers: how many ranks serve, the last ones; the others are workers.
        on_failure: "end" or "continue"; see the package.
        comm: the communicator to divide (default: all ranks of the job); a copy of it is used.

    Attributes: `is_server`; `rank` and `size`, a worker's number and how many there were at
    the start; `world`, the communicator of all; `workers`, that of the workers, for a script's
    own collectives (on a server: that of the servers); `all_ranks` and `settings`, who agrees on
    what before the first message; `all_workers`, who agree among themselves.
    """

    def __init__(self, servers: int = 1, on_failure: str = "end", comm: MPI.Comm | None = None):
        self.world, self.servers, self.on_failure = comm or MPI.COMM_WORLD, servers, on_failure
        self.connection = None  # this worker's Worker, once it is made
        sys.excepthook = self._uncaught
        check_integer("servers", servers, 1)
        check_choice("on_failure", on_failure, ("end", "continue"))
        if on_failure == "continue" and not lets_the_rest_live():
            raise ConfigError(
                "on_failure: got 'continue', but this launcher ends all ranks when one dies, "
                "expected `mpirun --with-ft ulfm` of Open MPI 5"
            )
        if FAULT_TOLERANT and not IN_TIME:
            log.warning(
                "mpi4py.MPI was imported before gcompress.plugins.mpi: after a death this job may hang at its end"
            )
        self.size = self.world.size - servers
        if self.size < 1:
            raise ConfigError(
                f"servers: got {servers} of {self.world.size} ranks, expected to leave at least one worker"
            )
        die_with_the_launcher()  # else a rank that hangs outlives an aborted job of `--with-ft ulfm`
        self.world = self.world.Dup()
        self.is_server = self.world.rank >= self.size
        self.rank = self.world.rank - (self.size if self.is_server else 0)
        self.workers = self.world.Split(int(self.is_server), self.world.rank)
        for communicator in (self.world, self.workers):
            communicator.Set_errhandler(MPI.ERRORS_RETURN)
        self.all_ranks, self.settings = MpiRanks(self, self.world), {"servers": servers, "on_failure": on_failure}
        self.all_workers = MpiRanks(self, self.workers)
        self._sending = []  # (request, buffer): a buffer must live until it is sent
        self._known_dead = set()
        self._next_look = 0.0
        atexit.register(self.close)

    def serve(self) -> tuple[int, int]:
        """Be a server until all workers have left; returns (bytes received, bytes sent)."""
        if not self.is_server:
            raise ConfigError(f"serve: got a call on worker {self.rank}, expected it on server ranks only")
        return serve(self)

    def mean_exchange(self, policy: Policy, tensors: dict[str, torch.Tensor]) -> WorkerExchange:
        """A worker's side of outer steps; see gcompress/outer/means.py."""
        return WorkerExchange(self, policy, tensors)

    def server_rank(self, server: int) -> int:
        """The rank of a server's number."""
        return self.size + server

    def send(self, payload: np.ndarray, rank: int, tag: int) -> None:
        """Start sending a uint8 numpy array that nobody writes into any more."""
        self._sending.append((self.world.Isend([payload, MPI.BYTE], rank, tag), payload))
        self.progress()

    def progress(self) -> None:
        """Let MPI work, and forget what has been sent."""
        left = []
        for request, payload in self._sending:
            try:
                if not request.Test():
                    left.append((request, payload))
            except MPI.Exception as error:
                self.check_failure(error)  # to a dead worker, which needs nothing any more
        self._sending = left

    def flush(self) -> None:
        """Wait until all is sent."""
        self.wait(lambda: self.progress() or not self._sending, "sending")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready()` while MPI works; ExchangeError after the time-out, with what was waited for."""

        def ready_now():
            if ready():
                return True
            self.progress()
            self.look_for_dead_servers()
            return False

        wait_until(ready_now, what)

    def check_failure(self, error: MPI.Exception) -> None:
        """Re-raise an MPI error unless it only says that a process died."""
        died = [getattr(MPI, name, None) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")]
        if error.error_class not in died:
            raise ExchangeError(f"MPI: {error}") from error

    def newly_dead(self) -> list[int]:
        """The ranks that have died since the last call; none where the launcher ends all anyway."""
        if not lets_the_rest_live():
            return []
        failed = self.world.Get_failed()
        ranks = failed.Translate_ranks(None, self.world.Get_group()) if failed.size else []
        if failed.size > len(self._known_dead):
            self.world.Ack_failed()  # or receiving from any rank stays refused
        new = sorted(set(ranks) - self._known_dead)
        self._known_dead.update(new)
        return new

    def look_for_dead_servers(self) -> None:
        """ExchangeError on a worker that waits while a server has died, at most a hundred times a second."""
        if self.is_server or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 0.01
        self.newly_dead()
        dead = [rank for rank in self._known_dead if rank >= self.size]
        if dead or (self._known_dead and self.on_failure == "end"):
            raise ExchangeError(f"{self.describe(min(dead or self._known_dead))} died: this job ends")

    def describe(self, rank: int) -> str:
        return f"worker {rank}" if rank < self.size else f"server {rank - self.size} (rank {rank})"

    def broadcast(self, state: dict[str, torch.Tensor]) -> None:
        """Give all workers worker 0's tensors; `state` is a dict as of `model.state_dict()`, changed in place."""
        for name, tensor in state.items():
            value = tensor.detach().cpu().contiguous()
            buffer = value.view(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0, np.uint8)
            self.wait(self.workers.Ibcast([buffer, MPI.BYTE]).Test, f"broadcasting {name!r}")
            tensor.detach().copy_(value)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over the workers of a list of numbers, in float64; over those alive if some have died.

        It goes through server 0, which knows who is left: a collective over the workers would
        have to be repaired, by all of them, after a death.
        """
        if self.connection is None:
            raise ConfigError("sum: got a call before a Worker or an optimizer was made, expected it afterwards")
        return self.connection.sum(values)

    def close(self) -> None:
        """Leave the job; called at the end of the process, too."""
        atexit.unregister(self.close)
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.leave()
            self.flush()

    def end_all(self) -> None:
        """End the job with an error, ranks that hang included; does not return.

        With `--with-ft ulfm`, MPI_Abort on one rank may leave the others alive, so the launcher is told: the parent of
        this process, which ends its ranks when it is told to end, and at once when it is told again.
        """
        for _ in range(TIMES_TOLD_TO_END if FAULT_TOLERANT else 0):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)
        self.world.Abort(1)

    def _uncaught(self, kind, error, trace):
        """An exception that nobody caught must not leave the other ranks waiting for this one."""
        name, trace = f"rank {self.world.rank}", "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(f"{name}:\n{trace}")
        sys.stderr.flush()
        if self.connection is not None and self.on_failure == "continue" and not isinstance(error, ExchangeError):
            # Seen by the others at once; a process that exits would wait for them in MPI_Finalize.
            os.kill(os.getpid(), signal.SIGKILL)
        self.end_all()


class MpiRanks:
    """All ranks of a job, workers and servers, or the workers alone (`gcompress.exchange.engine.Ranks`)."""

    def __init__(self, job, comm):
        self._job, self._comm = job, comm

    def rank(self):
        return self._comm.rank

    def world_size(self):
        return self._comm.size

    def gather_texts(self, text: str) -> list[str]:
        job, comm, own = self._job, self._comm, np.frombuffer(text.encode(), dtype=np.uint8)
        lengths = np.zeros(self.world_size(), dtype=np.int64)
        what = "agreeing on the configuration (have all ranks made a Job, and do the last ones serve?)"
        job.wait(comm.Iallgather([np.array([own.size]), MPI.INT64_T], [lengths, MPI.INT64_T]).Test, what)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        gathered = np.empty(starts[-1], dtype=np.uint8)
        job.wait(comm.Iallgatherv([own, MPI.BYTE], [gathered, lengths, starts[:-1], MPI.BYTE]).Test, what)
        return [gathered[a:b].tobytes().decode() for a, b in zip(starts[:-1], starts[1:], strict=True)]
