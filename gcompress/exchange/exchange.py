"""One rank's side of the mean (or sum) over ranks of compressed gradients, for any engine (see engine.py).

What is remembered changes when a step is applied, not when it is exchanged (memory.py, applied.py),
and is in the units of the true gradient, whatever the loss scale (scaling.py). A rank on which a
parameter got no gradient contributes zeros to it and keeps what it remembers of it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable

import torch

from .. import packing
from ..compressors import Compressor
from ..errors import ConfigError, ExchangeError
from ..feedback import EstimateFeedback, flat_values, new_memory, second_memory
from ..memory import Memory
from ..policy import Policy, as_policy
from . import saved_state
from .encoding_errors import add_errors
from .node_plan import NodePlan
from .node_ways import NodeWays
from .plan import Plan
from .results import Results
from .scaling import unscaled
from .schedule import Schedule, Task
from .ways import Gradient, Ways

log = logging.getLogger(__name__)


class GradientExchange(Results):
    """One rank's side of exchanging a model's gradients: policy, memory, report.

    Args:
        policy: what `gcompress.as_policy` takes, or None when nothing is compressed and
            the exchange only counts. "auto" is decided by the first `prepare`, on all ranks.
        engine: see engine.py; may be None when policy is.
        average: whether the results are the ranks' mean, or their sum.
        scaler: the loss scale that gradients carry, see `gcompress.exchange.scaling.LossScale`.

    See `Results` for what became of a result, and for `report`, `steps` and `scaler`.
    """

    _plan_type = Plan

    def __init__(self, policy, engine=None, *, average=True, scaler=None):
        super().__init__(None if policy is None else as_policy(policy), scaler)
        self.engine = engine
        self.average = average
        self.plan = None
        self.chosen = False  # whether "auto" decided the policy
        # False: results are not looked at before they are waited for, since the ranks have yet to compare
        # their configurations, and a rank that refused another one's bytes would end alone.
        self.agreed = True
        self._schedule, self._ways = Schedule(self.report.times), Ways(self)
        self._waiting: dict[int, dict[str, Gradient]] = {}  # by bucket number, until all of a bucket is there
        self._tasks: dict[int, Task] = {}  # of this step, by bucket number
        self._alone: list[str] = []  # names that the plan did not have at first
        self.feedback = new_memory(self.policy, at_once=False) if self.policy else None
        self.owner_feedback = second_memory(self.policy)  # by the piece's key
        self.memories = Memory()  # what summable compressors remember, a dict by parameter
        self.absent: set[str] = set()  # names without a gradient on this rank in this step
        self.turn: int | None = None  # which rank's turn it is, the same on all ranks; None: follows `steps`
        self.carried: dict[str, int] = {}  # name: how many results in a row its gradient contains

    def compressor_for(self, name: str, numel: int) -> Compressor | None:
        """The compressor that `start` would use, or None where the engine's own all-reduce is to be used."""
        return self.policy.compressor_for(name, numel, step=self.steps) if self.policy else None

    def _settle(self, names, applied):
        for memory, keys in self._memories_of(names):
            memory.apply(keys) if applied else memory.discard(keys)
        for name in names:
            self.carried.pop(name, None)

    def _continue(self, name):
        self.carried[name] = self.carried.get(name, 0) + 1
        for memory, keys in self._memories_of({name}):
            for key in keys:
                memory.carry_on(key)

    def _memories_of(self, names):
        """[(memory, its keys)] of parameters."""
        planned = [name for name in names if name in self.plan.entries] if self.plan else []
        pieces = [piece.key(name) for name in planned for piece in self.plan.owned(name, self.engine.rank())]
        feedback = [(self.feedback, names)] if self.feedback else []
        return [*feedback, (self.memories, names), (self.owner_feedback, pieces)]

    def prepare(
        self, shapes: dict[str, torch.Size], *, alone: Iterable[str] = (), device: torch.device | None = None
    ) -> None:
        """Plan the exchange of {name: shape}, in the model's order, for the engine's number of ranks.

        Logs the plan on rank 0. `start` plans a parameter that is not in it by itself. alone: names that travel in no
        bucket with others. device: where gradients lie, for "auto", which all ranks then decide together.
        """
        if self.policy and self.policy.undecided:
            from ..forecast.decide import decide  # which runs exchanges of its own

            self._take(decide(self.policy, self.engine, shapes, device))
            self.chosen = True
        self._alone = [name for name in alone if name in shapes]
        self._make_plan(shapes)
        owned = self.owned_pieces()
        if self.feedback:
            self.feedback.of_rank(self.engine.rank())
        self.owner_feedback.memories["residual"].drop(lambda key: key not in owned)
        if self.engine.rank() == 0:
            log.info("gradients travel by\n%s", self.plan)
            for rule in self.plan.unused_rules():
                log.warning("policy: the rule %s matches none of the %d parameters", rule, len(shapes))

    def _make_plan(self, shapes):
        topology = getattr(self.engine, "topology", None)
        if topology is not None and topology.by_nodes:
            self.plan, self._ways = NodePlan(self.policy, shapes, topology, self._alone), NodeWays(self)
            return
        if topology is None and self.policy.local_size not in ("auto", 1):
            raise ConfigError(
                f"local_size: got {self.policy.local_size}, expected 'auto' or 1: this engine has no exchange by nodes"
            )
        self.plan = self._plan_type(self.policy, shapes, self.engine.world_size(), self._alone)
        self.plan.topology = topology

    def _take(self, policy):
        self.policy = policy
        self.feedback, self.owner_feedback = new_memory(policy, at_once=False), second_memory(policy)

    def adopt(self, policy: Policy) -> None:
        """Use what a saved state's run used, in place of what "auto" chose now; before the first step, on all ranks."""
        if policy != self.policy:
            log.warning("auto: chose %s, goes on with %s, as the saved state", self.policy, policy)
            self._take(policy)
            if self.plan:
                self.prepare({name: entry.shape for name, entry in self.plan.entries.items()}, alone=self._alone)

    def owned_pieces(self) -> dict[str, int]:
        """{key in the owner's feedback: entries} of the pieces that are this rank's."""
        rank = self.engine.rank()
        return {piece.key(name): piece.numel for name in self.plan.entries for piece in self.plan.owned(name, rank)}

    def _entry(self, name, shape):
        """The parameter's entry in a plan for as many ranks as there are now."""
        entries = self.plan.entries if self.plan else {}
        changed = name not in entries or entries[name].shape != shape
        if changed or self.plan.world_size != self.engine.world_size():
            alone = self._alone if name in entries else [*self._alone, name]
            self.prepare({**{other: entry.shape for other, entry in entries.items()}, name: shape}, alone=alone)
        return self.plan.entries[name]

    def start(self, name: str, gradient: torch.Tensor, *, absent: bool = False) -> Callable[[], torch.Tensor]:
        """Begin the exchange of a gradient; move those under way.

        A bucket is encoded and sent when all its gradients are there: leave the gradient alone until the result is.

        Args:
            name: the parameter's.
            gradient: of the shape that was planned; it may carry the loss scale. The result is written to it where
                its type and layout allow, as soon as it is there.
            absent: this rank has no gradient for it: `gradient` is zero, and memory is left alone.

        Returns a function that waits and returns the mean (or sum) over ranks of what each
        rank encoded, with the gradient's shape and type and the same bits on every rank. It
        must not be called before all gradients of the step were started.

        Raises:
            ConfigError: the policy has no compressor for it.
        """
        entry = self._entry(name, gradient.shape)
        if entry.compressor is None:
            raise ConfigError(
                f"gradient {name!r}: got one that the policy leaves alone, expected one that it has a compressor for: "
                "the engine's own all-reduce is for the others"
            )
        scale = self._opened(name, absent)
        values = unscaled(gradient, scale)
        self._fill_bucket(name, Gradient(values, place_of(gradient)), entry)
        if self.agreed:
            self._schedule.advance(self.engine)

        def finish():
            means = self._schedule.wait(self.engine, self._task_of(name, entry.bucket))
            return self._result(name, means[name], gradient, scale)

        return finish

    def start_bucket(self, gradients: dict[str, torch.Tensor], *, absent: Iterable[str] = ()) -> Bucket:
        """Encode and start all of {name: gradient}, for engines that form buckets themselves.

        Every parameter takes its own exchange; those of one exchange travel together, and what is
        not compressed is all-reduced. Gradients are written to as by `start`. On an engine that is
        `in_order`, all ranks must bring the same buckets in the same order. absent: names as in `start`.

        Returns a function that waits and returns {name: mean or sum over ranks}; its method
        `done()` moves the exchanges on and tells whether there is anything to wait for.
        """
        ways: dict[tuple, dict] = {}
        results = {}
        for name, gradient in gradients.items():
            entry = self._entry(name, gradient.shape)
            scale = self._opened(name, name in absent) if entry.exchange != "allreduce" else 1.0
            values = unscaled(gradient, scale)
            ways.setdefault(entry.way, {})[name] = (
                values if entry.exchange == "allreduce" else Gradient(values, place_of(gradient))
            )
            results[name] = gradient, scale
        tasks = []
        for (way, *_), members in ways.items():
            make = self._ways.all_reduce if way == "allreduce" else functools.partial(self._in_bucket, way)
            tasks.append(self._schedule.start(self.engine, f"{way}.{next(iter(members))}", make(members), members))
        self._schedule.advance(self.engine)
        return Bucket(self._schedule, self.engine, tasks, self._result, results)

    def _opened(self, name, absent):
        """Begin an exchange of a parameter; returns the loss scale that its gradient carries."""
        self._open(name)
        (self.absent.add if absent else self.absent.discard)(name)
        return self.loss_scale()

    def deliver(self, name: str, mean: torch.Tensor) -> None:
        """Make of the mean (or sum) of what was sent that of the ranks' estimates, where they are remembered."""
        compressor = self.plan.entries[name].compressor
        if compressor and isinstance(self.feedback, EstimateFeedback) and self.policy.feedback_for(compressor):
            self.feedback.deliver(name, mean)

    def _result(self, name, mean, gradient, scale):
        """The result of an exchange in the gradient's type, shape and scale: the gradient itself if it is there."""
        compressor = self.plan.entries[name].compressor
        if not self.plan.by_nodes:
            self.deliver(name, mean)
        if scale != 1.0:
            mean.mul_(scale)
        if gradient.is_complex():
            return mean.to(gradient.dtype).view(gradient.shape)
        if compressor and not compressor.fixed_size:
            self._note_empty(name, mean)
        if mean.data_ptr() == gradient.data_ptr():
            return gradient.detach() if gradient.requires_grad else gradient
        result, beyond = packing.saturated(mean, gradient.dtype)
        if beyond is not None and compressor and self._ways.remembers(compressor, name):
            start, stop = self.plan.share(name, self.engine.rank())
            factor = scale if self.average else scale * self.engine.world_size()
            self.feedback.add(name, beyond[start:stop] / factor)
        return result.view(gradient.shape)

    def _fill_bucket(self, name, gradient, entry):
        members, waiting = self.plan.buckets[entry.bucket], self._waiting.setdefault(entry.bucket, {})
        waiting[name] = gradient
        if len(waiting) == len(members):
            del self._waiting[entry.bucket]
            steps = self._in_bucket(entry.exchange, {member: waiting[member] for member in members})
            self._tasks[entry.bucket] = self._schedule.start(self.engine, self.first_name(name), steps, members)

    def _in_bucket(self, way, members):
        """The steps of {name: Gradient} by a way of buckets."""
        self._measure(way, members)
        return self._ways.in_buckets[way](members)

    def _measure(self, way, members):
        """What the encodings of {name: Gradient} will lose, in a step in which that was asked for."""
        if self.measures_errors() and not self.plan.by_nodes:  # whose shares node_ways.py measures
            add_errors(self, self._ways, way, members)

    def measures_errors(self) -> bool:
        """Whether what encodings lose is to be measured in this step."""
        return self.report.encoding_errors.due(self.report.steps)

    def error_taker(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        """What is to be given what was encoded of a parameter and what of that was sent; None: nobody measures it."""
        found = self.report.encoding_errors
        return functools.partial(found.add, name) if self.measures_errors() and name not in self.absent else None

    def _whose(self):
        return (self.engine.rank(), self.engine.world_size()) if self.engine else (0, 1)

    def _task_of(self, name, number):
        if number not in self._tasks:
            missing = set(self.plan.buckets[number]) - set(self._waiting.get(number, ()))
            raise ExchangeError(f"gradient {name!r}: its bucket waits for {', '.join(sorted(missing))}")
        return self._tasks[number]

    def first_name(self, name: str) -> str:
        """The engine's name of the first operation in which a parameter travels."""
        entry = self.plan.entries[name]
        return f"bucket.{entry.bucket}.{self.plan.buckets[entry.bucket][0]}" if entry.bucket >= 0 else name

    def advance(self) -> bool:
        """Move the exchanges under way as far as they go without waiting; returns whether any moved."""
        return self._schedule.advance(self.engine)

    def end_step(self) -> None:
        self._tasks.clear()
        super().end_step()

    def abandon_step(self) -> None:
        """Forget what is under way, after the engine has failed or was reset."""
        self._schedule.clear()
        self.report.encoding_errors.forget()
        self._waiting.clear()
        self._tasks.clear()
        self._loss_scale.step_over()
        self.discard()

    def state_dict(self) -> dict:
        """This rank's memory and counts: save one per rank and load each on its own rank.

        Of steps that were applied. For other numbers of ranks see `gcompress.merge_states`.
        """
        return saved_state.of_rank(self)

    def full_state_dict(self) -> dict:
        """What all ranks remember together, the same on each, for any number of ranks; all must call it."""
        return saved_state.of_all_ranks(self)

    @property
    def all_ranks(self) -> saved_state.AllRanks:
        """`full_state_dict` and `load_state_dict` as one object, for libraries that save what has both."""
        return saved_state.AllRanks(self)

    def load_state_dict(self, saved: dict) -> None:
        """Go on from a state: this rank's own, or all ranks' together.

        Raises:
            ConfigError: it is another rank's, another number of ranks', another policy's or another
                model's, or holds what no state does. Nothing has changed then.
        """
        saved_state.load(self, saved)


def place_of(gradient):
    """Where its mean goes, 1-D float32: the gradient itself where it is that."""
    if gradient.dtype == torch.float32 and gradient.is_contiguous():
        return flat_values(gradient)
    return torch.empty(gradient.numel(), device=gradient.device)


class Bucket:
    """What `start_bucket` returns; each mean is finished by `finish(name, mean, *results[name])`."""

    def __init__(self, schedule, engine, tasks, finish, results):
        self._schedule, self._engine, self._tasks = schedule, engine, tasks
        self._finish, self._results = finish, results

    def done(self):
        self._schedule.advance(self._engine)
        return all(task.done for task in self._tasks)

    def __call__(self):
        means = {}
        for task in self._tasks:
            means.update(self._schedule.wait(self._engine, task))
        return {name: self._finish(name, means[name], *each) for name, each in self._results.items()}
