"""The DistributedDataParallel in what other libraries wrap around it."""

import gc
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from gcompress.errors import ConfigError

WRAPPERS = ("_orig_mod", "_forward_module")  # where torch.compile and Lightning's Fabric keep the module


def parallel_of(model: torch.nn.Module) -> DistributedDataParallel:
    """The DistributedDataParallel that `model` is or wraps; ConfigError if there is none."""
    inner = model
    while not isinstance(inner, DistributedDataParallel):
        found = next((name for name in WRAPPERS if isinstance(getattr(inner, name, None), torch.nn.Module)), None)
        if found is None:
            raise ConfigError(f"model: got {_kind(model)}, expected a DistributedDataParallel")
        inner = getattr(inner, found)
    return inner


def parallel_with(parameter: torch.nn.Parameter, state: object) -> DistributedDataParallel:
    """The DistributedDataParallel of this process that trains a parameter.

    Args:
        state: of its communication hook, which tells it from others around the same module.

    Raises:
        ConfigError: there is none.
    """
    # A hook is told of a bucket alone, and torch keeps no list of models: once, all objects are looked through.
    found = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), DistributedDataParallel) and any(p is parameter for p in each.parameters())
    ]
    hooked = [each for each in found if any(held is state for _, held in getattr(each, "_comm_hooks", ()))]
    for each in hooked or found:
        return each
    raise ConfigError(
        f"state: got a gradient of shape {tuple(parameter.shape)}, and found no DistributedDataParallel that trains "
        "it: call state.bind(model)"
    )


def _kind(model):
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        return f"{type(model).__name__}, whose gradients FSDP exchanges itself"
    return type(model).__name__


def plain_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) pairs as the model has them that was compiled, or whose layers were."""
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), parameter
