"""The loss scale that gradients carry when an exchange meets them.

With mixed precision the loss is multiplied by a scale S, so gradients are S times what they
should be until the scaler divides them before the optimizer's step; and S changes in training.
An exchange divides by S what it encodes and multiplies its result by S. So what travels, what
is remembered and what a policy's `clip` limits is the true gradient, and with S a power of two
(as torch's scaler has it) all bits are those of training without a scaler.

torch's GradScaler is found by itself: the gradient of a loss that `scale` returned carries its
scale, from the loss on until the end of that backward pass.
"""

import functools
import math
import weakref

import torch

from .errors import ConfigError
from .packing import to_type

_in_force = None  # a weak reference to the scaler whose loss is being differentiated
_told = set()  # classes of scalers that tell


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
        self._scaler, self._found = scaler, None
        watch_scalers()

    def look(self):
        """To be called while a gradient is computed: it carries the scale of its loss, if a scaler made that."""
        self._found = _in_force

    def now(self):
        """The scale of the gradients of the backward pass under way, or of the last one."""
        if self._scaler is None:
            return self._found_scale()
        if hasattr(self._scaler, "get_scale"):
            scale = self._scaler.get_scale()
        else:
            scale = self._scaler() if callable(self._scaler) else self._scaler
        if not _is_scale(scale):
            raise ConfigError(f"scaler: got the loss scale {scale!r}, expected a positive number")
        return float(scale)

    def _found_scale(self):
        reference = _in_force or self._found
        scaler = reference() if reference is not None else None
        return scaler.get_scale() if scaler is not None else 1.0


def unscaled(gradient, scale):
    """The true gradient of one that carries a loss scale."""
    return gradient if scale == 1.0 else to_type(gradient.detach(), torch.float32) * (1.0 / scale)


def _is_scale(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def watch_scalers():
    """Let torch's GradScaler tell whose loss is being differentiated; a second call changes nothing."""
    for kind in (getattr(torch.amp, "GradScaler", None), torch.cuda.amp.GradScaler):
        if kind is not None and "scale" in vars(kind) and kind not in _told:
            _told.add(kind)
            kind.scale = _telling(kind.scale)


def _telling(scale):
    @functools.wraps(scale)
    def telling(self, outputs):
        scaled = scale(self, outputs)
        if self.is_enabled():
            for tensor in [scaled] if isinstance(scaled, torch.Tensor) else scaled:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(functools.partial(_begin, weakref.ref(self)))
        return scaled

    return telling


def _begin(reference, gradient):
    global _in_force
    _in_force = reference
    torch.autograd.Variable._execution_engine.queue_callback(_end)


def _end():
    global _in_force
    _in_force = None
