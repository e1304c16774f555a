"""BytePS's optimizer, told which of our compressors each tensor takes."""

import itertools
import os
import sys
import time
import traceback
import zlib

import byteps.torch as bps
import byteps.torch.ops as bps_ops
import torch

from gcompress.compressors import Compressor
from gcompress.errors import ConfigError, ExchangeError
from gcompress.exchange import engine
from gcompress.exchange.applied import holds_nothing
from gcompress.exchange.results import Results
from gcompress.exchange.scaling import unscaled
from gcompress.feedback import new_memory
from gcompress.memory import Memory
from gcompress.packing import to_type
from gcompress.policy import Policy, as_policy, check_momentum

from . import native
from .kernels import parameters, payload_bytes

PAGE = os.sysconf("SC_PAGESIZE")
# What our payloads need of BytePS: every tensor that the policy names is compressed, and by a pool of threads,
# without which BytePS crashes. Set before BytePS reads them.
ENVIRONMENT = {"BYTEPS_MIN_COMPRESS_BYTES": "0", "BYTEPS_THREADPOOL_SIZE": "2"}
CONFIGURATION_BYTES = 4096  # of one worker, when configurations are compared
POLL_SECONDS = 2e-4
_loaded = []  # the library with our compressors, once it is there
_stock_synchronize = bps_ops.synchronize
_stock_push_pull = bps._DistributedOptimizer._push_pull_grad_async
_numbers = itertools.count()  # of tensors with our C++ compressors


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
    timeout = engine.timeout_seconds()
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


def DistributedOptimizer(optimizer, named_parameters, compression=None, backward_passes_per_step=1, *, scaler=None):
    """`byteps.torch.DistributedOptimizer` with compressed gradients.

    Args:
        optimizer: any torch optimizer.
        named_parameters: `model.named_parameters()`.
        compression: a compressor, its spec, a Policy, a `Compression`, or None or one of
            BytePS's own.
        backward_passes_per_step: as BytePS's.
        scaler: the loss scale that gradients carry, see `gcompress.exchange.scaling.LossScale`.

    All workers must give the same; ConfigMismatchError on each otherwise.
    """
    if not _loaded:
        raise ConfigError("DistributedOptimizer: expected gcompress.plugins.byteps.init() before it")
    named = {name: p for name, p in named_parameters if p.requires_grad}
    exchange = Exchange(compression, named, scaler)
    if exchange.policy and not isinstance(compression, Compression):
        check_momentum(exchange.policy, optimizer.param_groups, {p: name for name, p in named.items()})
    for name in sorted(named):  # BytePS numbers tensors in the order in which it hears of them
        bps.declare("Gradient." + name, **exchange.declared.get(name, {}))
    made = bps.DistributedOptimizer(optimizer, named.items(), exchange, backward_passes_per_step)
    made._gcompress = exchange
    type(made).synchronize = synchronize_gradients
    type(made)._push_pull_grad_async = push_pull_gradient
    made.register_step_pre_hook(_check_step)
    return made


def push_pull_gradient(self, p):
    """BytePS's own, which tells nobody whose gradient it hands over."""
    self._gcompress.next_is(p)
    return _stock_push_pull(self, p)


def synchronize_gradients(self):
    """BytePS's `synchronize`, for gradients that were not computed, too, and with each tensor's own context."""
    exchange, frozen = self._gcompress, []
    for p in self._requires_update:
        if self._handles.get(p, (None, None))[0] is not None:
            continue
        exchange.absent = not p.requires_grad or holds_nothing(p.grad)
        if not p.requires_grad and p.grad is None:
            frozen.append(p)
        if p.grad is None or not p.requires_grad:
            p.grad = torch.zeros_like(p)
        self._handles[p] = self._push_pull_grad_async(p)
        exchange.absent = False
    for p, (handle, ctx) in self._handles.items():
        output = bps.synchronize(handle)
        self._push_pull_delay[p] = self.backward_passes_per_step
        p.grad.set_(self._compression.decompress(output, ctx))
    self._handles.clear()
    for p in frozen:
        p.grad = None
    exchange.end_step()


def _check_step(optimizer, arguments, keywords):
    exchange = optimizer._gcompress
    unknown = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and p.grad is not None and p not in optimizer._requires_update
    ]
    if unknown and bps.size() > 1:
        raise ConfigError(
            f"step: got a parameter of shape {tuple(unknown[0].shape)} that was frozen or not the optimizer's when "
            "DistributedOptimizer was called: BytePS would not exchange it"
        )
    if exchange.policy and optimizer._should_sync and optimizer._handles and exchange.loss_scale() != 1.0:
        raise ConfigError(
            f"step: gradients carry the loss scale {exchange.loss_scale():g} and are not synchronized; expected "
            "optimizer.synchronize(), scaler.unscale_(optimizer), then scaler.step(optimizer) in "
            "`with optimizer.skip_synchronize()`"
        )


def exchange(optimizer):
    """The Exchange of an optimizer made by `DistributedOptimizer`, with its `.report`."""
    try:
        return optimizer._gcompress
    except AttributeError:
        raise ConfigError(
            f"optimizer: got {type(optimizer).__name__}, expected one that "
            "gcompress.plugins.byteps.DistributedOptimizer made"
        ) from None


class Exchange(Results):
    """What BytePS takes as `compression`: counts, and passes tensors on to what really compresses them."""

    def __init__(self, compression, named, scaler=None):
        super().__init__(None, scaler)
        self._inner = compression if compression is not None else bps.Compression.none
        self.declared, self._numbers = {}, {}
        self.absent = False  # whether the next tensor is one of zeros because nobody computed it here
        self._name = None  # of the gradient that BytePS hands over next
        if isinstance(compression, (Compressor, Policy, str, dict)):
            self._inner, self.policy = bps.Compression.none, as_policy(compression)
            self._declare(named)
        elif isinstance(compression, Compression):
            self.policy = compression.policy
        self._sizes = {name: self._payload_bytes(name, p) for name, p in named.items()}
        self._names = {p: name for name, p in named.items()}
        agree({"compression": self.policy.to_dict() if self.policy else _name_of(self._inner)}, named)
        if self.policy:
            self.watch(named)

    def _declare(self, named):
        if self.policy.momentum or self.policy.clip or self.policy.warmup_steps:
            raise ConfigError("momentum, clip, warmup_steps: BytePS's C++ compressors have none of them, expected 0")
        for name, p in named.items():
            compressor = self.policy.compressor_for(name, p.numel())
            if compressor is None:
                continue
            if p.dtype != torch.float32:
                raise ConfigError(f"parameter {name!r}: got {p.dtype}, expected torch.float32 or no compressor for it")
            self._numbers[name] = next(_numbers)
            self.declared[name] = parameters(
                self._numbers[name], compressor, partition_lengths(p.numel()), self.policy.feedback_for(compressor)
            )

    def _payload_bytes(self, name, p):
        if name in self.declared:
            compressor = self.policy.compressor_for(name, p.numel())
            feedback = self.policy.feedback_for(compressor)
            return sum(payload_bytes(compressor, numel, feedback) for numel in partition_lengths(p.numel()))
        return None

    def next_is(self, parameter):
        """Say whose gradient `compress` is given next."""
        self._name = self._names[parameter]

    def compress(self, tensor):
        name = self._name
        scale = self.loss_scale() if self.policy else 1.0
        applied = self._open(name)
        if name in self.declared:
            _loaded[0].gcompress_byteps_tell(self._numbers[name], int(applied), int(self.absent))
        elif isinstance(self._inner, Compression):
            self._inner.begin(name, self.absent, self.steps)
        payload, ctx = self._inner.compress(unscaled(tensor, scale))
        size = self._sizes.get(name) or payload.numel() * payload.element_size()
        self.report.add_push_pull(tensor.numel(), size, size, bps.size())
        return payload, (ctx, scale)

    def decompress(self, tensor, ctx):
        ctx, scale = ctx
        result = self._inner.decompress(tensor, ctx)
        return result if scale == 1.0 else result.mul_(scale)

    def _settle(self, names, applied):
        if isinstance(self._inner, Compression):
            self._inner.settle(names, applied)


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
        self._feedback, self._memories = new_memory(self.policy, at_once=False), Memory()

    def begin(self, name, absent, step):
        """Say what `compress` is given next, whether nobody computed it here, and how many steps were applied."""
        self._name, self._absent, self._step = name, absent, step

    def settle(self, names, applied):
        """The last results of these names were applied, or not."""
        for memory in (self._feedback, self._memories):
            if memory is not None:
                memory.apply(names) if applied else memory.discard(names)

    def compress(self, tensor):
        name = self._name
        compressor = self.policy.compressor_for(name, tensor.numel())
        if compressor is None:
            return tensor, None
        feedback = self._feedback if self.policy.feedback_for(compressor) and not self._absent else None
        corrected = (
            feedback.corrected(name, tensor) if feedback else to_type(tensor.detach().reshape(-1), torch.float32)
        )
        memory = dict(self._memories.get(name, {}))
        rounds = compressor.sum_rounds(
            corrected,
            shape=tensor.shape,
            seed=zlib.crc32(f"{name}/{self._step}".encode()),
            world_size=bps.size(),
            memory=memory,
        )
        payload, operation = next(rounds)
        if operation != "sum":
            raise ConfigError(f"compression: {compressor} needs the ranks' {operation}, which BytePS has not")
        return payload.contiguous(), (rounds, name, compressor, feedback, corrected, memory, tensor)

    def decompress(self, averaged, ctx):
        if ctx is None:
            return averaged
        rounds, name, compressor, feedback, corrected, memory, tensor = ctx
        try:
            rounds.send(averaged * bps.size())
        except StopIteration as end:
            total, own = end.value
        else:
            raise ConfigError(f"compression: {compressor} needs several sums, of which BytePS's interface has one")
        if feedback:
            feedback.keep(name, corrected, own, sparse=compressor.sparse)
        if bool(torch.isfinite(total).all()):
            self._memories.put(name, memory)
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
    own = engine.text_of({**configuration, "model": zlib.crc32(repr(shapes).encode())}).encode()
    if len(own) > CONFIGURATION_BYTES:
        own = own[: CONFIGURATION_BYTES - 8] + b"%08x" % zlib.crc32(own)
    table = torch.zeros(bps.size(), CONFIGURATION_BYTES, dtype=torch.uint8)
    table[bps.rank(), : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    _comparisons.append(None)
    name = f"gcompress.configuration.{len(_comparisons)}"
    bps.declare(name)
    table = bps.push_pull(table, average=False, name=name)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in table]
    engine.compare(texts, who="workers")
    if not texts[0]:
        raise ExchangeError("compression: the servers lost the workers' configurations")
