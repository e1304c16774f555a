"""Several clients: one after the other, or side by side with averages (SplitFed).

A round counts for a client as a whole or not at all: the head it hands in and the tail's
steps belong together, and if it is lost or too late, both are dropped. So one slow or lost
client costs the others one deadline, and no more rounds until it is back.
"""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING

import torch

from ..checks import check_integer
from ..errors import ConfigError, RefusedError
from . import security, wire
from .checkpoint import fitting

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .server import Slot
    from .tail import Tail
    from .wire import Frame

RUN = "0" * 32  # the name under which rounds are checkpointed
POLL_SECONDS = 1.0  # a client that waits for its round asks again so often, which shows that it lives


class RoundOver(Exception):
    """The round that a client works for goes on without it."""


class Rounds:
    """What both kinds share: members, the head between rounds, the deadline.

    Args:
        head: the clients' part of the model: its weights begin the first round, and its
            names and shapes are what a client may hand in.
        clients: names of the members; only they are let in.
        rounds: how many.
        deadline: seconds after which a round goes on without who is missing.
    """

    def __init__(self, head, clients, rounds, deadline=300.0):
        self.members = [security.check_name(name) for name in clients]
        if not self.members or len(set(self.members)) != len(self.members):
            raise ConfigError(f"clients: got {self.members}, expected at least one name, each once")
        check_integer("rounds", rounds, 1)
        if not deadline > 0:
            raise ConfigError(f"deadline: got {deadline}, expected seconds above 0")
        self.rounds, self.deadline = rounds, deadline
        self.number = 0
        self.head = {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
        self.history = []  # (round, names whose work counted, names that were missing)
        self._missing, self._left, self._due = set(), set(), None
        self._changed = threading.Condition()

    @property
    def finished(self):
        return self.number >= self.rounds

    def begin(self, tail: Tail, checkpoints: Checkpoints | None) -> None:
        """Called once by the server: with its tail, which holds the weights between rounds."""
        self.tail, self._checkpoints = tail, checkpoints
        saved = checkpoints.newest(RUN) if checkpoints else None
        if checkpoints and saved is not None:
            state = checkpoints.load(RUN, saved)
            with fitting(f"round {saved}"):
                self.tail.load_state_dict(state["tail"])
                self.head, self.number = state["head"], saved

    def check_member(self, name):
        if name not in self.members:
            raise RefusedError(f"{name} is not one of this server's clients, {', '.join(self.members)}")

    def largest_head(self):
        return wire.weights_limit(self.head)

    def wait_turn(self, name, since):
        """Wait for a client's next round, until POLL_SECONDS after it first asked, or not if that was long ago."""
        with self._changed:
            left = max(0.0, since + POLL_SECONDS - time.monotonic())
            self._changed.wait_for(lambda: self.finished or self._may_join(name), left)

    def join(self, slot):
        """(finished, head's bytes) for the slot's round, or None: not yet."""
        self._expire()
        self._missing.discard(slot.name)
        if not self.finished:
            if not self._may_join(slot.name):
                return None
            self._enter(slot)
        elif slot.tail is not self.tail:
            slot.tail.model.load_state_dict(self.tail.model.state_dict())
        return self.finished, wire.write_weights(self.head)

    def leave(self, slot):
        """A client needs nothing more; True if none of those that still take part does."""
        self._left.add(slot.name)
        return self.finished and self._left | self._missing >= set(self.members)

    def _close_round(self, counted, missing, head, tail):
        """End a round with this head and this tail's state: first saved, so that a full disk ends none."""
        if self._checkpoints:
            self._checkpoints.save(RUN, self.number + 1, {"tail": tail, "head": head})
            self._checkpoints.prune(RUN)
        self.history.append((self.number, sorted(counted), sorted(missing)))
        self.head, self._due = head, None
        self.number += 1

    def _wake(self):
        """Let those who wait for their turn look again."""
        with self._changed:
            self._changed.notify_all()

    def count(self, slot: Slot, samples: int) -> None:
        """Note samples that a step was taken on."""

    def _overdue(self):
        return self._due is not None and time.monotonic() > self._due


class Sequential(Rounds):
    """Clients take turns; each gets the head that the one before handed on. A round is one client's turn."""

    def __init__(self, head, clients, rounds, deadline=300.0):
        super().__init__(head, clients, rounds, deadline)
        self._holder, self._snapshot, self._turn = None, None, 0

    def tail_for(self, name: str) -> Tail:
        """One tail, whoever's turn it is."""
        return self.tail

    def begin(self, tail: Tail, checkpoints: Checkpoints | None) -> None:
        super().begin(tail, checkpoints)
        self._turn = self.number
        self._due = time.monotonic() + self.deadline

    @property
    def _next(self):
        return self.members[self._turn % len(self.members)]

    def _may_join(self, name):
        return self._holder in (None, name) and self._next == name

    def _enter(self, slot):
        self._drop()  # who holds the turn already begins it again
        self._snapshot = copy.deepcopy(self.tail.state_dict())
        self._holder, self._due = slot.name, time.monotonic() + self.deadline

    def _expire(self):
        """Who holds the turn too long, or does not take it, loses it."""
        if self.finished or not self._overdue():
            return
        late = self._holder or self._next
        self._drop()
        self._missing.add(late)
        self.history.append((self.number, [], [late]))
        self._pass_on()

    def _drop(self):
        if self._holder:
            self.tail.load_state_dict(self._snapshot)
        self._holder = self._snapshot = None

    def _pass_on(self):
        self._turn += 1
        while self._next in self._missing and len(self._missing) < len(self.members):
            self._turn += 1
        self._due = time.monotonic() + self.deadline
        self._wake()

    def restarted(self, slot: Slot) -> None:
        """The slot's client has lost its state: its turn begins again."""
        if self._holder == slot.name:
            self._drop()

    def check_turn(self, slot: Slot, training: bool) -> None:
        self._expire()
        if self._holder != slot.name and (training or not self.finished):
            raise RoundOver(f"it is not {slot.name}'s turn any more")

    def hand_in(self, slot: Slot, frame: Frame) -> None:
        """End the turn with the head that the next client begins with."""
        self.check_turn(slot, training=True)
        head = wire.read_weights(frame.body, self.head)
        self._close_round([slot.name], self._missing, head, self.tail.state_dict())
        self._holder = self._snapshot = None
        self._pass_on()


class SplitFed(Rounds):
    """Clients train side by side, each with a tail of its own at the server; after a round both halves are averaged.

    SplitFed version 1 (Thapa et al., arXiv 2004.12088): averages are weighted by the samples
    trained on and do not depend on who was faster. Momentum stays with its client.
    """

    def __init__(self, head, clients, rounds, deadline=300.0):
        super().__init__(head, clients, rounds, deadline)
        self._working = {}  # name: samples trained on in this round
        self._handed_in = {}  # name: (samples, head, tail)

    def tail_for(self, name: str) -> Tail:
        return self.tail.copy()

    def _may_join(self, name):
        return name not in self._handed_in

    def _enter(self, slot):
        slot.tail.model.load_state_dict(self.tail.model.state_dict())
        self._working[slot.name] = 0
        self._due = self._due or time.monotonic() + self.deadline

    def _expire(self):
        """Once the deadline is over, those who have handed in go on without the rest."""
        if self._overdue() and self._handed_in:
            self._average()

    def restarted(self, slot: Slot) -> None:
        """The slot's client has lost its state: it joins again, with a fresh optimizer on this side too."""
        self._working.pop(slot.name, None)
        slot.tail = self.tail_for(slot.name)

    def check_turn(self, slot: Slot, training: bool) -> None:
        self._expire()
        if slot.name not in self._working and (training or not self.finished):
            raise RoundOver(f"round {self.number} began without {slot.name}")

    def count(self, slot: Slot, samples: int) -> None:
        """Note samples that a step was taken on: the client's weight in the average."""
        if slot.name in self._working:
            self._working[slot.name] += samples

    def hand_in(self, slot: Slot, frame: Frame) -> None:
        """One client's result; the last one expected closes the round."""
        self.check_turn(slot, training=True)
        head = wire.read_weights(frame.body, self.head)
        tail = {name: tensor.detach().cpu().clone() for name, tensor in slot.tail.model.state_dict().items()}
        self._handed_in[slot.name] = (self._working[slot.name], head, tail)
        try:
            if set(self._handed_in) >= set(self.members) - self._missing:
                self._average()
        except BaseException:
            del self._handed_in[slot.name]
            raise
        self._working.pop(slot.name, None)

    def _average(self):
        counted = {name: part for name, part in sorted(self._handed_in.items()) if part[0] > 0}
        missing = set(self.members) - set(self._handed_in)
        head, tail = self.head, self.tail.state_dict()
        if counted:
            weights = [part[0] for part in counted.values()]
            head = weighted_mean([part[1] for part in counted.values()], weights)
            tail["model"] = weighted_mean([part[2] for part in counted.values()], weights)
        self._close_round(counted, missing, head, tail)
        self.tail.model.load_state_dict(tail["model"])
        self._missing, self._working, self._handed_in = missing, {}, {}
        self._wake()


def weighted_mean(states, weights):
    """The mean of state dicts, added in double precision and the given order; of integers the largest."""
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(
                state[name].double() * (weight / sum(weights)) for state, weight in zip(states, weights, strict=True)
            )
            mean[name] = total.to(first.dtype)
        else:
            mean[name] = torch.stack([state[name] for state in states]).amax(0)
    return mean
