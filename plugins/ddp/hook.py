"""A communication hook for DistributedDataParallel."""

import contextlib
import json

import torch
import torch.distributed as dist

from gcompress.errors import ConfigError, ConfigMismatchError
from gcompress.exchange import GradientExchange

from .engine import DistributedEngine


class GradientState:
    """One rank's side of the hook `compress`: exchange, memory, report.

    Args:
        model: the DistributedDataParallel, or the module in it.
        compression: what `gcompress.as_policy` takes.
        process_group: that of the DistributedDataParallel; None: all ranks.
    """

    def __init__(self, model, compression, process_group=None):
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            process_group = process_group or model.process_group
            model = model.module
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {p: name for name, p in trained.items()}
        self.exchange = GradientExchange(compression, DistributedEngine(process_group))
        self.exchange.prepare({name: p.shape for name, p in trained.items()})
        self._agreed = False
        self._pending = []  # (future, the bucket's buffer, its gradients by name, function that waits)
        self._stream = None

    def state_dict(self):
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        return self.exchange.state_dict()

    def load_state_dict(self, state):
        """Go on from `state_dict()`, on all ranks before the same step."""
        self.exchange.load_state_dict(state)
        self._agreed = False

    def start(self, bucket):
        """Start the exchange of a GradBucket; returns the future of its buffer, filled with the means."""
        if bucket.index() == 0 and self._pending:  # the last step ended with an error
            self._pending.clear()
            self.exchange.abandon_step()
        if not self._agreed:
            self._agree()
        buffer = bucket.buffer()
        with self._side_stream(buffer):
            gradients = {self._name(p): g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
            future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
            self._pending.append((future, buffer, gradients, self.exchange.start_bucket(gradients)))
            # Nothing of the backward pass is left to overlap with once the last bucket is there.
            self._finish(wait=bucket.is_last())
        if bucket.is_last():
            self.exchange.end_step()
        return future

    def _finish(self, wait):
        """Hand over the buckets that are complete, in order; all of them if `wait`."""
        while self._pending:
            future, buffer, gradients, finish = self._pending[0]
            if not wait and not finish.done():
                return
            for name, mean in finish().items():
                gradients[name].copy_(mean)
            self._pending.pop(0)
            future.set_result(buffer)

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

    def _agree(self):
        """Compare configurations; ConfigMismatchError on every rank if they are not all the same."""
        exchange, group = self.exchange, self.exchange.engine.group
        own = {"compression": exchange.policy.to_dict(), "plan": exchange.plan.digest(), "step": exchange.report.steps}
        texts = [None] * dist.get_world_size(group)
        dist.all_gather_object(texts, json.dumps(own, sort_keys=True), group=group)
        groups = {}
        for rank, text in enumerate(texts):
            groups.setdefault(text, []).append(rank)
        if len(groups) > 1:
            found = "; ".join(f"ranks {ranks}: {text}" for text, ranks in groups.items())
            raise ConfigMismatchError(f"compression: expected one configuration on all ranks, got {found}")
        self._agreed = True


def compress(state: GradientState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook itself: `model.register_comm_hook(GradientState(model, "topk"), compress)`."""
    return state.start(bucket)


def register(model, compression):
    """Compress the gradients of a DistributedDataParallel; returns the GradientState.

    Args:
        model: a DistributedDataParallel without another communication hook.
        compression: a compressor, its spec, or a `gcompress.Policy`, the same on all ranks.
    """
    state = GradientState(model, compression)
    model.register_comm_hook(state, compress)
    return state
