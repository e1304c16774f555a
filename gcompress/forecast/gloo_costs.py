"""What torch's Gloo engine itself takes of the processor, measured on two ranks that are threads of this process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

ENTRIES = 1 << 20
DTYPES = {4: torch.float32, 2: torch.float16, -2: torch.bfloat16}  # as TorchCosts names them
TIMEOUT = timedelta(seconds=30)


class GlooCosts(NamedTuple):
    """Processor seconds of one rank for a byte that it sends, receiving as many.

    allreduce: {4: of float32, 2: of float16, -2: of bfloat16}, their sums included.
    allgather, alltoall: of bytes.
    """

    allreduce: dict[int, float]
    allgather: float
    alltoall: float

    def of(self, kind: str, entry: int = 4) -> float:
        """Of an operation's kind, and of the entries that it sums."""
        return self.allreduce[entry] if kind == "allreduce" else getattr(self, kind)


NO_COSTS = GlooCosts({4: 0.0, 2: 0.0, -2: 0.0}, 0.0, 0.0)  # of an engine whose sums run on the device


def measure_gloo(repeat: int = 5) -> GlooCosts:
    """GlooCosts of this machine; NO_COSTS where torch has no Gloo."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return NO_COSTS
    groups: list = [None, None]
    store = dist.HashStore()

    def join(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, TIMEOUT)

    _on_both(join)
    payloads = [torch.zeros(ENTRIES, dtype=torch.uint8) for _ in groups]
    results = [[torch.empty_like(payloads[0]) for _ in groups] for _ in groups]
    flat = [torch.empty(ENTRIES, dtype=torch.uint8) for _ in groups]
    # One rank of two sends a tensor once in an all-reduce, its payload in an all-gather, half of what it has in an
    # all-to-all.
    allreduce = {}
    for size, dtype in DTYPES.items():
        tensors = [torch.zeros(ENTRIES, dtype=dtype) for _ in groups]
        allreduce[size] = _seconds(lambda rank, t=tensors: groups[rank].allreduce(t[rank]), repeat) / (
            ENTRIES * abs(size)
        )
    gather = _seconds(lambda rank: groups[rank].allgather(results[rank], payloads[rank]), repeat) / ENTRIES
    half = [ENTRIES // 2] * 2
    exchange = _seconds(lambda rank: groups[rank].alltoall_base(flat[rank], payloads[rank], half, half), repeat)
    return GlooCosts(allreduce, gather, exchange / (ENTRIES / 2))


def _seconds(start: Callable, repeat: int) -> float:
    """Processor seconds of one of two ranks for an operation that both start and wait for; the median."""
    found = []
    for _ in range(repeat + 1):
        before = time.process_time()
        _on_both(lambda rank: start(rank).wait())
        found.append((time.process_time() - before) / 2)
    return statistics.median(found[1:])


def _on_both(function):
    """Run function(rank) on two ranks at once; an error of one is raised."""
    errors: list[BaseException] = []

    def run(rank):
        try:
            function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
