"""The loss scale that gradients carry when an exchange meets them.

With mixed precision the loss is multiplied by a scale S, so gradients are S times what they
should be until the scaler divides them before the optimizer's step; and S changes in training.
An exchange divides by S what it encodes and multiplies its result by S. So what travels, what
is remembered and what a policy's `clip` limits is the true gradient, and with S a power of two
(as torch's scaler has it) all bits are those of training without a scaler.

torch's GradScaler is found by itself: a backward pass that comes through a loss which `scale`
returned computes gradients of that scaler. A rank that computes none in a step (an empty batch)
takes the scaler that it used last.
"""

import functools
import itertools
import math
import threading
import weakref

import torch

from ..errors import ConfigError
from ..packing import to_type

_passes: dict[int, weakref.ref] = {}  # number of a backward pass: a weak reference to its Scaled
_told: set[type] = set()  # classes of scalers that tell
_counter = itertools.count(1)
_last = (0, None)  # the last use of any scaler: its number, and a weak reference to the scaler


class Scaled:
    """A backward pass through a scaled loss. It lives until the pass ends, also if that is by an error."""

    def __init__(self, scaler):
        self.scaler, self.thread = scaler, threading.get_ident()


class LossScale:
    """Where an exchange learns the loss scale.

    Args:
        scaler: None: a torch GradScaler, if one is used, and otherwise 1; a scaler (anything with
            `get_scale()`); a number; or a function without arguments that returns one.
    """

    def __init__(self, scaler=None):
        known = scaler is None or hasattr(scaler, "get_scale") or callable(scaler)
        if not known and not _is_scale(scaler):
            raise ConfigError(
                f"scaler: got {scaler!r}, expected a torch.amp.GradScaler, a positive number, a function that "
                "returns one, or None"
            )
        self._scaler, self._found, self._seen = scaler, None, 0
        self._now = None
        watch_scalers()

    def now(self):
        """The scale of this step's gradients: read once, since a device may have to be waited for."""
        if self._now is None:
            self._now = self._read()
        return self._now

    def step_over(self):
        """The gradients of the next step may carry another scale."""
        self._now, self._seen = None, _last[0]

    def _read(self):
        if self._scaler is None:
            return self._read_found()
        if hasattr(self._scaler, "get_scale"):
            scale = self._scaler.get_scale()
        else:
            scale = self._scaler() if callable(self._scaler) else self._scaler
        if not _is_scale(scale):
            raise ConfigError(f"scaler: got the loss scale {scale!r}, expected a positive number")
        return float(scale)

    def _read_found(self):
        number = torch._C._current_graph_task_id()
        if number >= 0:
            scaled = _scaled(number)
            self._found = scaled.scaler if scaled is not None else None
        elif _last[0] > self._seen:  # asked for outside of a backward pass, in a step that used a scaler
            self._found = _last[1]
        scaler = self._found() if self._found is not None else None
        return scaler.get_scale() if scaler is not None else 1.0


def unscaled(gradient, scale):
    """The true gradient of one that carries a loss scale."""
    return gradient if scale == 1.0 else to_type(gradient.detach(), torch.float32) * (1.0 / scale)


def _is_scale(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _scaled(number):
    """The Scaled of a backward pass, or of the one in which it runs (reentrant checkpointing); or None."""
    exact = _passes.get(number)
    if exact is not None:
        return exact()
    thread = threading.get_ident()
    outer = [scaled for reference in list(_passes.values()) if (scaled := reference()) and scaled.thread == thread]
    return outer[-1] if outer else None


def watch_scalers():
    """Let torch's GradScaler, and classes derived from it, tell whose loss is differentiated; once for each."""
    waiting = [kind for kind in (getattr(torch.amp, "GradScaler", None), torch.cuda.amp.GradScaler) if kind]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if "scale" in vars(kind) and kind not in _told:
            _told.add(kind)
            kind.scale = _telling(kind.scale)


def _telling(scale):
    @functools.wraps(scale)
    def telling(self, outputs):
        global _last
        if not self.is_enabled():
            return scale(self, outputs)
        _last = next(_counter), weakref.ref(self)
        return _hooked(scale(self, outputs), _last[1])

    return telling


def _hooked(scaled, scaler):
    """What `scale` returned, whose tensors tell when they are differentiated."""
    if isinstance(scaled, torch.Tensor):
        if scaled.requires_grad:
            scaled.register_hook(functools.partial(_begin, scaler))
        return scaled
    if isinstance(scaled, (list, tuple)):
        for each in scaled:
            _hooked(each, scaler)
        return scaled
    return map(functools.partial(_hooked, scaler=scaler), scaled)  # of any other iterable torch makes a map, too


def _begin(scaler, gradient):
    number, scaled = torch._C._current_graph_task_id(), Scaled(scaler)
    _passes[number] = weakref.ref(scaled, lambda _: _passes.pop(number, None))
    # The engine drops its callbacks when the pass ends, and what they hold, even if it does not call them.
    torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_end, scaled))


def _end(scaled):
    """Nothing is left to do: what the pass held is freed."""
