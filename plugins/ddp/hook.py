"""A communication hook for DistributedDataParallel."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gcompress.errors import ConfigError
from gcompress.exchange.applied import holds_nothing
from gcompress.exchange.engine import agree
from gcompress.exchange.exchange import GradientExchange
from gcompress.policy import check_types

from .node_groups import engine_for
from .unwrap import parallel_of, parallel_with, plain_names


class GradientState:
    """One rank's side of the hook `compress`: exchange, memory, report.

    It may be made before there is a model or a process group. Unless `bind` is called, the first
    backward pass finds the DistributedDataParallel whose gradients come. Give each one a state of its own.

    A copy (`copy.deepcopy`, pickle, as of a model that is averaged or saved whole) of a state that has a model
    has the memory, but exchanges nothing: register its model and load the copy's `state_dict()`.

    Args:
        compression: what `gcompress.as_policy` takes.
        scaler, every_rank: see `register`.
    """

    def __init__(self, compression, *, scaler=None, every_rank: bool = False):
        self._every_rank = every_rank
        self.exchange = GradientExchange(compression, scaler=scaler)
        self._gcompress = self.exchange  # where `exchange(state)` looks, as in an optimizer
        self._names = None  # by parameter, once bound
        self._saved = None  # a state that waits for that
        self._agreed = False
        self._pending = []  # (future, the bucket's buffer, its gradients by name, function that waits)
        self._stream = None

    def bind(self, model: torch.nn.Module) -> None:
        """Exchange the gradients of a DistributedDataParallel, or of what wraps one; all ranks must call it.

        Raises:
            ConfigError: it is of another model already, or a saved state that waited does not fit.
            ExchangeError: a rank did not call it within the process group's time-out.
        """
        if self._names is not None:
            raise ConfigError("model: this state is of another model, expected a state of its own for each")
        parallel = parallel_of(model)
        # Only then is a gradient that is zero everywhere likely to be none at all.
        self._maybe_unused = parallel.find_unused_parameters or parallel.static_graph
        trained = {name: p for name, p in plain_names(parallel.module) if p.requires_grad}
        check_types(self.exchange.policy, trained)
        self.exchange.engine = engine_for(parallel.process_group, self.exchange.policy, self._every_rank)
        device = next((p.device for p in trained.values()), None)
        self.exchange.prepare({name: p.shape for name, p in trained.items()}, device=device)
        self.exchange.watch(trained)
        self._names = {p: name for name, p in trained.items()}
        self._strides = {name: p.stride() for name, p in trained.items() if _is_dense(p) and not p.is_contiguous()}
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_state_dict(saved)

    def state_dict(self) -> dict:
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        if self._saved is not None:
            return self._saved
        if self._names is None:
            raise ConfigError("state: got one without a model, expected a call after bind(model) or the first step")
        return self.exchange.state_dict()

    def full_state_dict(self) -> dict:
        """What all ranks remember together; see `GradientExchange.full_state_dict`."""
        return self.exchange.full_state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()` or `full_state_dict()`, on all ranks before the same step.

        Before there is a model, the state waits: what does not fit is refused when there is one.
        """
        if self._names is None:
            self._saved = state
            return
        self.exchange.load_state_dict(state)
        self._agreed = False

    def __getstate__(self):
        if self.exchange is not None and self._names is None:
            made_of = self.exchange.policy, self.exchange.scaler, self._every_rank
            return {"made_of": made_of, "saved": self._saved}
        return {"made_of": None, "saved": self.state_dict()}

    def __setstate__(self, state):
        if state["made_of"]:
            compression, scaler, every_rank = state["made_of"]
            self.__init__(compression, scaler=scaler, every_rank=every_rank)
        else:
            self.exchange = None
        self._saved = state["saved"]

    def start(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start the exchange of a GradBucket; returns the future of its buffer, filled with the means."""
        if self.exchange is None:
            raise ConfigError(
                "state: got a copy, which exchanges nothing, expected a new one: register the model and load the "
                "copy's state_dict()"
            )
        if self._names is None:
            self.bind(parallel_with(bucket.parameters()[0], self))
        if bucket.index() == 0 and self._pending:  # the last step ended with an error
            self._pending.clear()
            self.exchange.abandon_step()
        if not self._agreed:
            policy, plan = self.exchange.policy.to_dict(), self.exchange.plan.digest()
            agree(self.exchange.engine, {"compression": policy, "plan": plan, "step": self.exchange.steps})
            self._agreed = True
        buffer = bucket.buffer()
        if buffer.is_sparse:
            future = self._start_sparse(bucket)
        else:
            future = self._start_dense(bucket, buffer)
        if bucket.is_last():
            self.exchange.end_step()
            if _has_joined() and self.exchange.plan.by_nodes:
                self.exchange.applied()  # by the ranks that go on, for which this one encodes its node's shares
        return future

    def _start_dense(self, bucket, buffer):
        with self._side_stream(buffer):
            gradients = self._gradients(bucket, buffer)
            absent = self._absent(gradients)
            future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
            finish = self.exchange.start_bucket(gradients, absent=absent)
            self._pending.append((future, buffer, gradients, finish))
            # Nothing of the backward pass is left to overlap with once the last bucket is there.
            self._finish(wait=bucket.is_last())
        return future

    def _start_sparse(self, bucket):
        """DDP puts every sparse gradient into a bucket of its own; torch sums those that no compressor takes."""
        (parameter,), gradient = bucket.parameters(), bucket.buffer()
        name, exchange = self._name(parameter), self.exchange
        if exchange.compressor_for(name, parameter.numel()):
            raise ConfigError(
                f"gradient {name!r} is sparse, expected a dense one (sparse=False) or a rule that leaves it alone, "
                f"such as 'name={name} -> none'"
            )
        parts = gradient._indices(), gradient._values()
        size = sum(part.numel() * part.element_size() for part in parts)
        exchange.report.add_all_gather(parameter.numel(), size, exchange.engine.world_size())
        self._finish(wait=bucket.is_last())
        return allreduce_hook(exchange.engine.group, bucket)

    def _finish(self, wait):
        """Hand over the buckets that are complete, in order; all of them if `wait`."""
        while self._pending:
            future, buffer, gradients, finish = self._pending[0]
            if not wait and not finish.done():
                return
            for name, mean in finish().items():
                if mean.data_ptr() != gradients[name].data_ptr():  # else it was decoded to its place
                    gradients[name].copy_(mean)
            self._pending.pop(0)
            future.set_result(buffer)

    def _absent(self, gradients):
        """The names of those of which this rank has no gradient."""
        if _has_joined():
            return list(gradients)
        return [name for name, g in gradients.items() if holds_nothing(g)] if self._maybe_unused else ()

    def _gradients(self, bucket, buffer):
        """{name: view of the buffer in the order of the parameter's shape}."""
        gradients, names = {}, self._names
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = names.get(parameter) or self._name(parameter)
            if parameter.is_complex():  # of which torch's views cover one half: parts lie side by side in real numbers
                start = sum(2 * each.numel() for each in gradients.values())
                parts = buffer[start : start + 2 * parameter.numel()].view(-1, 2)
                gradient = torch.view_as_complex(parts).view(parameter.shape)
            elif name in self._strides:  # DDP stores it as its parameter lies (channels_last)
                gradient = gradient.as_strided(gradient.shape, self._strides[name], gradient.storage_offset())
            gradients[name] = gradient
        return gradients

    def _name(self, parameter):
        try:
            return self._names[parameter]
        except KeyError:
            raise ConfigError(
                f"model: got a gradient of shape {tuple(parameter.shape)} whose parameter is none of the model's "
                "that this state was made for"
            ) from None

    def _side_stream(self, buffer):
        """On a device, everything runs beside the backward pass, on a stream of its own."""
        if not buffer.is_cuda:
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        return torch.cuda.stream(self._stream)


def _has_joined():
    """Whether this is no backward pass: the rank has none any more, but takes part in others' (model.join())."""
    return torch._C._current_graph_task_id() < 0


def _is_dense(parameter):
    """Whether its entries lie without gaps and overlaps."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()


def compress(state: GradientState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook itself: `model.register_comm_hook(GradientState("topk"), compress)`."""
    return state.start(bucket)


def register(model: torch.nn.Module, compression, *, scaler=None, every_rank: bool = False) -> GradientState:
    """Compress the gradients of a DistributedDataParallel; returns the GradientState.

    Args:
        model: a DistributedDataParallel without another communication hook; also what torch.compile
            or Lightning's Fabric made of one.
        compression: a compressor, its spec, or a `gcompress.Policy`, the same on all ranks.
        scaler: the loss scale: None finds a torch.amp.GradScaler by itself; otherwise one, a number,
            or a function that returns it (see gcompress/exchange/scaling.py).
        every_rank: for a process group of some ranks on Gloo: every rank of the job calls this, each for its own
            group, no rank for two. Otherwise such a group waits in every bucket (see `ProcessGroupEngine`).

    Every rank must call it; ExchangeError within the process group's time-out if one does not.
    """
    model = parallel_of(model)
    state = GradientState(compression, scaler=scaler, every_rank=every_rank)
    state.bind(model)
    model.register_comm_hook(state, compress)
    return state
