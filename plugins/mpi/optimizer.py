"""Any torch optimizer, stepping with the mean over the workers."""

import functools

import torch

from gcompress.compressors.base import check_integer
from gcompress.errors import ConfigError
from gcompress.policy import check_momentum

from .worker import Worker


def DistributedOptimizer(optimizer, named_parameters, job, compression=None, *, backward_passes_per_step=1, **options):
    """Make an optimizer exchange gradients with the servers before each step.

    Args:
        optimizer: any torch optimizer whose `step` takes no closure.
        named_parameters: `model.named_parameters()`; those without `requires_grad` are left out.
        job: a Job, on a worker rank.
        compression, options: see `Worker`. With `momentum=` the servers keep it: give the
            optimizer none.
        backward_passes_per_step: gradients add up over so many backward passes before they
            are pushed.

    Returns:
        The same optimizer. A gradient is pushed in the backward pass as soon as it is ready;
        `step()` waits for all. To have the means before (for clipping), call
        `optimizer.synchronize()`.
    """
    check_integer("backward_passes_per_step", backward_passes_per_step, 1)
    parameters = {name: p for name, p in named_parameters if p.requires_grad}
    stepped = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if stepped != set(parameters.values()):
        raise ConfigError(
            f"named_parameters: got {len(parameters)}, expected just the {len(stepped)} that the optimizer steps"
        )
    worker = Worker(job, {name: p.numel() for name, p in parameters.items()}, compression, **options)
    if worker.policy:
        check_momentum(worker.policy, optimizer.param_groups, {p: name for name, p in parameters.items()})
    gradients = _Gradients(worker, parameters, backward_passes_per_step)
    optimizer._gcompress = gradients
    optimizer.synchronize = gradients.synchronize
    optimizer.register_step_pre_hook(gradients.before_step)
    return optimizer


def exchange(optimizer):
    """This worker's Worker of an optimizer made by `DistributedOptimizer`."""
    try:
        return optimizer._gcompress.worker
    except AttributeError:
        raise ConfigError(
            f"optimizer: got {type(optimizer).__name__}, expected one that "
            "gcompress.plugins.mpi.DistributedOptimizer made"
        ) from None


class _Gradients:
    """The hooks of one optimizer."""

    def __init__(self, worker, parameters, passes):
        self.worker, self._parameters, self._passes = worker, parameters, passes
        self._seen = dict.fromkeys(parameters, 0)
        self._finish = {}  # name: what waits for its mean
        self._synchronized = False
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._ready, name))

    def _ready(self, name, parameter):
        if name in self._finish or self._synchronized:
            raise ConfigError(
                f"gradient {name!r} was computed more than {self._passes} times before optimizer.step(): "
                "raise backward_passes_per_step"
            )
        self._seen[name] += 1
        if self._seen[name] == self._passes:
            self._start(name, parameter)

    def _start(self, name, parameter):
        if parameter.grad is None:  # unused on this worker, but perhaps not on the others
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.is_sparse:
            raise ConfigError(f"gradient {name!r} is sparse, expected a dense one (Embedding(sparse=False))")
        self._finish[name] = self.worker.push_pull(name, parameter.grad)

    def synchronize(self):
        """Put the workers' means into all gradients."""
        for name, parameter in self._parameters.items():
            if name not in self._finish:
                self._start(name, parameter)
        for name, finish in self._finish.items():
            self._parameters[name].grad.copy_(finish())
        self._finish.clear()
        self._seen = dict.fromkeys(self._parameters, 0)
        self._synchronized = True
        self.worker.end_step()

    def before_step(self, optimizer, arguments, keywords):
        if any(argument not in (None, optimizer) for argument in (*arguments, *keywords.values())):
            raise ConfigError("step: got a closure, expected none: gradients are exchanged before the step")
        if not self._synchronized:
            self.synchronize()
        self._synchronized = False
