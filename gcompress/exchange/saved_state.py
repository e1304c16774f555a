"""What the ranks of an exchange remember, as something that can be saved.

A rank's own state goes on to the bit, on that rank, with as many ranks. All ranks' states together
(`merge_states`, or `full_state_dict` while they run) go on with any number of ranks: they hold the sums over
the ranks of each parameter's residual, velocity and owners' residuals (hand_on.py).

A state is a dict. Of one rank:
    rank, world_size    whose it is
    policy, shapes      what it fits: the policy's dict or None, {parameter: [sizes]}
    report, steps       counts
    feedback            `ErrorFeedback.state_dict()`
    owner_feedback      {"NAME[START:STOP]": residual of a piece that this rank owns}
    memories            {parameter: {key: number or tensor}} of summable compressors
    shares, local_size  of an exchange by nodes alone: {parameter: [start, stop]} that feedback is of, ranks of a node
Where a policy's `residual` is packed, a vector is uint8: entries and how often it was written (int64), and a payload.
Of all ranks: no rank, and in place of both feedbacks `sums`, {"residual/NAME", …: float32 vector}.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from ..memory import checked_copies
from ..policy import as_policy
from .engine import result
from .hand_on import memories_of_node, memory_sums, own_shares, shares_of, sums_of, take_over

if TYPE_CHECKING:
    from .exchange import GradientExchange

KEYS = ("rank", "world_size", "policy", "shapes", "report", "steps", "feedback", "owner_feedback", "memories")
MERGED_KEYS = ("world_size", "policy", "shapes", "report", "steps", "sums", "memories")


def of_rank(exchange: GradientExchange) -> dict:
    """A rank's own state: tensors (copies), numbers and strings."""
    shares = {name: list(share) for name, share in own_shares(exchange).items()}
    by_nodes = exchange.plan is not None and exchange.plan.by_nodes
    return {
        "rank": exchange.engine.rank() if exchange.engine else 0,
        "world_size": exchange.engine.world_size() if exchange.engine else 1,
        **_of_any_rank(exchange),
        "feedback": exchange.feedback.state_dict() if exchange.feedback else {},
        "owner_feedback": exchange.owner_feedback.state_dict(),
        **({"shares": shares, "local_size": _local_size(exchange)} if by_nodes else {}),
    }


def _local_size(exchange):
    topology = exchange.plan.topology if exchange.plan else None
    return topology.local_size if topology else 1


def _of_any_rank(exchange):
    return {
        "policy": exchange.policy.to_dict() if exchange.policy else None,
        "shapes": {name: list(entry.shape) for name, entry in exchange.plan.entries.items()} if exchange.plan else {},
        "report": exchange.report.counts(),
        "steps": exchange.steps,
        "memories": {name: dict(memory) for name, memory in exchange.memories.values().items()},
    }


def of_all_ranks(exchange: GradientExchange) -> dict:
    """The merged state, summed by the engine: every rank must call it, and gets the same."""
    if exchange.plan is None:
        raise ConfigError("state: nothing was planned yet, expected a call after the model's parameters are known")
    sums = memory_sums(exchange, of_rank(exchange))
    for name, vector in sums.items():
        sums[name] = result(exchange.engine.allreduce(f"state.{name}", 0, vector, "sum"), f"the ranks' sum of {name}")
    state = {"world_size": exchange.engine.world_size(), **_of_any_rank(exchange), "sums": sums}
    if not exchange.plan.by_nodes:
        return state
    device = next((vector.device for vector in sums.values()), torch.device("cpu"))
    return {**state, "memories": memories_of_node(exchange, state["memories"], device)}


class AllRanks:
    """An exchange's merged state as an object that others save and load: the same for every rank.

    For what saves one file for all ranks: `accelerator.register_for_checkpointing(exchange.all_ranks)`,
    a Lightning callback's `state_dict`, `torch.distributed.checkpoint.save({"gcompress": exchange.all_ranks})`.
    Every rank must take part in saving.
    """

    def __init__(self, exchange):
        self._exchange = exchange

    def state_dict(self) -> dict:
        """See `GradientExchange.full_state_dict`."""
        return of_all_ranks(self._exchange)

    def load_state_dict(self, saved: dict) -> None:
        """See `GradientExchange.load_state_dict`."""
        load(self._exchange, saved)


def merge_states(states: Iterable[dict]) -> dict:
    """One state of the `state_dict()`s that all ranks of a run saved, for `load_state_dict` on any number of ranks.

    Args:
        states: one of each rank, in any order, saved after the same step.

    Raises:
        ConfigError: some rank's is missing or there twice, or they are of different runs.
    """
    states = list(states)
    for saved in states:
        _check_keys(saved, KEYS)
    ranks = sorted(saved["rank"] for saved in states)
    if not states or ranks != list(range(states[0]["world_size"])):
        raise ConfigError(
            f"states: got those of ranks {ranks}, expected one of each of "
            f"{states[0]['world_size'] if states else 'at least one'} rank(s)"
        )
    first = min(states, key=lambda saved: saved["rank"])
    for key in ("world_size", "policy", "shapes", "steps"):
        if any(saved[key] != first[key] for saved in states):
            raise ConfigError(f"states: got ranks that differ in {key}, expected states of one run after one step")
    policy, sizes = as_policy(first["policy"]), _sizes(first["shapes"])
    sums: dict[str, torch.Tensor] = {}
    for saved in states:
        for name, vector in sums_of(policy, sizes, saved).items():
            sums[name] = sums[name] + vector if name in sums else vector
    shared = {key: first[key] for key in ("world_size", "policy", "shapes", "report", "steps")}
    memories = {name: memory for saved in states for name, memory in saved["memories"].items()}
    return {**shared, "sums": sums, "memories": memories}


def load(exchange: GradientExchange, saved: dict) -> None:
    """`GradientExchange.load_state_dict`: everything is checked before anything changes."""
    merged = isinstance(saved, dict) and "sums" in saved
    _check_keys(saved, MERGED_KEYS if merged else KEYS)
    if _compared(saved["policy"]) != _compared(exchange.policy):
        if exchange.chosen and exchange.report.steps == exchange.steps == 0 and saved["policy"]:
            return _load_as_saved(exchange, saved)
        policy = exchange.policy.to_dict() if exchange.policy else None
        raise ConfigError(f"policy: the saved state is of {saved['policy']}, this run uses {policy}")
    check_counts(saved)
    _check_shapes(exchange, saved["shapes"])
    memories = _checked_memories(saved["memories"], saved["shapes"])
    if merged:
        expected = memory_sums(exchange, None)
        sums = checked_copies("state", saved["sums"], {name: vector.numel() for name, vector in expected.items()})
        exchange.discard()
        take_over(exchange, {**expected, **sums}, saved["world_size"], memories, saved["steps"])
    else:
        tensors, pieces = _checked_own(exchange, saved)
        _put(exchange, tensors, pieces, memories, saved["steps"])
    exchange.report.load(saved["report"])


def _load_as_saved(exchange, saved):
    """Go on from a state with the policy that it was saved with, where "auto" chose another one this time."""
    chosen = exchange.policy
    exchange.adopt(as_policy(saved["policy"]))
    try:
        load(exchange, saved)
    except ConfigError:
        exchange.adopt(chosen)
        raise


def _compared(policy):
    """What of a policy a state must have in common with a run: how ranks lie on nodes may change."""
    return {**as_policy(policy).to_dict(), "local_size": None} if policy else None


def put_back(exchange: GradientExchange, saved: dict) -> None:
    """Return to what `of_rank` gave in this process, whatever rank it has become since."""
    feedback = exchange.feedback.checked(saved["feedback"]) if exchange.feedback else {}
    pieces = exchange.owner_feedback.checked(saved["owner_feedback"])
    _put(exchange, feedback, pieces, saved["memories"], saved["steps"])
    exchange.report.load(saved["report"])


def _put(exchange, feedback, pieces, memories, steps):
    exchange.discard()
    if exchange.feedback:
        exchange.feedback.load_tensors(feedback)
    exchange.owner_feedback.load_tensors(pieces)
    exchange.memories.load({name: dict(memory) for name, memory in memories.items()})
    exchange.steps = steps


def _check_keys(saved, keys):
    if not isinstance(saved, dict):
        raise ConfigError(f"state: got {type(saved).__name__}, expected what state_dict() returned")
    missing = [key for key in keys if key not in saved]
    if missing:
        raise ConfigError(f"state: it has no {missing[0]!r}, expected what state_dict() of this release returned")


def check_counts(saved: dict) -> None:
    """ConfigError unless a state's numbers are numbers."""
    for key, least in (("steps", 0), ("world_size", 1)):
        if type(saved[key]) is not int or saved[key] < least:
            raise ConfigError(f"state: got {key}={saved[key]!r}, expected an integer of at least {least}")
    report = saved["report"]
    if not isinstance(report, dict) or not all(isinstance(value, (int, float)) for value in report.values()):
        raise ConfigError(f"state: got the report {report!r}, expected numbers by name")


def _check_shapes(exchange, shapes):
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, (list, tuple)) and all(type(size) is int and size >= 0 for size in shape)
        for shape in shapes.values()
    ):
        raise ConfigError("state: its shapes are no lists of sizes by parameter")
    if exchange.plan is None and exchange.policy and shapes:
        if exchange.engine is None:
            raise ConfigError("state: got it before the exchange has a model, expected a call after it is bound to one")
        exchange.prepare({name: torch.Size(shape) for name, shape in shapes.items()})
    own = {name: list(entry.shape) for name, entry in exchange.plan.entries.items()} if exchange.plan else {}
    for name in [*own, *shapes]:
        if own.get(name) != shapes.get(name):
            raise ConfigError(
                f"state: got {name!r} of shape {shapes.get(name)}, expected {own.get(name)}: it is another model's"
            )


def _checked_own(exchange, saved):
    """(feedback's tensors, the owner's) of this rank's own state."""
    rank, world_size = (exchange.engine.rank(), exchange.engine.world_size()) if exchange.engine else (0, 1)
    if (saved["rank"], saved["world_size"]) != (rank, world_size):
        raise ConfigError(
            f"state: got that of rank {saved['rank']} of {saved['world_size']}, expected one that rank {rank} of "
            f"{world_size} saved; for another number of ranks merge those of all: gcompress.merge_states"
        )
    entries, shares = exchange.plan.entries if exchange.plan else {}, own_shares(exchange)
    numels = {name: entry.numel for name, entry in entries.items()}
    if exchange.plan and {n: s for n, s in shares_of(saved, numels).items() if entries[n].compressor} != {
        n: s for n, s in shares.items() if entries[n].compressor
    }:
        raise ConfigError(
            f"state: got that of a rank of nodes of {saved.get('local_size', 1)}, expected of {_local_size(exchange)}; "
            "for another topology merge those of all ranks: gcompress.merge_states"
        )
    sizes = {name: stop - start for name, (start, stop) in shares.items() if entries[name].compressor}
    tensors = exchange.feedback.checked(saved["feedback"], sizes) if exchange.feedback else {}
    owned = exchange.owned_pieces() if exchange.plan else {}
    pieces = exchange.owner_feedback.memories["residual"]
    return tensors, {"residual": pieces.checked("owner's residual", saved["owner_feedback"], owned)}


def _checked_memories(memories, shapes):
    if not isinstance(memories, dict) or not all(isinstance(memory, dict) for memory in memories.values()):
        raise ConfigError("state: memories are no dict of dicts by parameter")
    for name, memory in memories.items():
        if name not in shapes:
            raise ConfigError(f"state: got memories of {name!r}, which is none of its parameters")
        for key, value in memory.items():
            plain = isinstance(value, (bool, int, float))
            if not plain and not (isinstance(value, torch.Tensor) and bool(torch.isfinite(value).all())):
                raise ConfigError(f"state: {key!r} of {name!r} is {type(value).__name__}, expected finite numbers")
    return memories


def _sizes(shapes):
    return {name: torch.Size(shape).numel() for name, shape in shapes.items()}
