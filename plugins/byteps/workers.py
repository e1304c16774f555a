"""BytePS's workers: started with our compressors, waiting with a time-out, and able to compare texts."""

import ctypes
import itertools
import os
import sys
import traceback

import byteps.torch as bps
import byteps.torch.ops as bps_ops
import torch

from gcompress.errors import ConfigError, ExchangeError
from gcompress.exchange.engine import wait_until

from . import library

# What our payloads need of BytePS: every tensor that the policy names is compressed, and by a pool of threads,
# without which BytePS crashes. Set before BytePS reads them.
ENVIRONMENT = {"BYTEPS_MIN_COMPRESS_BYTES": "0", "BYTEPS_THREADPOOL_SIZE": "2"}
LENGTH_DIGITS = 8  # of the length of a text
_loaded = []  # the library with our compressors, once it is there
_stock_synchronize = bps_ops.synchronize
_texts = itertools.count()  # numbers the sums that carry texts


def init() -> None:
    """`byteps.torch.init()`, with our compressors loaded first."""
    for name, value in ENVIRONMENT.items():
        if os.environ.setdefault(name, value) in ("", "0") and value != "0":
            raise ConfigError(f"{name}: got {os.environ[name]!r}, expected a positive number of threads")
    if os.environ.get("BYTEPS_ENABLE_ASYNC", "0") not in ("", "0"):
        raise ConfigError("BYTEPS_ENABLE_ASYNC: got 1, expected 0: payloads are of synchronous rounds")
    if os.environ.get("BYTEPS_LOCAL_SIZE", "1") != "1":
        raise ConfigError("BYTEPS_LOCAL_SIZE: got more than 1, expected one process per worker in a build without NCCL")
    if not _loaded:
        _loaded.append(library.load())
        bps.synchronize = bps_ops.synchronize = synchronize
        sys.excepthook = end_at_once
    bps.init()


def compressors() -> ctypes.CDLL:
    """The library with our compressors; ConfigError before `init`."""
    if not _loaded:
        raise ConfigError("DistributedOptimizer: expected gcompress.plugins.byteps.init() before it")
    return _loaded[0]


def synchronize(handle: int) -> torch.Tensor:
    """BytePS's `synchronize`, which waits for ever, with a time-out (GCOMPRESS_TIMEOUT, 300 seconds)."""
    wait_until(
        lambda: handle not in bps_ops._handle_map or bps.poll(handle), "BytePS (does every worker take the same steps?)"
    )
    return _stock_synchronize(handle)


def end_at_once(kind, error, trace):
    """After an exception that nobody caught, end without BytePS's shutdown, in which all wait for all."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


class BytePSWorkers:
    """All workers of the job, as those that agree (`gcompress.exchange.engine.Ranks`)."""

    def rank(self):
        return bps.rank()

    def world_size(self):
        return bps.size()

    def gather_texts(self, text: str) -> list[str]:
        own = text.encode()
        lengths = self._rows(f"{len(own):0{LENGTH_DIGITS}}".encode(), LENGTH_DIGITS)
        if not all(length.isdigit() for length in lengths):
            raise ExchangeError("gathering the workers' texts: the servers lost some of them")
        rows = self._rows(own, max(map(int, lengths)))
        return [row[: int(length)].decode() for row, length in zip(rows, lengths, strict=True)]

    def _rows(self, own, width):
        """The bytes of each worker. BytePS can only sum: each has a row of its own of a zeroed table."""
        table = torch.zeros(bps.size(), width, dtype=torch.uint8)
        table[bps.rank(), : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        name = f"gcompress.texts.{next(_texts)}"
        bps.declare(name)
        return [bytes(row.tolist()) for row in bps.push_pull(table, average=False, name=name)]
