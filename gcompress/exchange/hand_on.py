"""What ranks remember goes on when they become others, or more, or fewer, or when the plan changes.

What is missing from a mean is the mean of the ranks' residuals, and from a sum their sum. So memory is added up over
the ranks that were; then every rank that is takes the same part of it, and the owners of pieces take their pieces.
"""

import re

import torch

from ..errors import ConfigError
from ..feedback import EstimateFeedback, new_memory, second_memory
from .engine import result


def memory_sums(exchange, saved):
    """What a rank's state holds (zeros if it is None), a float32 vector for each kind and parameter.

    "residual/NAME", with momentum correction "velocity/NAME", and "owner/NAME" for the residuals of
    the owners of pieces. All ranks of one model and policy have the same keys, so that they can be added.
    """
    return sums_of(exchange.policy, {name: entry.numel for name, entry in exchange.plan.entries.items()}, saved)


def sums_of(policy, sizes, saved):
    """`memory_sums` for a policy and {parameter: entries}."""
    feedback = new_memory(policy)
    tensors = {}
    if feedback and saved is not None:
        tensors = feedback.vectors_of(feedback.checked(saved["feedback"], sizes))
    device = next((tensor.device for values in tensors.values() for tensor in values.values()), None)
    vectors, kinds = {}, (*(feedback.kinds if feedback else ()), "owner")
    for name, numel in sizes.items():
        compressor = policy.compressor_for(name, numel)
        if compressor and policy.feedback_for(compressor):
            vectors.update({f"{kind}/{name}": torch.zeros(numel, device=device) for kind in kinds})
    if saved is None:
        return vectors
    for kind, values in tensors.items():
        vectors.update({f"{kind}/{name}": tensor for name, tensor in values.items()})
    owners = second_memory(policy).memories["residual"]
    for key, residual in owners.vectors_of(owners.checked("owner's residual", saved["owner_feedback"])).items():
        name, start, stop = _piece_of(key)
        if f"owner/{name}" not in vectors or not 0 <= start < stop <= sizes[name] or residual.numel() != stop - start:
            raise ConfigError(f"owner's residual: got {key!r}, expected a piece of one of the policy's parameters")
        vectors[f"owner/{name}"][start:stop] = residual
    return vectors


def _piece_of(key):
    """(parameter, start, stop) of `Piece.key`."""
    found = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", key, re.DOTALL)
    if found is None:
        raise ConfigError(f"owner's residual: got {key!r}, expected NAME[START:STOP]")
    return found[1], int(found[2]), int(found[3])


def take_over(exchange, sums, ranks, memories, steps):
    """Let this rank take its part of what `ranks` ranks remembered together, and what all of them share.

    Args:
        exchange: with a plan for the ranks that there are now.
        sums: {name: sum over the earlier ranks} as of `memory_sums`.
        ranks: how many ranks' sum that is.
        memories, steps: what all had alike.
    """
    shares = ranks if exchange.average else exchange.engine.world_size()
    kinds = {kind: {} for kind in (exchange.feedback.kinds if exchange.feedback else ())}
    pieces = {}
    for key, vector in sums.items():
        kind, _, name = key.partition("/")
        if kind in kinds:
            kinds[kind][name] = vector / shares
    for name, entry in exchange.plan.entries.items():
        owner = sums.get(f"owner/{name}")
        if owner is None:
            continue
        if isinstance(exchange.feedback, EstimateFeedback):  # what was delivered is the mean of the present estimates
            total = sums[f"residual/{name}"] / (-ranks if exchange.average else -1)
            kinds["delivered"][name] = total - owner if entry.summed_pieces else total
        elif not entry.summed_pieces:  # it no longer travels by two phases
            kinds["residual"][name] += owner if exchange.average else owner / shares
        pieces.update(_own_pieces(exchange, name, owner))
    if exchange.feedback:
        exchange.feedback.load_vectors(kinds)
    exchange.owner_feedback.load_vectors({"residual": pieces})
    exchange.memories.load({name: dict(memory) for name, memory in memories.items()})
    exchange.steps = steps


def replan(exchange, shapes):
    """Plan other parameters, on all ranks between the same steps; the residuals of pieces go to their new owners."""
    sums = memory_sums(exchange, exchange.state_dict())
    exchange.prepare(shapes)
    pieces = {}
    for name, entry in exchange.plan.entries.items():
        if f"owner/{name}" not in sums or not entry.summed_pieces:
            continue
        adding = exchange.engine.allreduce(f"replan.{name}", 0, sums[f"owner/{name}"], "sum")
        owner = result(adding, f"the owners' residuals of {name}")
        pieces.update(_own_pieces(exchange, name, owner))
    exchange.owner_feedback.load_vectors({"residual": pieces})


def _own_pieces(exchange, name, owner):
    """{key: residual} of this rank's pieces, from the residuals of all owners of a parameter."""
    rank = exchange.engine.rank()
    pieces = exchange.plan.entries[name].summed_pieces
    return {piece.key(name): owner[piece.start : piece.stop].clone() for piece in pieces if piece.owner == rank}
