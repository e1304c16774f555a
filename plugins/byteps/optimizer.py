"""BytePS's optimizer, told which of our compressors each tensor takes."""

import json
import os
import sys
import time
import traceback
import zlib

import byteps.torch as bps
import byteps.torch.ops as bps_ops
import torch

from gcompress.compressors import Compressor
from gcompress.errors import ConfigError, ConfigMismatchError, ExchangeError
from gcompress.feedback import new_memory
from gcompress.policy import Policy, as_policy, check_momentum
from gcompress.report import Report

from . import native
from .kernels import parameters

PAGE = os.sysconf("SC_PAGESIZE")
# What our payloads need of BytePS: every tensor that the policy names is compressed, and by a pool of threads,
# without which BytePS crashes. Set before BytePS reads them.
ENVIRONMENT = {"BYTEPS_MIN_COMPRESS_BYTES": "0", "BYTEPS_THREADPOOL_SIZE": "2"}
CONFIGURATION_BYTES = 4096  # of one worker, when configurations are compared
POLL_SECONDS = 2e-4
_loaded = []  # the library with our compressors, once it is there
_stock_synchronize = bps_ops.synchronize


def init():
    """`byteps.torch.init()`, with our compressors loaded first."""
    for name, value in ENVIRONMENT.items():
        if os.environ.setdefault(name, value) in ("", "0") and value != "0":
            raise ConfigError(f"{name}: got {os.environ[name]!r}, expected a positive number of threads")
    if os.environ.get("BYTEPS_ENABLE_ASYNC", "0") not in ("", "0"):
        raise ConfigError("BYTEPS_ENABLE_ASYNC: got 1, expected 0: payloads are of synchronous rounds")
    if os.environ.get("BYTEPS_LOCAL_SIZE", "1") != "1":
        raise ConfigError("BYTEPS_LOCAL_SIZE: got more than 1, expected one process per worker in a build without NCCL")
    if not _loaded:
        _loaded.append(native.load())
        bps.synchronize = bps_ops.synchronize = synchronize
        sys.excepthook = end_at_once
    bps.init()


def synchronize(handle):
    """BytePS's `synchronize`, which waits for ever, with a time-out (GCOMPRESS_TIMEOUT, 300 seconds)."""
    timeout = float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))
    deadline = time.monotonic() + timeout
    while handle in bps_ops._handle_map and not bps.poll(handle):
        if time.monotonic() > deadline:
            raise ExchangeError(f"BytePS: no answer within {timeout:g} s: does every worker take the same steps?")
        time.sleep(POLL_SECONDS)
    return _stock_synchronize(handle)


def end_at_once(kind, error, trace):
    """After an exception that nobody caught, end without BytePS's shutdown, in which all wait for all."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def partition_lengths(numel):
    """The entries of each part in which BytePS sends a float32 tensor."""
    whole = -(-int(os.environ.get("BYTEPS_PARTITION_BYTES", 4096000)) // PAGE) * PAGE // 4
    return [min(whole, numel - start) for start in range(0, numel, whole)]


def DistributedOptimizer(optimizer, named_parameters, compression=None, backward_passes_per_step=1):
    """`byteps.torch.DistributedOptimizer` with compressed gradients.

    Args:
        optimizer: any torch optimizer.
        named_parameters: `model.named_parameters()`.
        compression: a compressor, its spec, a Policy, a `Compression`, or None or one of
            BytePS's own.
        backward_passes_per_step: as BytePS's.

    All workers must give the same; ConfigMismatchError on each otherwise.
    """
    if not _loaded:
        raise ConfigError("DistributedOptimizer: expected gcompress.plugins.byteps.init() before it")
    named = {name: p for name, p in named_parameters if p.requires_grad}
    exchange = Exchange(compression, named)
    if exchange.policy and not isinstance(compression, Compression):
        check_momentum(exchange.policy, optimizer.param_groups, {p: name for name, p in named.items()})
    for name in sorted(named):  # BytePS numbers tensors in the order in which it hears of them
        bps.declare("Gradient." + name, **exchange.declared.get(name, {}))
    made = bps.DistributedOptimizer(optimizer, named.items(), exchange, backward_passes_per_step)
    made._gcompress = exchange
    return made


def exchange(optimizer):
    """The Exchange of an optimizer made by `DistributedOptimizer`, with its `.report`."""
    try:
        return optimizer._gcompress
    except AttributeError:
        raise ConfigError(
            f"optimizer: got {type(optimizer).__name__}, expected one that "
            "gcompress.plugins.byteps.DistributedOptimizer made"
        ) from None


class Exchange:
    """What BytePS takes as `compression`: counts, and passes tensors on to what really compresses them."""

    def __init__(self, compression, named):
        self.report = Report()
        self._inner = compression if compression is not None else bps.Compression.none
        self.policy, self.declared = None, {}
        if isinstance(compression, (Compressor, Policy, str, dict)):
            self._inner, self.policy = bps.Compression.none, as_policy(compression)
            self._declare(named)
        elif isinstance(compression, Compression):
            self.policy = compression.policy
            compression.attach(named)
        self._sizes = {name: self._payload_bytes(name, p) for name, p in named.items()}
        self._named, self._left = named, set(named)
        agree({"compression": self.policy.to_dict() if self.policy else _name_of(self._inner)}, named)

    def _declare(self, named):
        if self.policy.momentum or self.policy.clip or self.policy.warmup_steps:
            raise ConfigError("momentum, clip, warmup_steps: BytePS's C++ compressors have none of them, expected 0")
        for name, p in named.items():
            compressor = self.policy.compressor_for(name, p.numel())
            if compressor is None:
                continue
            if p.dtype != torch.float32:
                raise ConfigError(f"parameter {name!r}: got {p.dtype}, expected torch.float32 or no compressor for it")
            self.declared[name] = parameters(
                compressor, partition_lengths(p.numel()), self.policy.feedback_for(compressor)
            )

    def _payload_bytes(self, name, p):
        if name in self.declared:
            compressor = self.policy.compressor_for(name, p.numel())
            return sum(compressor.nbytes(numel) for numel in partition_lengths(p.numel()))
        return None

    def compress(self, tensor):
        name = next((name for name, p in self._named.items() if p.grad is tensor), None)
        payload, ctx = self._inner.compress(tensor)
        size = self._sizes.get(name) or payload.numel() * payload.element_size()
        self.report.add_push_pull(tensor.numel(), size, size, bps.size())
        self._left.discard(name)
        if not self._left:
            self.report.end_step()
            self._left = set(self._named)
        return payload, ctx

    def decompress(self, tensor, ctx):
        return self._inner.decompress(tensor, ctx)


class Compression:
    """For BytePS's Python interface: payloads of a `summable` compressor, summed by the servers as they are.

    Args:
        policy: what `as_policy` takes; its compressors must be summable in one sum (RandomK).

    Feedback, momentum correction and seeds are as in the other engines' summed exchange.
    """

    def __init__(self, policy):
        self.policy = as_policy(policy)
        for compressor in self.policy._compressors():
            if not compressor.summable:
                raise ConfigError(f"compression: got {compressor}, expected one whose payloads add up, such as randomk")
        if self.policy.warmup_steps:
            raise ConfigError("warmup_steps: BytePS keeps a tensor's payload at one size, expected 0")
        self._memory, self._extra, self._steps = new_memory(self.policy), {}, {}

    def attach(self, named):
        self._named = named

    def compress(self, tensor):
        name = next(name for name, p in self._named.items() if p.grad is tensor)
        compressor = self.policy.compressor_for(name, tensor.numel())
        if compressor is None:
            return tensor, None
        step = self._steps[name] = self._steps.get(name, -1) + 1
        feedback = self._memory if self.policy.feedback_for(compressor) else None
        corrected = feedback.corrected(name, tensor) if feedback else tensor.detach().reshape(-1).float()
        rounds = compressor.sum_rounds(
            corrected,
            shape=tensor.shape,
            seed=zlib.crc32(f"{name}/{step}".encode()),
            world_size=bps.size(),
            memory=self._extra.setdefault(name, {}),
        )
        payload, operation = next(rounds)
        if operation != "sum":
            raise ConfigError(f"compression: {compressor} needs the ranks' {operation}, which BytePS has not")
        return payload.contiguous(), (rounds, name, compressor, feedback, corrected, tensor)

    def decompress(self, averaged, ctx):
        if ctx is None:
            return averaged
        rounds, name, compressor, feedback, corrected, tensor = ctx
        try:
            rounds.send(averaged * bps.size())
        except StopIteration as end:
            total, own = end.value
        else:
            raise ConfigError(f"compression: {compressor} needs several sums, of which BytePS's interface has one")
        if feedback:
            feedback.keep(name, corrected, own, sparse=compressor.sparse)
        return total.mul_(1.0 / bps.size()).to(tensor.dtype).view(tensor.shape)


def _name_of(compression):
    cls = compression if isinstance(compression, type) else type(compression)
    return f"{cls.__module__}.{cls.__qualname__}"


_comparisons = []


def agree(configuration, named):
    """Compare configurations over all workers; ConfigMismatchError on every one if they differ.

    BytePS can only sum: each worker's text goes into a row of its own of a zeroed table.
    """
    shapes = {name: list(p.shape) for name, p in named.items()}
    own = json.dumps({**configuration, "model": zlib.crc32(json.dumps(shapes).encode())}, sort_keys=True).encode()
    if len(own) > CONFIGURATION_BYTES:
        own = own[: CONFIGURATION_BYTES - 8] + b"%08x" % zlib.crc32(own)
    table = torch.zeros(bps.size(), CONFIGURATION_BYTES, dtype=torch.uint8)
    table[bps.rank(), : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    _comparisons.append(None)
    name = f"gcompress.configuration.{len(_comparisons)}"
    bps.declare(name)
    table = bps.push_pull(table, average=False, name=name)
    groups = {}
    for rank, row in enumerate(table):
        groups.setdefault(bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"), []).append(rank)
    if len(groups) > 1:
        found = "; ".join(f"workers {ranks}: {text}" for text, ranks in groups.items())
        raise ConfigMismatchError(f"compression: expected one configuration on all workers, got {found}")
    if not next(iter(groups)):
        raise ExchangeError("compression: the servers lost the workers' configurations")
