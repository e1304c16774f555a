"""Several clients: they take turns (Sequential), or train side by side and are averaged (SplitFed).

A client's round counts whole or not at all. The head that the client hands in and the tail's
steps belong together: if the client is lost or late, both are dropped. A slow or lost client
delays the others by one deadline; later rounds do not wait for it until it is back.
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
POLL_SECONDS = 1.0  # between a waiting client's requests, which show that it is alive


class RoundOver(Exception):
    """The client's round goes on without it."""


class Rounds:
    """What Sequential and SplitFed share: members, the head between rounds, the deadline.

    Args:
        head: the clients' part of the model. The first round begins with its weights, and what a
            client hands in must have its names and shapes.
        clients: names of the members; no other client is let in.
        rounds: how many rounds there are.
        deadline: seconds after which a round goes on without the clients that are missing.
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
        """Called once, by the server, with its tail, which holds the weights between rounds."""
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
        """Wait until a client may join, for at most POLL_SECONDS from when it first asked."""
        with self._changed:
            left = max(0.0, since + POLL_SECONDS - time.monotonic())
            self._changed.wait_for(lambda: self.finished or self._may_join(name), left)

    def join(self, slot):
        """(finished, the head's bytes) for the client's round; None if the client must wait."""
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
        """Note that a client has finished. True if all members that still take part have."""
        self._left.add(slot.name)
        return self.finished and self._left | self._missing >= set(self.members)

    def _close_round(self, counted, missing, head, tail):
        """End a round with this head and this tail's state. Both are saved first; if that fails, nothing changes."""
        if self._checkpoints:
            self._checkpoints.save(RUN, self.number + 1, {"tail": tail, "head": head})
            self._checkpoints.prune(RUN)
        self.history.append((self.number, sorted(counted), sorted(missing)))
        self.head, self._due = head, None
        self.number += 1

    def _wake(self):
        """Make the clients that wait for their turn look again."""
        with self._changed:
            self._changed.notify_all()

    def count(self, slot: Slot, samples: int) -> None:
        """Note how many samples a step was taken on."""

    def _overdue(self):
        return self._due is not None and time.monotonic() > self._due


class Sequential(Rounds):
    """Clients take turns; each begins with the head that the one before handed in. A round is one client's turn."""

    def __init__(self, head, clients, rounds, deadline=300.0):
        super().__init__(head, clients, rounds, deadline)
        self._holder, self._snapshot, self._turn = None, None, 0

    def tail_for(self, name: str) -> Tail:
        """The same tail for every client."""
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
        self._drop()  # a client that holds the turn already begins it again
        self._snapshot = copy.deepcopy(self.tail.state_dict())
        self._holder, self._due = slot.name, time.monotonic() + self.deadline

    def _expire(self):
        """A client that holds its turn too long, or does not take it, loses it."""
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
        """The client has lost its state: its turn begins again."""
        if self._holder == slot.name:
            self._drop()

    def check_turn(self, slot: Slot, training: bool) -> None:
        self._expire()
        if self._holder != slot.name and (training or not self.finished):
            raise RoundOver(f"it is not {slot.name}'s turn any more")

    def hand_in(self, slot: Slot, frame: Frame) -> None:
        """End the turn; the next client begins with the head that was handed in."""
        self.check_turn(slot, training=True)
        head = wire.read_weights(frame.body, self.head)
        self._close_round([slot.name], self._missing, head, self.tail.state_dict())
        self._holder = self._snapshot = None
        self._pass_on()


class SplitFed(Rounds):
    """Clients train side by side, each with its own tail at the server. After a round both halves are averaged.

    SplitFed version 1 (Thapa et al., arXiv 2004.12088). A client's weight in the average is the
    number of samples that it trained on; the order in which clients finish does not matter. Each
    client keeps its own momentum.
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
        """After the deadline, the clients that have handed in go on without the others."""
        if self._overdue() and self._handed_in:
            self._average()

    def restarted(self, slot: Slot) -> None:
        """The client has lost its state: it must join again, and gets a new optimizer at the server, too."""
        self._working.pop(slot.name, None)
        slot.tail = self.tail_for(slot.name)

    def check_turn(self, slot: Slot, training: bool) -> None:
        self._expire()
        if slot.name not in self._working and (training or not self.finished):
            raise RoundOver(f"round {self.number} began without {slot.name}")

    def count(self, slot: Slot, samples: int) -> None:
        """Note how many samples a step was taken on: they are the client's weight in the average."""
        if slot.name in self._working:
            self._working[slot.name] += samples

    def hand_in(self, slot: Slot, frame: Frame) -> None:
        """Take one client's result. The last one that is expected ends the round."""
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
    """The weighted mean of state dicts, summed in float64 in the given order; of integers, the largest."""
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
