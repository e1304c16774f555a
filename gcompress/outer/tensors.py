"""What of a model outer steps exchange."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import ConfigError
from ..exchange.results import exchange

BUFFER = "buffer/"  # begins the names of buffers, which are not compressed


def named_parameters_of(
    model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of those that are trained.

    Raises:
        ConfigError: the model's gradients are exchanged already, or a parameter is no real floating-point tensor.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ConfigError("model: got a DistributedDataParallel, which averages every gradient, expected the module")
    named = dict(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
    for name, parameter in named.items():
        if not parameter.is_floating_point():
            raise ConfigError(f"parameter {name!r}: got {parameter.dtype}, expected real floating point")
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def tensors_of(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """{name: tensor} of what is exchanged: the optimizer's parameters, and a module's floating-point buffers.

    Raises:
        ConfigError: the optimizer has a parameter that the model has not, or its gradients are exchanged already.
    """
    if hasattr(optimizer, "_gcompress"):
        raise ConfigError(f"optimizer: got one whose gradients travel ({exchange(optimizer)}), expected a plain one")
    trained = named_parameters_of(model)
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    unnamed = {parameter for parameter in stepped if parameter.requires_grad} - set(trained.values())
    if unnamed:
        shape = tuple(next(iter(unnamed)).shape)
        raise ConfigError(f"model: it lacks the optimizer's parameter of shape {shape}, expected all to be there")
    found: dict[str, torch.Tensor] = {name: each for name, each in trained.items() if each in stepped}
    if isinstance(model, torch.nn.Module):
        found.update({BUFFER + name: buffer for name, buffer in _averaged(model)})
    return found


def check_unfrozen(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """ConfigError if the optimizer has come to train a parameter that is none of {name: tensor}."""
    known = set(tensors.values())
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.requires_grad and parameter not in known:
            raise ConfigError(
                f"optimizer: got a parameter of shape {tuple(parameter.shape)} that was frozen, or not there, when "
                "OuterOptimizer was made: make a new one"
            )


def _averaged(module):
    """(name, buffer) of those that are saved with the module, are floating-point and finite: no masks."""
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved and buffer.is_floating_point() and buffer.numel() and bool(torch.isfinite(buffer).all()):
            yield name, buffer
