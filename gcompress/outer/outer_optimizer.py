"""The outer optimizer: rounds of H local steps, and what becomes of the weights between them.

The anchor is the weights that all ranks have in common. In a round, every rank takes H steps of the inner optimizer
from the anchor. It compresses the change `anchor - weights`, added to the residual of earlier rounds. The changes are
averaged over the ranks, the anchor moves by their mean, and the weights are set to the anchor. With momentum m and
learning rate a:

    change = mean over ranks of decode(encode(anchor - weights + residual))
    velocity = m velocity + change
    anchor = anchor - a (change + m velocity)

DiLoCo (Douillard et al., arXiv 2311.08105) is compression None, lr 0.7, momentum 0.9. SparseLoCo (Sarfi et al., arXiv
2508.15706) is lr 1 and no momentum, with a residual that decays by 0.95 from round to round: late changes act as
momentum does. The default here, for every compressor, is that with 0.9, which lost less in runs of 20 and of 60 rounds
(docs/OUTER.md). Streaming DiLoCo (arXiv 2501.18512) is `fragments` and `delay`.

With `delay`, ranks go on training during an exchange. The published method then takes the mean of the weights and the
new anchor. Here a rank keeps all the steps that it took meanwhile: it adds new anchor - (weights sent) to its weights.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..checks import check_integer, check_positive, is_number, shown
from ..errors import ConfigError, ExchangeError
from ..exchange.engine import agree
from ..policy import Policy, Rule, as_policy, check_decided
from . import outer_state
from .fragments import fragments_of
from .means import mean_exchange
from .tensors import BUFFER, check_unfrozen, tensors_of

# Of residuals, where the policy leaves it open: what was sent in parts, and what waits for its turn.
DECAY, DECAY_OF_TURNS = 0.9, 0.5


@dataclasses.dataclass
class Round:
    """An exchange of one fragment that is under way."""

    fragment: int
    due: int  # the inner step after which the weights take its result
    sent: dict[str, torch.Tensor]  # the weights as they were sent, where steps go on meanwhile
    means: Any = None  # what waits for them, until `change` is there
    change: dict[str, torch.Tensor] | None = None  # their mean change


class OuterOptimizer:
    """A torch optimizer that steps on each rank alone, and exchanges the weights' change after every H steps.

    All ranks create one with the same arguments, from the plain optimizer and the plain model, not from a
    DistributedDataParallel. They start from rank 0's weights. All must take the same number of steps.

    Args:
        optimizer: the inner one, any torch optimizer. Its state (momentum, Adam's) stays each rank's own. Make
            a learning-rate scheduler from it.
        model: a module, whose floating-point buffers (BatchNorm's) are averaged, too; or `named_parameters()`.
        engine: `gcompress.plugins.horovod.engine()`, `gcompress.plugins.ddp.engine()` or a worker's
            `gcompress.plugins.mpi.Job`.
        compression: what `gcompress.as_policy` takes; None: changes travel as they are. Residuals decay by 0.9
            from round to round, unless the policy says otherwise (`feedback_decay`).
        every: H, the inner steps of a round.
        lr, momentum: the outer learning rate and Nesterov momentum; see above.
        fragments: into how many parts the model is cut; they are exchanged in turns, one every H / fragments steps.
        delay: inner steps that ranks take during an exchange, at most H / fragments; 0: ranks wait for it.
        anchor_device: the device that holds anchors and velocities and encodes changes, such as "cpu"; None: the
            parameters' own.

    Attributes:
        optimizer: the inner one.
        steps, rounds: inner steps taken, and exchanges of a fragment that have ended.
        exchange: its `report` counts bytes; one of its steps is one exchange.

    >>> import torch.distributed as dist
    >>> import gcompress, gcompress.plugins.ddp
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.Linear(64, 64)
    >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> outer = gcompress.OuterOptimizer(inner, model, gcompress.plugins.ddp.engine(), "topk:sparsity=0.9", every=5)
    >>> for step in range(10):
    ...     outer.zero_grad()
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     outer.step()
    >>> outer.rounds, round(outer.exchange.report.ratio)
    (2, 8)
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
        engine: Any,
        compression: Any = None,
        *,
        every: int = 30,
        lr: float = 1.0,
        momentum: float = 0.0,
        fragments: int = 1,
        delay: int = 0,
        anchor_device: torch.device | str | None = None,
    ):
        check_integer("every", every, 1)
        check_integer("fragments", fragments, 1, every)
        check_integer("delay", delay, 0, every // fragments)
        check_positive("lr", lr)
        if not is_number(momentum) or not 0 <= momentum < 1:
            raise ConfigError(f"momentum: got {shown(momentum)}, expected 0 <= momentum < 1")
        self.optimizer, self.every, self.lr, self.momentum, self.delay = optimizer, every, lr, momentum, delay
        self._tensors = tensors_of(optimizer, model)
        self.fragments = fragments_of({name: each.numel() for name, each in self._tensors.items()}, fragments)
        self.steps = self.rounds = 0
        self._exchanged = [0] * fragments  # the inner step at which each fragment was sent last
        self.under_way: Round | None = None
        self._exchange = mean_exchange(engine, _policy(compression, self._tensors), self._tensors)
        self._terms = {"every": every, "lr": lr, "momentum": momentum, "fragments": fragments, "delay": delay}
        self._agreed = False
        if not getattr(engine, "elastic", False):  # where a rank that comes late finds the others at another place
            self._agree({})
            self._exchange.broadcast(self._tensors)
        self.anchors = {name: _anchor(each, anchor_device) for name, each in self._tensors.items()}
        self.velocities: dict[str, torch.Tensor] = {}

    @property
    def exchange(self) -> Any:
        """This rank's side of the exchange: `report`, and what is remembered."""
        return self._exchange.results

    @property
    def param_groups(self) -> list[dict]:
        """The inner optimizer's."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable | None = None) -> Any:
        """The inner optimizer's step, then `advance`; returns what the inner step does."""
        result = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self.advance()
        return result

    def advance(self) -> None:
        """Count one inner step, even one that a loss scaler skipped, and exchange what is due.

        Call it instead of `step`, after an inner step of your own: `scaler.step(optimizer)`,
        `scaler.update()`, `outer.advance()`.

        Raises:
            ExchangeError: on all ranks, if the weights of one are not finite. All are back at the anchor then.
        """
        self.steps += 1
        if self.under_way is not None:
            if self.steps == self.under_way.due:
                self._land()
            elif self.under_way.means is not None:
                self.under_way.means.done()
        for fragment, offset in enumerate(self._offsets()):
            if self.steps % self.every == offset:
                self._launch(fragment)
                if self.delay == 0:
                    self._land()

    def _offsets(self):
        return [fragment * self.every // len(self.fragments) for fragment in range(len(self.fragments))]

    def finish(self) -> None:
        """Exchange what has changed since the last exchange. Then all ranks have the same weights. Call it on all."""
        if self.under_way is not None:
            self._land()
        for fragment, exchanged in enumerate(self._exchanged):
            if exchanged != self.steps:
                self._launch(fragment)
                self._land()

    @torch.no_grad()
    def _launch(self, fragment):
        """Start the exchange of a fragment's change."""
        if not self._agreed:  # after states were loaded: all ranks' must be of one moment
            self._agree({"steps": self.steps, "anchors": self._digest()})
        check_unfrozen(self.optimizer, self._tensors)
        changes, sent = {}, {}
        for name in self.fragments[fragment]:
            tensor, anchor = self._tensors[name].detach(), self.anchors[name]
            changes[name] = anchor - tensor.to(anchor.device)
            if self.delay:
                sent[name] = tensor.clone()
        self._exchanged[fragment] = self.steps
        self.exchange.turn = self.rounds // len(self.fragments)  # so that each fragment's pieces change hands
        self.under_way = Round(fragment, self.steps + self.delay, sent, self._exchange.begin(changes))

    def _agree(self, moment):
        agree(self._exchange.ranks, {**self._exchange.terms, **self._terms, **moment})
        self._agreed = True

    def _digest(self):
        """A number that differs where anchors do."""
        digest = 0
        for anchor in self.anchors.values():
            digest = zlib.crc32(anchor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), digest)
        return digest

    def receive(self) -> None:
        """Wait for the mean change of the exchange that is under way; memory changes with it."""
        current = self.under_way
        if current is None or current.change is not None:
            return
        try:
            current.change, current.means = current.means.wait(), None
        except ExchangeError as error:
            self.under_way = None
            self.restart(self.fragments[current.fragment])
            raise ExchangeError(f"exchange {self.rounds} of outer steps: {error}") from error

    @torch.no_grad()
    def _land(self):
        """Move the anchor of the fragment that is under way by the mean change, and the weights with it."""
        self.receive()
        current, self.under_way = self.under_way, None
        for name in self.fragments[current.fragment]:
            tensor, anchor = self._tensors[name], self.anchors[name]
            self.move(name, anchor, current.change[name].to(anchor.device), self.velocities)
            if current.sent and self.steps > self._exchanged[current.fragment]:
                tensor.detach().add_((anchor - current.sent[name].to(anchor.device)).to(tensor.device, tensor.dtype))
            else:
                tensor.detach().copy_(anchor)
        self.rounds += 1

    def move(self, name: str, anchor: torch.Tensor, change: torch.Tensor, velocities: dict[str, torch.Tensor]) -> None:
        """Move an anchor, and its velocity if it has one, by a mean change, which is used up."""
        if name.startswith(BUFFER):
            anchor.sub_(change)
        elif self.momentum:
            velocity = velocities.setdefault(name, torch.zeros_like(anchor))
            velocity.mul_(self.momentum).add_(change)
            anchor.sub_(change.add_(velocity, alpha=self.momentum), alpha=self.lr)
        else:
            anchor.sub_(change, alpha=self.lr)

    @torch.no_grad()
    def restart(self, names: Iterable[str]) -> None:
        """Put weights back to the anchor."""
        for name in names:
            self._tensors[name].detach().copy_(self.anchors[name])

    @property
    def counts(self) -> list[int]:
        """Inner steps taken, exchanges that have ended, and after which step each fragment was sent last."""
        return [self.steps, self.rounds, *self._exchanged]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        self.steps, self.rounds, *self._exchanged = counts
        self._agreed = False

    def resume_round(self, saved: dict | None) -> None:
        """Go on with an exchange of a saved state, whose mean change is known, or with none."""
        self.under_way = Round(**saved) if saved else None

    def enter(self, counts: list[int]) -> None:
        """Begin a round among other ranks than before, from the anchors as they are now; on all ranks alike."""
        self.counts = counts
        self.restart(self.anchors)

    def leave(self) -> dict[str, torch.Tensor]:
        """Before the ranks change: end the exchange under way. Returns anchors and velocities, to be given to all.

        On a rank that has not taken a step, the anchors are its weights.
        """
        if self.under_way is not None:
            self._land()
        for name, anchor in self.anchors.items() if self.steps == 0 else ():
            anchor.copy_(self._tensors[name].detach())
        moving = [name for name in self.anchors if self.momentum and not name.startswith(BUFFER)]
        velocities = {name: self.velocities.setdefault(name, torch.zeros_like(self.anchors[name])) for name in moving}
        return {**self.anchors, **{f"velocity/{name}": each for name, each in velocities.items()}}

    def state_dict(self) -> dict:
        """What this rank needs, besides the model's own state, to go on to the bit. Save both for each rank.

        Call it on all ranks after the same step. It waits for an exchange that is under way.
        """
        return outer_state.of_rank(self)

    def full_state_dict(self) -> dict:
        """What any number of ranks can go on from: anchors, and sums over ranks of what is remembered.

        Call it on all ranks after the same step; it is the same on each. A rank that loads it begins a round at the
        anchor. The inner optimizer's state, which is each rank's own, is not in it. Not on parameter servers.
        """
        return outer_state.of_all_ranks(self)

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()` of this rank, after the model's own, or from `full_state_dict()`.

        Call it on all ranks before the same step. The next exchange checks that all have loaded the same anchors.

        Raises:
            ConfigError: the state is of another model, other settings or another rank. Nothing has changed then.
        """
        outer_state.load(self, state)


def _policy(compression, names):
    policy = Policy(None) if compression is None else as_policy(compression)
    check_decided(policy, "OuterOptimizer")
    if policy.feedback_decay is None and policy.error_feedback in (None, True):
        policy = dataclasses.replace(policy, feedback_decay=DECAY_OF_TURNS if policy.exchange == "turns" else DECAY)
    alone = [Rule(None, name=f"{BUFFER}*")] if any(name.startswith(BUFFER) for name in names) else []
    return dataclasses.replace(policy, rules=(*alone, *policy.rules))


def _anchor(tensor, device):
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    values = tensor.detach().to(device or tensor.device, dtype)
    return values.clone(memory_format=torch.contiguous_format)
