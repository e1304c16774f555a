"""What an engine is: the protocol that the exchange runs on, and what all engines do alike.

An engine carries tensors between ranks. It computes nothing: ways.py says which operations a
gradient takes, schedule.py starts them and asks whether they have ended. To write an engine:

1. Implement `Engine`. tests/local_ranks.py is the shortest one: its ranks are threads.
2. Give `GradientExchange` the engine, and each gradient as soon as it is computed.
3. Call `agree` on all ranks before the first result is waited for.
4. Wait through `wait_until`, so that a rank that is lost ends the others with an error.

Where the engine has no collectives of its own (parameter servers, BytePS), its plugin exchanges by
pushes and pulls. It implements `Ranks` alone, which is all that `agree` needs.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..errors import ConfigMismatchError, ExchangeError

# Raised by every change of payloads or messages: ranks of different releases must not decode each other.
FORMAT_VERSION = 4
SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 2e-4  # seconds between two looks at what is waited for
LONGEST_SHOWN = 2000  # characters of one configuration in an error


class Operation(Protocol):
    """A collective operation under way. It keeps the tensors that it uses."""

    def ready(self) -> bool:
        """Whether `wait` would return at once. Called often; moves the operation on where that is needed."""

    def wait(self) -> torch.Tensor:
        """Wait for the result and return it; called once."""


class Ranks(Protocol):
    """The ranks of a job that are to agree: numbered from 0, and able to show each other a text."""

    def rank(self) -> int:
        """This rank's number."""

    def world_size(self) -> int:
        """How many ranks there are."""

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order; all must call it.

        Raises:
            ExchangeError: a rank gave none within the time-out.
        """


class Engine(Ranks, Protocol):
    """Collective operations on contiguous tensors. Each method starts one and returns at once.

    A name is used for one operation at a time, and for the same one on all ranks. `lane` is the
    number of the operation within its exchange: 0 for the first round, 1 for the second, and so on.
    A result lies on the device of the tensor that was given, and is the engine's own: whoever waits
    for it may write into it. The tensor that was given is left as it was.

    Attributes:
        in_order: how the operations of different ranks meet. False: by name, in whatever order each
            rank starts them (Horovod). True: by order (torch.distributed): the engine's n-th
            operation in a lane meets the n-th in that lane on every other rank. All ranks then start
            the operations of one lane in one order. The engine must not let lanes wait for each other.
    """

    in_order: bool

    def allgather(self, name: str, lane: int, payload: torch.Tensor, sizes: Sequence[int]) -> Operation:
        """Give every rank the payloads of all.

        Args:
            payload: 1-D uint8, of sizes[rank()] bytes.
            sizes: bytes from each rank, the same list on all. They may differ, and be 0.

        The result: 1-D uint8 of sum(sizes) bytes, in rank order.
        """

    def alltoall(
        self, name: str, lane: int, payload: torch.Tensor, to: Sequence[int], back: Sequence[int]
    ) -> Operation:
        """Give every rank its part of this rank's payload.

        Args:
            payload: 1-D uint8 of sum(to) bytes: the parts in rank order.
            to: bytes for each rank, itself included.
            back: bytes from each rank.

        The result: 1-D uint8 of sum(back) bytes, in rank order.
        """

    def allreduce(self, name: str, lane: int, tensor: torch.Tensor, op: str) -> Operation:
        """Combine the ranks' tensors of one shape and type entry by entry; op: "sum" or "max".

        The result: a tensor of that shape and type, with the same bits on every rank.
        """


def agree(ranks: Ranks, configuration: dict, numbers: Sequence[int] | None = None) -> dict:
    """Compare what the ranks have configured, before one decodes another's bytes; all must call it.

    Args:
        ranks: the engine.
        configuration: this rank's, {argument: JSON-able value}. What a rank leaves out is not
            compared with the others: a server takes what the workers have.
        numbers: what errors call the ranks, in rank order; default: 0, 1, 2 and so on.

    Returns:
        What all have in common, with the arguments that this rank left out.

    Raises:
        ConfigMismatchError: on every rank. It names the arguments that differ, and who has which value.
    """
    own = json.dumps({"format": FORMAT_VERSION, **configuration}, sort_keys=True)
    configurations = [json.loads(text) for text in ranks.gather_texts(own)]
    common: dict = {}
    for each in configurations:
        common = {**each, **common}
    differing = [key for key in common if any(each.get(key, common[key]) != common[key] for each in configurations)]
    if not differing:
        return common
    groups: dict[str, list[int]] = {}
    for number, each in zip(numbers or range(len(configurations)), configurations, strict=True):
        shown = {key: each[key] for key in differing if key in each}
        if shown:
            groups.setdefault(json.dumps(shown), []).append(number)
    found = "; ".join(f"ranks {members}: {text[:LONGEST_SHOWN]}" for text, members in groups.items())
    raise ConfigMismatchError(f"{', '.join(differing)}: expected the same on all ranks, got {found}")


def name_of(compression: object) -> str:
    """An engine's own compression, a class or an object of it, as a text to compare."""
    kind = compression if isinstance(compression, type) else type(compression)
    return f"{kind.__module__}.{kind.__qualname__}"


def timeout_seconds() -> float:
    """How long a rank waits for another before it ends with an error (GCOMPRESS_TIMEOUT, default 300)."""
    return float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))


def wait_until(ready: Callable[[], bool], what: str, seconds: float | None = None) -> None:
    """Wait until `ready()`, sleeping in between: spinning would take the core from ranks that still compute.

    Args:
        what: is waited for, for the error.
        seconds: the time-out; default: `timeout_seconds()`.

    Raises:
        ExchangeError: it was not ready within the time-out.
    """
    seconds = timeout_seconds() if seconds is None else seconds
    deadline, pause = time.monotonic() + seconds, SHORTEST_PAUSE
    while not ready():
        if time.monotonic() > deadline:
            raise ExchangeError(f"{what}: no answer within {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def result(operation: Operation, what: str) -> torch.Tensor:
    """What an operation comes to; ExchangeError, with `what` it is, if it does not end within the time-out."""
    wait_until(operation.ready, what)
    return operation.wait()
