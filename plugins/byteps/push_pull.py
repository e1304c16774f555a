"""BytePS's optimizer, told which of our compressors each tensor takes."""

import itertools
import os
import zlib
from collections.abc import Iterable

import byteps.torch as bps
import torch

from gcompress.compressors import Compressor
from gcompress.errors import ConfigError
from gcompress.exchange.applied import holds_nothing
from gcompress.exchange.engine import agree, name_of
from gcompress.exchange.parameter_server import check_for_servers
from gcompress.exchange.results import Results
from gcompress.exchange.scaling import unscaled
from gcompress.forecast.decide import decide
from gcompress.policy import Policy, as_policy, check_momentum

from . import workers
from .methods import parameters, payload_bytes
from .payload_sums import Compression

PAGE = os.sysconf("SC_PAGESIZE")
_stock_push_pull = bps._DistributedOptimizer._push_pull_grad_async
_numbers = itertools.count()  # of tensors with our C++ compressors


def partition_lengths(numel: int) -> list[int]:
    """The entries of each part in which BytePS sends a float32 tensor."""
    whole = -(-int(os.environ.get("BYTEPS_PARTITION_BYTES", 4096000)) // PAGE) * PAGE // 4
    return [min(whole, numel - start) for start in range(0, numel, whole)]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    compression=None,
    backward_passes_per_step: int = 1,
    *,
    scaler=None,
) -> torch.optim.Optimizer:
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
    workers.loaded_library()  # ConfigError before `init`
    named = {name: p for name, p in named_parameters if p.requires_grad}
    exchange = PushPullExchange(compression, named, scaler)
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
        output = exchange.waited_for(p, handle)
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


class PushPullExchange(Results):
    """What BytePS takes as `compression`: counts, and passes tensors on to what really compresses them."""

    def __init__(self, compression, named, scaler=None):
        super().__init__(None, scaler)
        self._inner = compression if compression is not None else bps.Compression.none
        self.declared, self._numbers = {}, {}
        self.absent = False  # whether the next tensor is one of zeros because nobody computed it here
        self._on_the_wire = {}  # name: what `Times.arrived` is to be told
        self._name = None  # of the gradient that BytePS hands over next
        if isinstance(compression, (Compressor, Policy, str, dict)):
            self._inner, self.policy = bps.Compression.none, as_policy(compression)
            self.policy = decide(self.policy, workers.BytePSWorkers(), {name: p.shape for name, p in named.items()})
            self._declare(named)
        elif isinstance(compression, Compression):
            self.policy = compression.policy
        self._sizes = {name: self._payload_bytes(name, p) for name, p in named.items()}
        self._names = {p: name for name, p in named.items()}
        own = self.policy.to_dict() if self.policy else name_of(self._inner)
        shapes = {name: list(p.shape) for name, p in named.items()}
        agree(workers.BytePSWorkers(), {"compression": own, "model": zlib.crc32(repr(shapes).encode())})
        if self.policy:
            self.watch(named)

    def _declare(self, named):
        if self.policy.momentum or self.policy.clip or self.policy.warmup_steps:
            raise ConfigError("momentum, clip, warmup_steps: BytePS's C++ compressors have none of them, expected 0")
        check_for_servers(self.policy)
        if self.policy.error_feedback == "ef21":
            raise ConfigError("error_feedback: got 'ef21', which BytePS's C++ compressors have not, expected another")
        if self.policy.residual != "float32":
            raise ConfigError(
                f"residual: got {self.policy.residual!r}, expected 'float32': BytePS's C++ compressors keep no other"
            )
        for name, p in named.items():
            compressor = self.policy.compressor_for(name, p.numel())
            if compressor is None:
                continue
            if p.dtype != torch.float32:
                raise ConfigError(f"parameter {name!r}: got {p.dtype}, expected torch.float32 or no compressor for it")
            self._numbers[name] = next(_numbers)
            decay = self.policy.decay if self.policy.feedback_for(compressor) else 0.0
            lengths = partition_lengths(p.numel())
            self.declared[name] = parameters(self._numbers[name], compressor, lengths, decay)

    def _payload_bytes(self, name, p):
        if name in self.declared:
            compressor = self.policy.compressor_for(name, p.numel())
            feedback = self.policy.feedback_for(compressor)
            return sum(payload_bytes(compressor, numel, feedback) for numel in partition_lengths(p.numel()))
        return None

    def next_is(self, parameter):
        """Say whose gradient `compress` is given next."""
        self._name = self._names[parameter]

    def _whose(self):
        return bps.rank(), bps.size()

    def measure_errors(self, every: int = 100) -> None:
        """Refused: what is encoded is known to BytePS's C++ threads alone."""
        raise ConfigError("measure_errors: got BytePS, whose encodings are out of sight, expected another engine")

    def waited_for(self, parameter, handle):
        """What BytePS made of a gradient, once it is there."""
        times, name = self.report.times, self._names[parameter]
        begun = times.clock()
        output = bps.synchronize(handle)
        now, sent = times.clock(), self._on_the_wire.pop(name, None)
        times.waited(times.group(name, (name,)), begun, now)
        if sent:
            times.arrived(*sent, now)
        return output

    def compress(self, tensor):
        name, times = self._name, self.report.times
        scale = self.loss_scale() if self.policy else 1.0
        applied = self._open(name)
        if name in self.declared:
            workers.loaded_library().gcompress_byteps_tell(self._numbers[name], int(applied), int(self.absent))
        elif isinstance(self._inner, Compression):
            self._inner.begin(name, self.absent, self.steps)
        payload, ctx = self._inner.compress(unscaled(tensor, scale))
        size = self._sizes.get(name) or payload.numel() * payload.element_size()
        self.report.add_push_pull(tensor.numel(), size, size, bps.size())
        group, now = times.group(name, (name,)), times.clock()
        times.departed(group, size, now)
        self._on_the_wire[name] = group, "push_pull", size, now  # encoded by BytePS's threads meanwhile
        return payload, (ctx, scale)

    def decompress(self, tensor, ctx):
        ctx, scale = ctx
        result = self._inner.decompress(tensor, ctx)
        return result if scale == 1.0 else result.mul_(scale)

    def _settle(self, names, applied):
        if isinstance(self._inner, Compression):
            self._inner.settle(names, applied)
