"""Memory that changes when a step is applied, not when it was computed.

A gradient that was exchanged may never reach the weights: a loss scaler skips the step, the
script throws the gradient away, another rank's gradient was not finite. So what an exchange
wants to remember is only proposed at first. `apply` makes it the memory once the weights have
changed; `discard` leaves the memory as it was. Both values are held in between, which costs a
second copy of what is remembered. The tensor that is given up in either case is written anew in the
next step (`spare`), so that a steady step allocates none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .errors import ConfigError


class Memory:
    """Values by name, each of which changes in two moves: `put` proposes, `apply` makes it so.

    Values that are 1-D float32 tensors may be kept in another form: see residual_types.py.

    Args:
        at_once: apply every value as it is put, for a loop that uses all it exchanges.
    """

    in_place = True  # whether `opened` gives tensors that stay apart from those of other names
    salt: object = 0  # of the seeds of a form that rounds at random; by it ranks round differently

    def __init__(self, at_once=False):
        self._at_once = at_once
        self._values, self._proposed, self._carried = {}, {}, set()
        self._spare = {}  # by name, once `spare` was asked for it: a tensor that holds nothing any more, or None

    def spare(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the form of `like`, its contents undefined, for the next value of `name`."""
        found, self._spare[name] = self._spare.get(name), None
        if found is not None and found.shape == like.shape and found.device == like.device:
            return found
        return torch.empty_like(like)

    def give_back(self, name: str, value: object) -> None:
        """Let `spare` have a tensor of `name` that nobody else holds."""
        if name in self._spare:
            self._spare[name] = value

    def get(self, name, default=None):
        """The value of `name`; what was proposed for it if that was carried on."""
        if name in self._carried and name in self._proposed:
            return self._proposed[name]
        return self._values.get(name, default)

    def latest(self, name):
        """What was proposed last, or else the value, or None."""
        return self._proposed.get(name, self._values.get(name))

    def opened(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(The value or None, where the next one is to be written), on the device of `like`.

        Raises:
            ConfigError: the value has another number of entries than `like`.
        """
        found, fresh = self.get(name), self.spare(name, like)
        if found is None:
            return None, fresh
        check_same(name, found.numel(), like)
        # One that was loaded may lie elsewhere.
        return found if found.device == like.device else found.to(like.device), fresh

    def put(self, name: str, value: Any, poisoned: torch.Tensor | None = None) -> None:
        """Propose a value. The one before stays as it is: do not change it in place.

        poisoned: of one entry on the value's device: if not 0, the value is the one before (see `Lost` of feedback.py).
        """
        values = self._values if self._at_once else self._proposed
        self.give_back(name, values.get(name))
        values[name] = value

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add a tensor to the one that was put last, or put it if there was none."""
        latest = self.latest(name)
        self.put(name, values if latest is None else latest + values)

    def apply(self, names: Iterable[str] | None = None) -> None:
        """Make the proposed values of these names (default: of all) the memory."""
        for name in list(self._proposed) if names is None else names:
            if name in self._proposed:
                self.give_back(name, self._values.get(name))
                self._values[name] = self._proposed.pop(name)
            self._carried.discard(name)

    def discard(self, names: Iterable[str] | None = None) -> None:
        """Forget the proposed values of these names (default: of all)."""
        for name in list(self._proposed) if names is None else names:
            self.give_back(name, self._proposed.pop(name, None))
            self._carried.discard(name)

    def carry_on(self, name: str) -> None:
        """Let the next exchange of `name` begin from what is proposed: its gradient contains the last result."""
        self._carried.add(name)

    def drop(self, matches) -> None:
        """Drop what has a name for which `matches` is true."""
        for values in (self._values, self._proposed, self._spare):
            for name in [name for name in values if matches(name)]:
                del values[name]

    def values(self) -> dict:
        """{name: value} of what is applied; not copies: tensors hold something else once a later step is applied."""
        return dict(self._values)

    def value(self, name: str) -> torch.Tensor | None:
        """The value that is applied, float32, or None."""
        return self.values().get(name)

    def saved(self) -> dict[str, torch.Tensor]:
        """{name: copy} of what is applied, as `load` takes it."""
        return {name: value.clone() for name, value in self.values().items()}

    def saved_one(self, name: str, proposed: bool = False) -> torch.Tensor | None:
        """A copy, as in `saved`, of one value; proposed: of the one that is proposed, if one is."""
        found = self.latest(name) if proposed else self.values().get(name)
        return None if found is None else found.clone()

    def load(self, values: dict) -> None:
        """Replace everything by these applied values, which are its own from then on."""
        self.discard()
        self._values = dict(values)

    def load_one(self, name: str, saved: torch.Tensor) -> None:
        """Replace one value, of which nothing may be proposed, by what `checked` returned."""
        self._values[name] = saved

    def load_vectors(self, vectors: dict[str, torch.Tensor]) -> None:
        """Replace everything by these float32 vectors, which are its own from then on."""
        self.load(vectors)

    def vectors_of(self, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Float32 vectors of what `checked` returned."""
        return saved

    def checked(self, what: str, tensors: dict, sizes: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
        """See `checked_copies`."""
        return checked_copies(what, tensors, sizes)


class Scratch:
    """Float32 memory that one step after another works in."""

    def __init__(self):
        self._room = torch.empty(0)

    def floats(self, numel: int, device: torch.device) -> torch.Tensor:
        """A 1-D tensor, its contents undefined: the caller's until the next call."""
        if self._room.numel() < numel or self._room.device != device:
            self._room = torch.empty(numel, device=device)
        return self._room[:numel]


def checked_copies(what, tensors, sizes=None):
    """Copies of the 1-D float32 tensors of a saved {name: tensor}.

    Args:
        what: "residual" or the like, for errors.
        tensors: from a file: anything may be in it.
        sizes: {name: entries} of those that may be there; None: any.

    Raises:
        ConfigError: one is not such a tensor, is not finite, or is none of `sizes`.
    """
    check_dict(what, tensors)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.dtype != torch.float32:
            raise ConfigError(f"{what} {name!r}: got {type(tensor).__name__}, expected a 1-D float32 tensor")
        check_entries(what, name, tensor.numel(), sizes)
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{what} {name!r}: got entries that are not finite")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_same(name, numel, values):
    """ConfigError unless a gradient has as many entries as what is remembered of it."""
    if numel != values.numel():
        raise ConfigError(f"gradient {name!r}: got {values.numel()} entries, expected {numel} as before")


def check_dict(what, tensors):
    """ConfigError unless something is a dict."""
    if not isinstance(tensors, dict):
        raise ConfigError(f"{what}: got {type(tensors).__name__}, expected a dict of tensors by name")


def check_entries(what, name, numel, sizes):
    """ConfigError unless a tensor has the entries that `sizes` says; see `checked_copies`."""
    if sizes is not None and sizes.get(name) != numel:
        expected = f"{sizes[name]} entries" if name in sizes else f"one of {', '.join(map(repr, sizes)) or 'none'}"
        raise ConfigError(f"{what} {name!r}: got {numel} entries, expected {expected}")
