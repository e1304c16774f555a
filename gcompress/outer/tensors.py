"""What of a model outer steps exchange."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import ConfigError
from ..exchange.results import exchange

BUFFER = "buffer/"  # begins the names of buffers, which are not compressed


def tensors_of(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """{name: tensor} of what is exchanged: the optimizer's parameters, and a module's floating-point buffers.

    Raises:
        ConfigError: the optimizer has a parameter that the model has not, one that is no real floating-point tensor,
            or gradients that are exchanged already.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ConfigError("model: got a DistributedDataParallel, which averages every gradient, expected the module")
    if hasattr(optimizer, "_gcompress"):
        raise ConfigError(f"optimizer: got one whose gradients travel ({exchange(optimizer)}), expected a plain one")
    module = model if isinstance(model, torch.nn.Module) else None
    named = dict(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    unnamed = stepped - set(named.values())
    if unnamed:
        shape = tuple(next(iter(unnamed)).shape)
        raise ConfigError(f"model: it lacks the optimizer's parameter of shape {shape}, expected all to be there")
    found: dict[str, torch.Tensor] = {name: each for name, each in named.items() if each in stepped}
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise ConfigError(f"parameter {name!r}: got {parameter.dtype}, expected real floating point")
    kept = module.state_dict(keep_vars=True) if module is not None else {}
    for name, buffer in module.named_buffers() if module is not None else ():
        if name in kept and buffer.is_floating_point() and buffer.numel() and bool(torch.isfinite(buffer).all()):
            found[BUFFER + name] = buffer
    return found
