"""What every engine's exchange has in common: results that are delivered first and settled later."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ..errors import ConfigError
from .applied import Watch
from .report import Report
from .scaling import LossScale
from .trace import Trace


class Results:
    """The results of one rank's exchange, each open until it is known whether it was applied.

    A subclass exchanges gradients: it calls `_open` when the exchange of one begins, and
    implements `_settle`, and `_continue` if it can go on from an open result.

    Args:
        policy: a Policy, or None.
        scaler: the loss scale that gradients carry, see `gcompress.exchange.scaling.LossScale`.

    Attributes:
        report: bytes, times and errors, see `gcompress.exchange.report.Report`.
        steps: optimizer steps that were applied; seeds and a warm-up follow it.
        open_names: parameters that were exchanged and whose result is not known to be applied.
        empty_results: names whose last result was zero everywhere, of compressors that may send nothing.
    """

    def __init__(self, policy, scaler=None):
        self.policy, self.report = policy, Report()
        self.steps, self.open_names, self.empty_results = 0, set(), set()
        self._counted = True  # whether `steps` has counted the last exchange, or there was none
        self._continued = set()  # names whose next gradient is known to contain the open result
        self._not_applied = set()  # names whose last result was not
        self._watch = None
        self.scaler = scaler

    @property
    def scaler(self) -> object:
        """What tells the loss scale; see `gcompress.exchange.scaling.LossScale`."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler):
        self._scaler, self._loss_scale = scaler, LossScale(scaler)

    def loss_scale(self) -> float:
        """The loss scale of this step's gradients."""
        return self._loss_scale.now()

    def trace(self, path: str | os.PathLike, *, steps: int = 20) -> Trace:
        """Record what this rank does when, in Chrome's trace format, from now on and for that many steps.

        Args:
            path: the file. With more than one rank its name gets the rank: `trace.json` is `trace.rank0.json` of
                rank 0. Each rank writes its own; not all need to.

        Returns the Trace, which can also be closed before, or be a `with` block's.

        Raises:
            ConfigError: the path cannot be written, or another trace is open.
        """
        return Trace(path, self.report, *self._whose(), steps=steps)

    def _whose(self):
        """(This rank's number, how many there are)."""
        return 0, 1

    def measure_errors(self, every: int = 100) -> None:
        """Measure what this rank's encodings lose, in the next step and then in every `every`-th; 0: no more.

        `report.errors` is then {parameter: relative squared error} of the last step in which that was done, of all
        parameters that were compressed and had a gradient on this rank; by nodes, of those of which it has a share.
        Such a step takes one more encoding and decoding; results and memory are the same to the bit. See
        encoding_errors.py for what is measured.
        """
        self.report.encoding_errors.measure(every, self.report.steps)

    def watch(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Find out from {name: parameter} which results are applied; otherwise all are taken to be."""
        self._watch = Watch(self, parameters)

    def applied(self, names: Iterable[str] | None = None) -> None:
        """The results of these parameters (default: all) have changed the weights: memory follows.

        Called by itself when a torch optimizer steps parameters that are watched.
        """
        names = self._open_among(names)
        if names and not self._counted:
            self.steps, self._counted = self.steps + 1, True
        self._close(names, True)

    def discard(self, names: Iterable[str] | None = None) -> None:
        """The results of these parameters (default: all) were not used: memory is what it was before them."""
        names = self._open_among(names)
        self._not_applied |= names
        self._close(names, False)

    def carry_on(self, name: str) -> None:
        """The next gradient of this parameter contains its open result."""
        if name in self.open_names and name not in self._continued:
            self._continued.add(name)
            self._continue(name)

    def end_step(self) -> None:
        """To be called once after all gradients of a step; without `watch`, it says that they were applied."""
        self.report.end_step()
        self._loss_scale.step_over()
        self._counted = False
        if self._watch is None:
            self.applied()
        else:
            self._watch.exchanged()

    def _open(self, name):
        """Begin the exchange of a parameter; returns whether its last result was applied."""
        if name in self.open_names and name not in self._continued:
            # No gradient of it was computed here since then, or that would be settled.
            self.applied([name]) if self._watch is None else self._watch.settle(name)
        applied = name not in self._not_applied
        self._not_applied.discard(name)
        self._continued.discard(name)
        self.open_names.add(name)
        if self._watch is not None:
            self._watch.opened(name)
        return applied

    def _note_empty(self, name, result):
        (self.empty_results.discard if bool(result.any()) else self.empty_results.add)(name)

    def _open_among(self, names):
        return set(self.open_names) if names is None else self.open_names.intersection(names)

    def _close(self, names, applied):
        self._settle(names, applied)
        self.open_names -= names
        self._continued -= names

    def _settle(self, names, applied):
        """Let what is remembered of these names follow their open results, or stay."""
        raise NotImplementedError(f"{type(self).__name__}._settle")

    def _continue(self, name):
        """Go on from the open result; here it is taken as applied."""
        self.applied([name])


def exchange(made: object) -> Results:
    """The `Results` of what a plugin made, the same on every engine.

    `.report` counts bytes. `.state_dict()` is what this rank remembers, where that can be saved (not of BytePS).

    Args:
        made: the optimizer that a plugin's `DistributedOptimizer` returned, or what `register` did.

    Raises:
        ConfigError: nothing of this library exchanges its gradients.
    """
    found = getattr(made, "_gcompress", None)
    if not isinstance(found, Results):
        raise ConfigError(
            f"optimizer: got {type(made).__name__}, expected what a plugin's DistributedOptimizer or register returned "
            "(of Horovod's DistributedOptimizer: after gcompress.plugins.horovod was imported)"
        )
    return found
