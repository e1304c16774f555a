"""What `hvd.DistributedOptimizer` does differently once the plugin is active."""

import itertools
import weakref

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from horovod.torch import optimizer as hvd_optimizer

from gcompress.compressors import Compressor
from gcompress.errors import ConfigError, ExchangeError
from gcompress.exchange.applied import holds_nothing
from gcompress.exchange.engine import agree, name_of
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.hand_on import replan
from gcompress.exchange.node_engine import NodeEngine
from gcompress.policy import Policy, check_momentum, check_types

from .collectives import (
    HorovodEngine,
    MismatchedExchangeError,
    alltoall_token_async,
    explain,
    patient_synchronize,
    wait_or_raise,
)
from .elastic import enter_world
from .elastic import register as register_elastic
from .node_sets import engine_for

Stock = hvd_optimizer._DistributedOptimizer
StockAdasum = hvd_optimizer._DistributedAdasumOptimizer
_stock = {}  # the methods of Horovod that were replaced, by name
_optimizers = weakref.WeakSet()  # those that compress and are still alive
_compressing = False  # whether there ever was one: ranks collect their garbage at different times
# (operation, name, process set) of all that a training rank may ask for next; see `join`.
_names = set()
_numbers = itertools.count()


class CountedCompression:
    """Horovod's own compression, counting what it hands over; also for tensors the policy leaves alone."""

    def __init__(self, compression, exchange, process_set):
        self.inner, self._exchange, self._process_set = compression, exchange, process_set

    def compress(self, tensor):
        payload, ctx = self.inner.compress(tensor)
        size = payload.numel() * payload.element_size()
        self._exchange.report.add_all_reduce(tensor.numel(), size, self._process_set.size())
        return payload, ctx

    def decompress(self, tensor, ctx):
        # ctx is `finished` for what GradientExchange returned: nothing is left to do.
        return tensor if ctx is finished else self.inner.decompress(tensor, ctx)


finished = object()


def is_ours(compression):
    """Whether a `compression` is for this package and not Horovod's own."""
    return isinstance(compression, (Compressor, Policy, str, dict))


def init(self, params, named_parameters, compression, *arguments, **keywords):
    """In place of the optimizer's `__init__`: take our compressors, count the bytes of all others."""
    global _compressing
    ours = is_ours(compression)
    self._gcompress = GradientExchange(compression if ours else None)
    self._gcompress_missing = False  # whether `synchronize` looks for gradients that were not computed
    _stock["__init__"](self, params, named_parameters, compression, *arguments, **keywords)
    if ours and self.op not in (hvd.Average, hvd.Sum):
        raise ConfigError("op: compressed gradients are averaged or summed, expected hvd.Average or hvd.Sum")
    if ours:
        check_momentum(self._gcompress.policy, self.param_groups, self._parameter_names)
        check_types(self._gcompress.policy, {name: p for p, name in self._parameter_names.items()})
    number, included = next(_numbers), self.process_set.included()
    self._gcompress.engine = HorovodEngine(self.process_set, number)
    if included:
        self._gcompress.engine = engine_for(self._gcompress.engine, self._gcompress.policy)
    self._gcompress.average = self.op == hvd.Average
    inner = hvd.Compression.none if ours else compression
    self._compression = CountedCompression(inner, self._gcompress, self.process_set)
    self._gcompress_agreed = None
    self._gcompress_world, self._gcompress_ranks = None, None  # see elastic.py
    if ours and included:
        trained = _trained(self)
        device = next((p.device for p in trained.values()), None)
        self._gcompress.prepare({name: p.shape for name, p in trained.items()}, device=device)
        self._gcompress.watch(trained)
        self.register_step_pre_hook(_refuse_unsynchronized_scaler)
        self.register_step_post_hook(_adopt_unfrozen)
    if self._grad_accs:
        _names.add((hvd.allgather_async, self._gcompress.engine.texts_name(), self.process_set))
        if ours:
            _compressing = True
            _optimizers.add(self)


def _trained(self):
    """{name: parameter} of those that Horovod exchanges, in the optimizer's order."""
    parameters = [p for group in self.param_groups for p in group["params"] if p in self._requires_update]
    return {self._parameter_names[p]: p for p in parameters}


def _unfrozen(self):
    """Parameters that were frozen, or not the optimizer's, when it was made: Horovod would never exchange them."""
    parameters = [p for group in self.param_groups for p in group["params"]]
    found = [p for p in parameters if p.requires_grad and p not in self._requires_update]
    unnamed = [p for p in found if p not in self._parameter_names]
    if unnamed:
        raise ConfigError(
            f"add_param_group: got a parameter of shape {tuple(unnamed[0].shape)} that was not in the named_parameters "
            "of hvd.DistributedOptimizer, expected all that will ever be trained to be there"
        )
    return found


def _adopt_unfrozen(self, arguments, keywords):
    """After a step on all ranks: compress what was unfrozen from now on. Until then stock Horovod averages it."""
    if not self._grad_accs or getattr(self, "found_inf", None) is not None:
        return
    adopted = [p for p in _unfrozen(self) if p.grad is not None]
    if not adopted:
        return
    exchange = self._gcompress
    exchange.applied([name for name, p in _trained(self).items() if p.grad is not None])
    exchange.discard()
    for p in adopted:
        self._requires_update.add(p)
        accumulator = p.expand_as(p).grad_fn.next_functions[0][0]
        accumulator.register_hook(self._make_hook(p))
        self._grad_accs.append(accumulator)
    trained = _trained(self)
    replan(exchange, {name: p.shape for name, p in trained.items()})
    exchange.watch(trained)
    self._gcompress_agreed = None


def load_state_dict(self, *arguments, **keywords):
    """In place of the optimizer's: what is under way is forgotten."""
    self._gcompress.abandon_step()  # Horovod forgets its handles here, too
    _stock["load_state_dict"](self, *arguments, **keywords)


def allreduce_grad_async(self, p):
    """In place of the optimizer's: start the exchange of one gradient."""
    enter_world(self)
    name, exchange = self._parameter_names.get(p), self._gcompress
    compressor = exchange.compressor_for(name, p.numel())
    if p.grad is not None and p.grad.is_sparse and not self.sparse_as_dense:
        if compressor:
            raise ConfigError(
                f"gradient {name!r} is sparse: pass sparse_as_dense=True to hvd.DistributedOptimizer, or a rule that "
                f"leaves it alone, such as 'name={name} -> none'"
            )
        # Horovod gathers its parts without asking the compression: count them here
        parts = (p.grad._indices(), p.grad._values())
        size = sum(part.numel() * part.element_size() for part in parts)
        exchange.report.add_all_gather(p.numel(), size, self.process_set.size())
    if compressor is None or name not in exchange.plan.entries:
        return _stock["_allreduce_grad_async"](self, p)
    absent = not p.requires_grad or (self._gcompress_missing and holds_nothing(p.grad))
    if p.grad is None:  # another rank may have computed it
        p.grad = torch.zeros_like(p)
    gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
    exchange.agreed = self._gcompress_agreed is mpi_ops._handle_map
    return exchange.start(name, torch.zeros_like(gradient) if absent else gradient, absent=absent), finished


def grouped_allreduce_grad_async(self, parameters):
    """In place of the optimizer's: start those of a group, each under its own name."""
    if self._gcompress.policy is None:
        return _stock["_grouped_allreduce_grad_async"](self, parameters)
    # A group starts when all of it is ready; its members travel under their own names.
    return [self._allreduce_grad_async(p) for p in parameters], None


def synchronize(self):
    """In place of the optimizer's: wait for all gradients of the step."""
    if not self.process_set.included():
        return _stock["synchronize"](self)
    if self._grad_accs:
        agree_once(self)
    for group in [key for key in self._handles if isinstance(key, tuple)]:
        started = self._handles[group][0]
        if isinstance(started, list):
            del self._handles[group]
            self._handles.update(zip(group, started, strict=True))
    # Stock Horovod gives a gradient of zeros to a frozen parameter, with which an optimizer's weight decay or
    # momentum would still move it.
    frozen = [p for p in self._requires_update if not p.requires_grad and p.grad is None]
    unfrozen = _unfrozen(self) if self._gcompress.policy and self._grad_accs else []
    self._handles.update({p: _stock["_allreduce_grad_async"](self, p) for p in unfrozen})
    self._gcompress_missing = True
    try:
        _stock["synchronize"](self)
    except HorovodInternalError as error:
        explain(error, "a gradient")
        raise
    finally:
        self._gcompress_missing = False
    for p in frozen if self._gcompress.policy else ():
        p.grad = None
    self._gcompress.end_step()


def _refuse_unsynchronized_scaler(optimizer, arguments, keywords):
    """Horovod would put scaled means over gradients that the scaler has unscaled, and step with them."""
    exchange = optimizer._gcompress
    if optimizer._should_synchronize and not optimizer._synchronized and optimizer._grad_accs:
        scale = exchange.loss_scale()
        if scale != 1.0:
            raise ConfigError(
                f"step: gradients carry the loss scale {scale:g} and are not synchronized; expected "
                "optimizer.synchronize(), scaler.unscale_(optimizer), then scaler.step(optimizer) in "
                "`with optimizer.skip_synchronize()`"
            )


# The operation with which each exchange starts.
STARTS = {
    "allgather": hvd.allgather_async,
    "turns": hvd.allgather_async,
    "twophase": alltoall_token_async,
    "summed": hvd.allreduce_async,
}


def agree_once(self):
    """Compare configurations once per `hvd.init()`, whose handle map is a new object each time."""
    if self._gcompress_agreed is mpi_ops._handle_map:
        return
    exchange, policy = self._gcompress, self._gcompress.policy
    own = policy.to_dict() if policy else name_of(self._compression.inner)
    # The step, because seeds that ranks share are made from it.
    configuration = {"compression": own, "op": int(self.op), "step": exchange.steps}
    if policy:
        configuration["plan"] = exchange.plan.digest()
    agree(exchange.engine, configuration, self.process_set.ranks)
    self._gcompress_agreed = mpi_ops._handle_map
    _names.discard((hvd.allgather_async, exchange.engine.texts_name(), self.process_set))
    by_nodes = isinstance(exchange.engine, NodeEngine)
    for p in self._requires_update:
        name = self._parameter_names.get(p)
        if exchange.compressor_for(name, p.numel()):
            operation = alltoall_token_async if by_nodes else STARTS[exchange.plan.entries[name].exchange]
            members = exchange.engine.local.process_set if by_nodes else self.process_set
            _names.add((operation, f"gcompress.{exchange.first_name(name)}", members))
        else:
            _names.add((hvd.allreduce_async, name, self.process_set))


def engine(process_set: hvd.ProcessSet = hvd.global_process_set) -> HorovodEngine:
    """Horovod for `gcompress.OuterOptimizer`: the ranks of a process set, each of which must call it."""
    global _compressing
    _compressing, number = True, next(_numbers)
    return HorovodEngine(process_set, number, f"gcompress.{number}", _names)


def adasum_init(self, params, named_parameters, compression, *arguments, **keywords):
    """In place of Adasum's `__init__`: refuse our compressors."""
    if is_ours(compression):
        raise ConfigError("op: Adasum combines whole gradients and cannot be compressed, expected Average or Sum")
    _stock["adasum_init"](self, params, named_parameters, compression, *arguments, **keywords)


def join(device: int = -1) -> int:
    """`hvd.join()`, once no rank has a packed exchange left to do.

    Horovod lets a joined rank take part in later operations with zeros, which an all-gather
    of payloads cannot bear (it may even read past them). So before joining, each rank posts a
    token under the name of every gradient: they meet when all ranks have come here; a rank
    that still trains meets a token of the wrong type instead, and both end with an error.
    """
    if _compressing:
        if any(optimizer._handles for optimizer in _optimizers):
            raise ExchangeError("hvd.join(): this rank has gradients under way; call optimizer.step() first")
        token = torch.zeros(1, dtype=torch.int32)
        handles = [
            start(token, name=name, process_set=process_set)
            for start, name, process_set in _names
            if process_set.process_set_id is not None and process_set.included()  # None: removed
        ]
        try:
            wait_or_raise(handles, "hvd.join()")
        except HorovodInternalError as error:
            raise MismatchedExchangeError(
                f"hvd.join(): another rank still exchanges compressed gradients ({error}). They need the same "
                "number of steps on every rank: drop the last uneven batches before joining."
            ) from error
    return _stock["join"](device)


def activate() -> None:
    """Make `hvd.DistributedOptimizer` accept compressors; a second call changes nothing."""
    if _stock:
        return
    for name, method in (
        ("__init__", init),
        ("load_state_dict", load_state_dict),
        ("_allreduce_grad_async", allreduce_grad_async),
        ("_grouped_allreduce_grad_async", grouped_allreduce_grad_async),
        ("synchronize", synchronize),
    ):
        _stock[name] = getattr(Stock, name)
        setattr(Stock, name, method)
    hvd_optimizer.synchronize = patient_synchronize
    register_elastic()
    _stock["adasum_init"] = StockAdasum.__init__
    StockAdasum.__init__ = adasum_init
    _stock["join"] = mpi_ops.join
    mpi_ops.join = hvd.join = join
