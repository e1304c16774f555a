"""DeMo: every rank has a momentum of its own, and sends only the part of it that changes fast.

Peng, Quesnelle and Kingma, "DeMo: Decoupled momentum optimization" (arXiv 2411.19870). At every step, on each rank:

    m = decay m + gradient
    q = the largest coefficients of the discrete cosine transform of m, block by block
    m = m - decode(q)
    weights = weights (1 - lr weight_decay) - lr sign(mean over ranks of decode(q))

The first three lines are error feedback with a decay. So DeMo is a policy and the last line, and any compressor can
take the place of the transform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..checks import check_number, check_positive, is_number, shown
from ..errors import ConfigError, NotFiniteError
from ..exchange.engine import agree
from ..policy import Policy, as_policy, check_decided
from .means import mean_exchange
from .tensors import named_parameters_of

COMPRESSION = "dct:(topk:sparsity=0.9921875,chunk=4096)"  # 32 of a block of 64 x 64


class DeMo(torch.optim.Optimizer):
    """Sign descent by the mean of what every rank sends of its momentum.

    All ranks create one, from the plain model and with the same arguments. They start from rank 0's weights. All must
    call `step` equally often, even if a loss scaler finds that a gradient has overflowed.

    Args:
        model: a module, or `named_parameters()`; those that are frozen are left alone.
        engine: as for `gcompress.OuterOptimizer`.
        lr: by how much an entry moves at each step.
        compression: what `gcompress.as_policy` takes; a compressor alone is used for every tensor.
        decay: of the momentum, 0 < decay <= 1, unless the policy has a `feedback_decay`.
        weight_decay: as AdamW's.

    `exchange` counts bytes in its `report`. `state_dict()` holds this rank's momentum: save it per rank.
    """

    _step_supports_amp_scaling = True  # a scaler then leaves it to `step` to unscale, and to skip on all ranks alike

    def __init__(
        self,
        model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
        engine: Any,
        lr: float = 1e-3,
        compression: Any = COMPRESSION,
        *,
        decay: float = 0.999,
        weight_decay: float = 0.0,
    ):
        check_positive("lr", lr)
        check_number("weight_decay", weight_decay, 0, 1 / lr)
        self._named = named_parameters_of(model)
        super().__init__(list(self._named.values()), {"lr": lr, "weight_decay": weight_decay})
        weights: dict[str, torch.Tensor] = {**self._named}
        self._exchange = mean_exchange(engine, _policy(compression, decay), weights)
        agree(self._exchange.ranks, self._exchange.terms)
        self._exchange.broadcast(weights)

    @property
    def exchange(self) -> Any:
        """This rank's side of the exchange: `report`, and what is remembered."""
        return self._exchange.results

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Exchange, and move the weights; returns what the closure does.

        Raises:
            NotFiniteError: on all ranks, if a gradient of one is not finite; with a loss scaler the step is skipped.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        scale = getattr(self, "grad_scale", None)  # of a loss scaler that has not unscaled the gradients
        gradients = {name: _gradient(p, scale) for name, p in self._named.items()}
        try:
            means = self._exchange.begin(gradients).wait()
        except NotFiniteError:
            if not hasattr(self, "found_inf"):
                raise
            return loss
        names = {p: name for name, p in self._named.items()}
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(means[names[p]].sign_(), alpha=-group["lr"])
        return loss

    def state_dict(self) -> dict:
        """Torch's, and under "exchange" what this rank remembers."""
        return {**super().state_dict(), "exchange": self.exchange.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from `state_dict()` of this rank; ConfigError if it is another's."""
        if not isinstance(state_dict, dict) or "exchange" not in state_dict:
            raise ConfigError("state_dict: it has no 'exchange', expected what state_dict() of a DeMo returned")
        self.exchange.load_state_dict(state_dict["exchange"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "exchange"})


def _gradient(parameter, scale):
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    gradient = parameter.grad.to(torch.float32, copy=True)  # which the mean may be written to
    return gradient if scale is None else gradient.div_(scale)


def _policy(compression, decay):
    if not is_number(decay) or not 0 < decay <= 1:
        raise ConfigError(f"decay: got {shown(decay)}, expected 0 < decay <= 1")
    policy = as_policy(compression)
    check_decided(policy, "DeMo")
    if policy is not compression and policy == Policy(policy.compressor):
        policy = Policy(policy.compressor, min_numel=1)
    if policy.feedback_decay is None and policy.error_feedback != "ef21":
        policy = dataclasses.replace(policy, feedback_decay=decay)
    return policy
