"""After a request that fails, puts back parameters, buffers, and the states of optimizer and scheduler."""

import contextlib
import copy

import torch


def copied(value, old=None):
    """A copy of nested dicts and lists of tensors and plain values.

    Args:
        value: what to copy.
        old: an earlier copy that nobody needs any more. Its tensors are reused if they fit.
    """
    if isinstance(value, torch.Tensor):
        like = isinstance(old, torch.Tensor) and (old.shape, old.dtype, old.device) == (
            value.shape, value.dtype, value.device,
        )  # fmt: skip
        return old.copy_(value.detach()) if like else value.detach().clone()
    if isinstance(value, dict):
        old = old if isinstance(old, dict) else {}
        return {key: copied(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        old = old if isinstance(old, list) and len(old) == len(value) else [None] * len(value)
        return [copied(*pair) for pair in zip(value, old, strict=True)]
    return copy.deepcopy(value)


def buffers(*modules):
    """A copy of the modules' buffers (running statistics, for instance) for `restore_buffers`."""
    return [copied(dict(module.named_buffers())) for module in modules]


def restore_buffers(modules, before):
    """Give the modules' buffers their earlier values."""
    for module, copies in zip(modules, before, strict=True):
        _restore(dict(module.named_buffers()), copies)


@torch.no_grad()
def _restore(tensors, before):
    for name, tensor in tensors.items():
        # A buffer that is new, or has grown, is a cache that a layer keeps for itself.
        if name in before and before[name].shape == tensor.shape:
            tensor.copy_(before[name])


class Undo:
    """Undoes what a failing request did to a client's slot: the server takes a step whole or not at all.

    It copies the trained parameters, buffers and the optimizer's state, which takes as much memory
    again. The copy's memory is used for the next request, so that a steady step allocates none.
    """

    def __init__(self):
        self._before = None

    @contextlib.contextmanager
    def on_error(self, slot):
        """A context: if an error is raised in it, the slot's tail and memory are put back."""
        parts = _changing_parts(slot.tail)
        self._before = copied({name: state() for name, (state, _) in parts.items()}, self._before)
        try:
            yield
        except BaseException as error:
            for name, (_, restore) in parts.items():
                restore(copied(self._before[name]))  # copied, since an optimizer keeps the tensors that it is given
            slot.tail.drop_forward(failure=error)
            slot.activations.revert()
            raise
        slot.activations.commit()


def _changing_parts(tail):
    """{name: (function that returns the state, function that puts it back)}. Frozen parameters do not change."""
    model = tail.model

    def tensors():
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        return {**trained, **dict(model.named_buffers())}

    parts = {"tensors": (tensors, lambda before: _restore(tensors(), before))}
    for name in ("optimizer", "scheduler"):
        if part := getattr(tail, name):
            parts[name] = part.state_dict, part.load_state_dict
    return parts
