"""What this plugin has to know of torch's FSDP that torch does not publish: all reading of private attributes is here.

Written for torch 2.14. FSDP2 cuts every parameter by rows (its first dimension) as torch.chunk does, and pads each
rank's shard to the first rank's size. What a reduce-scatter takes has a row for each rank: the padded shards, one
behind the other, of the parameters that got a gradient; what it gives is one such row. What an all-gather takes is a
row of the padded shards of all parameters. Sizes are compared, so that another layout is an error.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from gcompress.plugins.ddp.unwrap import plain_names
from torch.distributed.fsdp import FSDPModule

from gcompress.errors import ConfigError

OF_GROUPS = ["fsdp_params", "modules", "mesh_info", "gradient_divide_factor", "all_reduce_grads", "_is_hsdp"]
OF_GROUPS += ["_all_reduce_hook", "_reduce_scatter_comm", "_all_gather_comm"]
OF_PARAMETERS = ["sharded_param", "sharded_size", "padded_sharded_param_size", "fsdp_placement", "offload_to_cpu"]


class ParameterPart(NamedTuple):
    """A parameter's part of a row."""

    name: str
    parameter: torch.nn.Parameter  # the sharded one
    start: int
    padded: int  # entries of a shard with padding
    shape: torch.Size  # of this rank's shard
    absent: bool  # whether this rank computed no gradient of it

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def of(self, row: torch.Tensor) -> torch.Tensor:
        """This rank's shard in a row, a view in its shape."""
        return row[self.start : self.start + self.numel].view(self.shape)


class ParameterGroup:
    """The parameters of one FSDPModule, which travel together.

    Args:
        module: the FSDPModule.
        group: torch's object for it.
        names: {sharded parameter: name}.
    """

    def __init__(self, module, group, names):
        for thing, attributes in ((group, OF_GROUPS), *((p, OF_PARAMETERS) for p in group.fsdp_params)):
            missing = [name for name in attributes if not hasattr(thing, name)]
            if missing:
                raise _unexpected(f"{type(thing).__name__} has no {missing[0]}")
        self.module, self._group, self._names = module, group, names
        self._computed = set()  # names whose gradient was computed since the last reduction
        self._watched = {}  # name: the unsharded parameter that tells when its gradient is computed
        for each in group.modules:
            each.register_forward_pre_hook(self._before_forward)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """{name: sharded parameter}."""
        return {self._name(each): each.sharded_param for each in self._group.fsdp_params}

    def shard_shapes(self) -> dict[str, torch.Size]:
        """{name: shape of this rank's shard}."""
        return {self._name(each): torch.Size(each.sharded_size) for each in self._group.fsdp_params}

    def padded_shapes(self) -> dict[str, torch.Size]:
        """{name: shape of a shard with padding, the same on all ranks}, in the order of an all-gather."""
        return {self._name(each): torch.Size(each.padded_sharded_param_size) for each in self._group.fsdp_params}

    def shard_dimensions(self) -> dict[str, int]:
        """{name: the dimension along which it is cut}."""
        return {self._name(each): each.fsdp_placement.dim for each in self._group.fsdp_params}

    @property
    def shard_group(self) -> torch.distributed.ProcessGroup:
        """The ranks among which the parameters are sharded."""
        return self._group.mesh_info.shard_process_group

    @property
    def divide_factor(self) -> float | None:
        """What `set_gradient_divide_factor` was given."""
        return self._group.gradient_divide_factor

    @property
    def all_reduces(self) -> bool:
        """False after `set_requires_all_reduce(False)`."""
        return self._group.all_reduce_grads

    @property
    def zeros_for_unused(self) -> bool:
        """Whether parameters without a gradient travel as zeros: `set_reduce_scatter_unused_params`."""
        return getattr(self._group, "reduce_scatter_unused_params", False)

    def replicated_by_torch(self) -> bool:
        """Whether torch itself all-reduces over replicas."""
        return self._group._is_hsdp or not hasattr(self._group.mesh_info, "shard_process_group")

    def tensor_parallel(self) -> list[str]:
        """Names of parameters that were DTensors before they were sharded."""
        return [self._name(each) for each in self._group.fsdp_params if getattr(each, "is_dtensor", False)]

    def hooks(self) -> list[str]:
        """What hooks and communication of others it has."""
        found = [name for name in ("_reduce_scatter_comm", "_all_gather_comm") if not self._is_default(name)]
        return found if self._group._all_reduce_hook is None else ["_all_reduce_hook", *found]

    def _is_default(self, name):
        return type(getattr(self._group, name)).__name__.startswith("Default")

    def parts(self, numel: int) -> list[ParameterPart]:
        """What lies in the row of a reduce-scatter that is under way; to be asked once.

        Args:
            numel: entries of the row.

        Raises:
            ConfigError: no set of parameters that torch may mean has that many.
        """
        ready = [each for each in self._group.fsdp_params if hasattr(each, "_unsharded_param")]
        trained = [each for each in ready if each.sharded_param.requires_grad]
        computed, self._computed = self._computed, set()
        found = trained if self.zeros_for_unused else [each for each in ready if self._name(each) in computed]
        if sum(map(_padded, found)) != numel and sum(map(_padded, trained)) == numel:
            found, computed = trained, set(map(self._name, trained))  # nobody watched: `forward` was not called
        if sum(map(_padded, found)) != numel:
            names = ", ".join(map(self._name, found)) or "no parameter"
            raise _unexpected(f"{numel} entries of gradients for {names} of {sum(map(_padded, found))} entries")
        parts, start = [], 0
        for each in found:
            name, shape = self._name(each), torch.Size(each.sharded_size)
            parts.append(ParameterPart(name, each.sharded_param, start, _padded(each), shape, name not in computed))
            start += _padded(each)
        return parts

    def forget(self) -> None:
        """A backward pass has ended with an error."""
        self._computed.clear()

    def reads_at_once(self, row: torch.Tensor) -> bool:
        """Whether torch reads a reduce-scatter's result before the backward pass ends.

        It does to convert or divide it, to add it to a gradient that is there, to copy it to the host, and for hooks
        of the sharded parameters. Otherwise gradients are views of it.
        """
        divides = getattr(self._group, "force_sum_reduction_for_comms", False)
        divides = divides or row.dtype not in (torch.float32, torch.bfloat16)
        return divides or any(
            each.offload_to_cpu
            or each.sharded_param.dtype != row.dtype
            or each.sharded_param.grad is not None
            or bool(getattr(each.sharded_param, "_post_accumulate_grad_hooks", None))
            for each in self._group.fsdp_params
        )

    def _before_forward(self, module, arguments):
        """Let the unsharded parameters, which are there by now, tell whose gradient is computed."""
        for each in self._group.fsdp_params:
            name, unsharded = self._name(each), getattr(each, "_unsharded_param", None)
            if unsharded is None or self._watched.get(name) is unsharded or not unsharded.requires_grad:
                continue
            unsharded.register_post_accumulate_grad_hook(functools.partial(_note, self._computed_now, name))
            self._watched[name] = unsharded

    def _computed_now(self, name):
        self._computed.add(name)

    def _name(self, each):
        try:
            return self._names[each.sharded_param]
        except KeyError:
            raise ConfigError(
                f"model: got a parameter of shape {tuple(each.sharded_param.shape)} that it did not have when apply "
                "was called, expected apply after all weights were materialized and loaded"
            ) from None


def _note(computed, name, parameter):
    computed(name)


def _padded(each):
    return torch.Size(each.padded_sharded_param_size).numel()


def _unexpected(what):
    return ConfigError(
        f"torch {torch.__version__}: got {what}: FSDP does not lie as in torch 2.14, for which gcompress was written"
    )


def parameter_groups_of(model: torch.nn.Module) -> Iterator[ParameterGroup]:
    """One ParameterGroup for each FSDPModule that has parameters of its own.

    Raises:
        ConfigError: `model` has no FSDPModule, or one whose parameters lie on several meshes.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ConfigError(f"model: got {type(model).__name__}, expected one to which fully_shard was applied")
    for module in modules:
        module.reshard()  # so that the sharded parameters are those of the model
    names = {parameter: name for name, parameter in plain_names(model)}
    seen = set()
    for module in modules:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            raise _unexpected("FSDPState without _fsdp_param_groups")
        if len(groups) > 1:
            raise ConfigError(
                f"model: got {len(groups)} parameter groups in one {type(module).__name__}, expected one: torch has "
                "hooks for modules whose parameters lie on one mesh"
            )
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield ParameterGroup(module, group, names)
