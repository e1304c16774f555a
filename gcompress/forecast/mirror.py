"""One rank's whole way of its gradients, run without other ranks: every other one sends what this one does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ..exchange.exchange import GradientExchange
from ..exchange.plan import Plan
from ..policy import Policy


def moment(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def own_clock(device: torch.device) -> Callable[[], float]:
    """The clock of what this thread does, whatever else runs on the processor; of a GPU, of what passes."""
    return time.thread_time if device.type == "cpu" else functools.partial(moment, device)


def shortest(
    repeat: int, function: Callable[[], object], device: torch.device, clock: Callable[[], float] | None = None
) -> float:
    """The shortest seconds of a call, after one that touches the memory; by the device's time without a clock."""
    clock = clock or functools.partial(moment, device)
    seconds = []
    for _ in range(repeat + 1):
        start = clock()
        function()
        seconds.append(clock() - start)
    return min(seconds[1:])


class Mirror:
    """The engine of one rank among equals.

    Args:
        size: the number of ranks.
        clock: seconds, for `spent` and `started`.

    Attributes:
        spent: seconds that were not this rank's: those in which the other ranks' payloads were made.
        started: (name, lane, seconds of this rank's clock) of every operation, in order.
    """

    in_order = False

    def __init__(self, size, clock=time.perf_counter):
        self.size, self.spent, self.started = size, 0.0, []
        self._packed, self._now = {}, clock

    def rank(self):
        return 0

    def world_size(self):
        return self.size

    def gather_texts(self, text):
        return [text] * self.size

    def allgather(self, name, lane, payload, sizes):
        packed = self._packed.pop(name.removesuffix(f".{lane}"), None) if lane else None
        if packed is None:
            return self._mirrored(name, lane, lambda: payload.repeat(self.size))
        # Other owners have other pieces: what this rank sent them stands for the mean that they send.
        return self._mirrored(name, lane, lambda: torch.cat([payload, packed[len(payload) :]]))

    def alltoall(self, name, lane, payload, to, back):
        self._packed[name] = payload
        return self._mirrored(name, lane, lambda: payload[: to[0]].repeat(self.size))

    def allreduce(self, name, lane, tensor, op):
        return self._mirrored(name, lane, lambda: tensor * self.size if op == "sum" else tensor.clone())

    def _mirrored(self, name, lane, make):
        start = self._now()
        self.started.append((name, lane, start - self.spent))
        result = make()
        self.spent += self._now() - start
        return Mirrored(result)


class Mirrored:
    """An operation of a Mirror, over at once."""

    def __init__(self, result):
        self._result = result

    def ready(self):
        return True

    def wait(self):
        return self._result


class MirroredPath:
    """One rank's exchange of gradients among equals.

    Args:
        policy: a Policy that is decided.
        gradients: {name: tensor}, as they are in every step.
        ranks: how many there are.
        shapes: {name: shape} of the whole model, of which the gradients may be a part; None: they are all.
        clock: seconds, also of the moments at which operations start; None: time, in which a GPU is only waited for
            at the end.
    """

    def __init__(
        self,
        policy: Policy,
        gradients: dict[str, torch.Tensor],
        ranks: int,
        shapes: dict[str, torch.Size] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.device = next(iter(gradients.values())).device
        self._clock = clock or functools.partial(moment, self.device)
        self.engine, self._values = Mirror(ranks, clock or time.perf_counter), gradients
        self.gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        self.exchange = GradientExchange(policy, self.engine)
        shapes = shapes or {name: gradient.shape for name, gradient in gradients.items()}
        self.exchange.plan = Plan(policy, shapes, ranks)  # without a word: `prepare` logs it

    def renew(self) -> None:
        """Put the gradients back: the last step wrote its result there."""
        for name, values in self._values.items():
            self.gradients[name].copy_(values)

    def step(self) -> float:
        """Exchange all gradients once; returns the seconds that this rank took."""
        self.renew()
        start = self.now()
        finish = [self.exchange.start(name, gradient) for name, gradient in self.gradients.items()]
        for each in finish:
            each()
        self.settle()
        return self.now() - start

    def now(self) -> float:
        """This rank's clock, in seconds; it stands while the other ranks' payloads are made."""
        return self._clock() - self.engine.spent

    def settle(self) -> None:
        """Let memory follow, as after an optimizer's step."""
        self.exchange.applied(list(self.gradients))
        self.exchange.end_step()

    def seconds(self, repeat: int) -> float:
        """The shortest of that many steps, after two in which memory begins."""
        return min([self.step() for _ in range(repeat + 2)][2:])

    def wire_bytes(self) -> float:
        """What leaves this rank in a step."""
        return self.exchange.report.wire_bytes / self.exchange.report.steps

    def codec(self) -> None:
        """Encode and decode every gradient, without memory or ranks."""
        for name, values in self._values.items():
            compressor = self.exchange.compressor_for(name, values.numel())
            if compressor is not None:
                compressor.decompress(*compressor.compress(values, seed=1))
