"""The DistributedDataParallel in what other libraries wrap around it."""

from collections.abc import Iterator

import torch

from gcompress.errors import ConfigError

WRAPPERS = ("_orig_mod", "_forward_module")  # where torch.compile and Lightning's Fabric keep the module


def parallel_of(model: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel:
    """The DistributedDataParallel that `model` is or wraps; ConfigError if there is none."""
    inner = model
    while not isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        found = next((name for name in WRAPPERS if isinstance(getattr(inner, name, None), torch.nn.Module)), None)
        if found is None:
            raise ConfigError(f"model: got {_kind(model)}, expected a DistributedDataParallel")
        inner = getattr(inner, found)
    return inner


def _kind(model):
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        return f"{type(model).__name__}, whose gradients FSDP exchanges itself"
    return type(model).__name__


def plain_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) pairs as the model has them that was compiled, or whose layers were."""
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), parameter
