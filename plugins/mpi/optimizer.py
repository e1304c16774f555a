"""Any torch optimizer, stepping with the mean over the workers."""

import functools
from collections.abc import Iterable

import torch

from gcompress.checks import check_integer
from gcompress.errors import ConfigError
from gcompress.exchange.applied import holds_nothing
from gcompress.policy import check_momentum

from .job import Job
from .worker import Worker


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    job: Job,
    compression=None,
    *,
    backward_passes_per_step: int = 1,
    **options,
) -> torch.optim.Optimizer:
    """Make an optimizer exchange gradients with the servers before each step.

    Args:
        optimizer: any torch optimizer whose `step` takes no closure.
        named_parameters: `model.named_parameters()`: all that will ever be trained. One that is frozen
            (`requires_grad`), or not yet among the optimizer's, is left alone for as long as it is.
        job: a Job, on a worker rank.
        compression, options: see `Worker`. With `momentum=` the servers keep it: give the
            optimizer none.
        backward_passes_per_step: gradients add up over that many backward passes before they
            are pushed.

    Returns:
        The same optimizer. A gradient is pushed in the backward pass as soon as it is ready;
        `step()` waits for all. To have the means before (for clipping), call
        `optimizer.synchronize()`. With a loss scaler: `optimizer.synchronize()`,
        `scaler.unscale_(optimizer)`, `scaler.step(optimizer)`.
    """
    check_integer("backward_passes_per_step", backward_passes_per_step, 1)
    parameters = dict(named_parameters)
    unnamed = _trained(optimizer.param_groups) - set(parameters.values())
    if unnamed:
        raise ConfigError(
            f"named_parameters: got {len(parameters)}, of which {len(unnamed)} that the optimizer steps are missing"
        )
    complex_ones = [name for name, p in parameters.items() if not p.is_floating_point()]
    if complex_ones:
        raise ConfigError(
            f"parameter {complex_ones[0]!r}: got one that is not of real floating point, which is not sent"
        )
    worker = Worker(job, {name: p.numel() for name, p in parameters.items()}, compression, **options)
    if worker.policy:
        check_momentum(worker.policy, optimizer.param_groups, {p: name for name, p in parameters.items()})
    hooks = GradientHooks(worker, parameters, optimizer, backward_passes_per_step)
    optimizer._gcompress = worker
    optimizer.synchronize = hooks.synchronize
    optimizer.add_param_group = functools.partial(hooks.add_param_group, optimizer.add_param_group)
    optimizer.register_step_pre_hook(hooks.before_step)
    optimizer.register_step_post_hook(hooks.after_step)
    return optimizer


def _trained(groups):
    return {p for group in groups for p in group["params"]}


class GradientHooks:
    """The hooks of one optimizer."""

    def __init__(self, worker, parameters, optimizer, passes):
        self.worker, self._parameters, self._passes = worker, parameters, passes
        self._trained = _trained(optimizer.param_groups)
        self._seen = dict.fromkeys(parameters, 0)
        self._finish = {}  # name: what waits for its mean
        self._synchronized = False
        self._hooked = set()
        self._hook()

    def _hook(self):
        """See every gradient that is computed; of those that were frozen as soon as they are not."""
        new = [name for name, p in self._parameters.items() if p.requires_grad and name not in self._hooked]
        for name in new:
            parameter = self._parameters[name]
            parameter.register_hook(functools.partial(self._begins, name, parameter))
            parameter.register_post_accumulate_grad_hook(functools.partial(self._ready, name))
        if new:
            self._hooked.update(new)
            self.worker.watch(self._parameters)

    def add_param_group(self, stock, group):
        added = group["params"]
        added = [added] if isinstance(added, torch.Tensor) else list(added)
        added = [each[1] if isinstance(each, tuple) else each for each in added]  # torch takes named ones, too
        unknown = [p for p in added if all(p is not known for known in self._parameters.values())]
        if unknown:
            raise ConfigError(
                f"add_param_group: got a parameter of shape {tuple(unknown[0].shape)} that was not in the "
                "named_parameters of DistributedOptimizer, expected all that will ever be trained to be there"
            )
        stock({**group, "params": added})
        self._trained.update(added)
        self._hook()

    def _begins(self, name, parameter, gradient):
        """What was accumulated and is gone was thrown away."""
        if self._seen[name] and name not in self._finish and holds_nothing(parameter.grad):
            self._seen[name] = 0

    def _ready(self, name, parameter):
        if parameter not in self._trained:
            return
        if self._synchronized:  # the step that these means were for was skipped
            self._begin()
        if name in self._finish and name not in self.worker.open_names:  # so was one before its means were there
            self._drop()
        if name in self._finish:
            raise ConfigError(
                f"gradient {name!r} was computed more than {self._passes} times before optimizer.step(): "
                "raise backward_passes_per_step"
            )
        self._seen[name] += 1
        if self._seen[name] == self._passes:
            self._start(name, parameter)

    def _start(self, name, parameter, absent=False):
        if parameter.grad is None:  # unused on this worker, but perhaps not on the others
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.is_sparse:
            raise ConfigError(f"gradient {name!r} is sparse, expected a dense one (Embedding(sparse=False))")
        self._finish[name] = self.worker.push_pull(name, parameter.grad, absent=absent)

    def _drop(self):
        """Wait for the means of gradients that were thrown away: servers expect every push to be pulled."""
        for finish in self._finish.values():
            finish()
        self.worker.end_step()
        self._begin()

    def _begin(self):
        self._finish.clear()
        self._seen = dict.fromkeys(self._parameters, 0)
        self._synchronized = False

    def synchronize(self):
        """Put the workers' means into all hooks."""
        if self._synchronized:
            return
        self._hook()
        for name, parameter in self._parameters.items():
            if name not in self._finish and parameter in self._trained and parameter.requires_grad:
                self._start(name, parameter, absent=holds_nothing(parameter.grad))
        for name, finish in self._finish.items():
            self._parameters[name].grad.copy_(finish())
        self._begin()
        self._synchronized = True
        self.worker.end_step()

    def before_step(self, optimizer, arguments, keywords):
        if any(argument not in (None, optimizer) for argument in (*arguments, *keywords.values())):
            raise ConfigError("step: got a closure, expected none: gradients are exchanged before the step")
        if not self._synchronized:
            scale = self.worker.loss_scale()
            if scale != 1.0:
                raise ConfigError(
                    f"step: gradients carry the loss scale {scale:g} and are not synchronized; expected "
                    "optimizer.synchronize(), scaler.unscale_(optimizer), then scaler.step(optimizer)"
                )
            self.synchronize()

    def after_step(self, optimizer, arguments, keywords):
        self._synchronized = False
