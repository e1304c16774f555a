"""What an OuterOptimizer saves, of one rank or of all together, and what it takes back.

A state is a dict:
    settings            every, fragments, delay
    counts              inner steps, rounds, and the step at which each fragment was sent last
    anchors, velocities {name: tensor}, the same on all ranks
    exchange            what is remembered (gcompress/exchange/saved_state.py)
Of one rank, besides:
    optimizer           the inner optimizer's state
    under_way           a Round as a dict, with the mean change, or None
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..checks import shown
from ..errors import ConfigError
from ..exchange import saved_state

if TYPE_CHECKING:
    from .outer_optimizer import OuterOptimizer


def of_rank(outer: OuterOptimizer) -> dict:
    """`OuterOptimizer.state_dict`."""
    outer.receive()
    current = outer.under_way
    return {
        **_common(outer),
        "optimizer": outer.optimizer.state_dict(),
        "exchange": outer.exchange.state_dict(),
        "under_way": dataclasses.asdict(dataclasses.replace(current, means=None)) if current else None,
    }


@torch.no_grad()
def of_all_ranks(outer: OuterOptimizer) -> dict:
    """`OuterOptimizer.full_state_dict`: with what is under way, as if it had been applied."""
    outer.receive()
    state, current = _common(outer), outer.under_way
    if current is not None and current.change is not None:
        for name, change in current.change.items():
            anchor = state["anchors"][name]
            outer.move(name, anchor, change.to(anchor.device, copy=True), state["velocities"])
        state["counts"][1] += 1
    return {**state, "exchange": outer.exchange.full_state_dict()}


def _common(outer):
    return {
        "settings": {"every": outer.every, "fragments": len(outer.fragments), "delay": outer.delay},
        "counts": outer.counts,
        "anchors": {name: anchor.clone() for name, anchor in outer.anchors.items()},
        "velocities": {name: velocity.clone() for name, velocity in outer.velocities.items()},
    }


def load(outer: OuterOptimizer, state: dict) -> None:
    """`OuterOptimizer.load_state_dict`: everything is checked before anything changes."""
    _check(outer, state)
    outer.exchange.load_state_dict(state["exchange"])
    _put(outer, state)
    if "optimizer" not in state:
        outer.restart(outer.anchors)


def put_back(outer: OuterOptimizer, state: dict) -> None:
    """Return to what `of_rank` gave in this process, after the engine has failed."""
    outer.exchange.abandon_step()
    saved_state.put_back(outer.exchange, state["exchange"])
    _put(outer, state)


def _put(outer, state):
    if "optimizer" in state:
        outer.optimizer.load_state_dict(state["optimizer"])
    outer.counts = list(state["counts"])
    for name, anchor in outer.anchors.items():
        anchor.copy_(state["anchors"][name])
    outer.velocities = {
        name: velocity.to(outer.anchors[name], copy=True) for name, velocity in state["velocities"].items()
    }
    outer.resume_round(state.get("under_way"))


def _check(outer, state):
    expected = _common(outer)
    if not isinstance(state, dict) or not {*expected, "exchange"} <= set(state):
        raise ConfigError(f"state: got {shown(state)}, expected what state_dict() or full_state_dict() returned")
    if state["settings"] != expected["settings"]:
        raise ConfigError(f"state: it is of {shown(state['settings'])}, this run uses {expected['settings']}")
    counts = state["counts"]
    if not isinstance(counts, list) or len(counts) != len(outer.counts) or not all(_is_count(each) for each in counts):
        raise ConfigError(f"state: got counts={shown(counts)}, expected {len(outer.counts)} integers of at least 0")
    for kind in ("anchors", "velocities"):
        _check_tensors(outer, kind, state[kind])
    missing = [name for name in outer.anchors if name not in state["anchors"]]
    if missing:
        raise ConfigError(f"state: it has no anchor of {missing[0]!r}: it is of another model")
    if "optimizer" in state:
        _check_inner(outer, state["optimizer"])
    current = state.get("under_way")
    if current:
        _check_round(outer, current)


def _check_round(outer, current):
    """Of a Round as a dict, whose mean change is there; one is under way only where there is a delay."""
    fields = {"fragment", "due", "sent", "means", "change"}
    if not isinstance(current, dict) or set(current) != fields or not _is_count(current["due"]):
        raise ConfigError(f"state: got under_way={shown(current)}, expected an exchange or None")
    number = current["fragment"]
    if not _is_count(number) or number >= len(outer.fragments):
        raise ConfigError(f"state: got the fragment {shown(number)}, expected 0 to {len(outer.fragments) - 1}")
    for kind in ("change", "sent"):
        _check_tensors(outer, kind, current[kind])
        if set(current[kind]) != set(outer.fragments[number]):
            raise ConfigError(f"state: its {kind} is not of the tensors of fragment {number}")


def _check_tensors(outer, kind, tensors):
    if not isinstance(tensors, dict):
        raise ConfigError(f"state: got {kind} {shown(tensors)}, expected tensors by name")
    for name, tensor in tensors.items():
        own = outer.anchors.get(name)
        if own is None or not isinstance(tensor, torch.Tensor) or tensor.shape != own.shape:
            raise ConfigError(f"state: got {kind} of {name!r}, which is none of this model's tensors")
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"state: got {kind} of {name!r} that are not finite")


def _check_inner(outer, state):
    groups = state.get("param_groups") if isinstance(state, dict) else None
    own = [len(group["params"]) for group in outer.optimizer.param_groups]
    if groups is None or [len(group["params"]) for group in groups] != own:
        raise ConfigError(f"state: its optimizer has other parameter groups than this one, which has {own} parameters")


def _is_count(value):
    return type(value) is int and value >= 0
