"""Horovod's named operations as an engine (gcompress/exchange/engine.py), and waiting for them without spinning."""

import math
import os

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from gcompress.errors import ExchangeError
from gcompress.exchange.engine import wait_until
from gcompress.exchange.node_engine import Topology


class MismatchedExchangeError(ExchangeError, HorovodInternalError):
    """Horovod refused an exchange: ranks asked for different things under one name."""


def patient_synchronize(handle: int) -> torch.Tensor:
    """`hvd.synchronize`, sleeping between polls; without a time-out, as Horovod's.

    Horovod's own wait spins: with more ranks than cores it takes the core from those that
    still compute.
    """
    wait_until(lambda: hvd.poll(handle), "", math.inf)
    return hvd.synchronize(handle)


def wait_or_raise(handles: list[int], what: str) -> list[torch.Tensor]:
    """The results of Horovod handles; ExchangeError when other ranks do not take part in time."""
    wait_until(lambda: all(map(hvd.poll, handles)), what)
    return [hvd.synchronize(handle) for handle in handles]


def explain(error: HorovodInternalError, what: str) -> None:
    """Raise MismatchedExchangeError with the likely cause if Horovod refused what ranks asked for in different ways."""
    if "Mismatched" in str(error) and not isinstance(error, MismatchedExchangeError):
        raise MismatchedExchangeError(
            f"{what}: {error} Did another rank call hvd.join() while this one still trains? "
            "Compressed gradients need the same number of steps on every rank."
        ) from error


class HorovodEngine:
    """Named collective operations among the ranks of a process set.

    Args:
        process_set: Horovod's.
        number: of the optimizer, the same on all ranks: two optimizers' texts must not meet.
        prefix: begins the names of its operations.
        started: a set to which what begins an exchange is added, as (function, name, process set); see patch.join.
    """

    topology: Topology | None = None  # why it is flat, where that was looked at
    in_order = False  # Horovod pairs operations by name, whatever the order in which a rank starts them

    def __init__(self, process_set: hvd.ProcessSet, number: int, prefix: str = "gcompress", started: set | None = None):
        self.process_set, self.number = process_set, number
        self._prefix, self._started = prefix, started
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"  # whether a rank may be made while others go on

    def world_size(self):
        return self.process_set.size()

    def rank(self):
        return self.process_set.rank()

    def texts_name(self, purpose: str = "configuration") -> str:
        """Horovod's name of the operation that gathers texts."""
        return f"gcompress.{purpose}.{self.number}"

    def gather_texts(self, text: str, purpose: str = "configuration") -> list[str]:
        """See `Ranks`; texts of different purposes travel under different names."""
        name, payload = self.texts_name(purpose), torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        handles = [
            hvd.allgather_async(length, name=f"{name}.length", process_set=self.process_set),
            hvd.allgather_async(payload, name=name, process_set=self.process_set),
        ]
        what = f"{name}: gathering the ranks' texts (is gcompress.plugins.horovod imported on every rank?)"
        lengths, gathered = wait_or_raise(handles, what)
        return [bytes(part.tolist()).decode() for part in gathered.split(lengths.tolist())]

    def allgather(self, name, lane, payload, sizes):
        full = self._full(name, lane, hvd.allgather_async)
        return HorovodOperation(name, hvd.allgather_async(payload, name=full, process_set=self.process_set))

    def alltoall(self, name, lane, payload, to, back):
        full = self._full(name, lane, alltoall_token_async)
        splits = torch.tensor(to, dtype=torch.int32)
        return HorovodOperation(name, hvd.alltoall_async(payload, splits, name=full, process_set=self.process_set))

    def allreduce(self, name, lane, tensor, op):
        full = self._full(name, lane, hvd.allreduce_async)
        operation = {"sum": hvd.Sum, "max": hvd.Max}[op]
        started = hvd.allreduce_async(tensor, name=full, op=operation, process_set=self.process_set)
        return HorovodOperation(name, started)

    def _full(self, name, lane, function):
        """Horovod's name of an operation."""
        full = f"{self._prefix}.{name}"
        if lane == 0 and self._started is not None:
            self._started.add((function, full, self.process_set))
        return full


def alltoall_token_async(token: torch.Tensor, name: str, process_set: hvd.ProcessSet) -> int:
    """Start an all-to-all of one token for each rank."""
    return hvd.alltoall_async(token.repeat(process_set.size()), name=name, process_set=process_set)


class HorovodOperation:
    """An operation of Horovod's under way."""

    def __init__(self, name, handle):
        self._name, self._handle = name, handle

    def ready(self):
        return hvd.poll(self._handle)

    def wait(self):
        try:
            result = patient_synchronize(self._handle)
            return result[0] if isinstance(result, tuple) else result  # an all-to-all adds the sizes received
        except HorovodInternalError as error:
            explain(error, f"gradient {self._name!r}")
            raise
