"""What ranks remember goes on when they become others, or more, or fewer, or when the plan changes.

What is missing from a mean is the mean of the ranks' residuals, and from a sum their sum. So memory is added up over
the ranks that were; then every rank that is takes the same part of it, and the owners of pieces take their pieces.
"""

import io
import re

import torch

from ..errors import ConfigError
from ..feedback import EstimateFeedback, new_memory, second_memory
from ..packing import u32_bytes, unpack_bits
from .engine import result


def memory_sums(exchange, saved):
    """What a rank's state holds (zeros if it is None), a float32 vector for each kind and parameter.

    "residual/NAME", with momentum correction "velocity/NAME", and "owner/NAME" for the residuals of
    the owners of pieces. All ranks of one model and policy have the same keys, so that they can be added.
    """
    return sums_of(exchange.policy, {name: entry.numel for name, entry in exchange.plan.entries.items()}, saved)


def sums_of(policy, sizes, saved):
    """`memory_sums` for a policy and {parameter: entries}."""
    feedback, shares = new_memory(policy), shares_of(saved, sizes) if saved is not None else {}
    own, tensors = {name: stop - start for name, (start, stop) in shares.items()}, {}
    if feedback and saved is not None:
        tensors = feedback.vectors_of(feedback.checked(saved["feedback"], own))
    device = next((tensor.device for values in tensors.values() for tensor in values.values()), None)
    vectors, kinds = {}, (*(feedback.kinds if feedback else ()), "owner")
    for name, numel in sizes.items():
        compressor = policy.compressor_for(name, numel)
        if compressor and policy.feedback_for(compressor):
            vectors.update({f"{kind}/{name}": torch.zeros(numel, device=device) for kind in kinds})
    if saved is None:
        return vectors
    for kind, values in tensors.items():
        for name, tensor in values.items():
            vectors[f"{kind}/{name}"] = _whole(tensor, shares[name], sizes[name], saved.get("local_size", 1))
    owners = second_memory(policy).memories["residual"]
    for key, residual in owners.vectors_of(owners.checked("owner's residual", saved["owner_feedback"])).items():
        name, start, stop = _piece_of(key)
        if f"owner/{name}" not in vectors or not 0 <= start < stop <= sizes[name] or residual.numel() != stop - start:
            raise ConfigError(f"owner's residual: got {key!r}, expected a piece of one of the policy's parameters")
        vectors[f"owner/{name}"][start:stop] = residual
    return vectors


def _whole(tensor, share, numel, local_size):
    """What is remembered of a share stands for as much on each rank of the node, whose mean was encoded."""
    if tensor.numel() == numel and local_size == 1:
        return tensor
    vector = tensor.new_zeros(numel)
    torch.mul(tensor, local_size, out=vector[slice(*share)])
    return vector


def shares_of(saved, sizes):
    """{parameter: (start, stop)} of what a rank's state is about; ConfigError if they are none of {name: entries}."""
    shares, local_size = saved.get("shares"), saved.get("local_size", 1)
    if shares is None:
        return {name: (0, numel) for name, numel in sizes.items()}
    if type(local_size) is not int or local_size < 1 or not isinstance(shares, dict):
        raise ConfigError(f"state: got shares {type(shares).__name__} of local_size={local_size!r}")
    for name, share in shares.items():
        fine = isinstance(share, (list, tuple)) and len(share) == 2 and all(type(edge) is int for edge in share)
        if not fine or not 0 <= share[0] < share[1] <= sizes.get(name, 0):
            raise ConfigError(f"state: got the share {share!r} of {name!r}, expected (start, stop) of a parameter")
    return {name: tuple(share) for name, share in shares.items()}


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
    parts = ranks if exchange.average else exchange.engine.world_size()
    kinds = {kind: {} for kind in (exchange.feedback.kinds if exchange.feedback else ())}
    pieces = {}
    for key, vector in sums.items():
        kind, _, name = key.partition("/")
        if kind in kinds:
            kinds[kind][name] = vector / parts
    for name, entry in exchange.plan.entries.items():
        owner = sums.get(f"owner/{name}")
        if owner is None:
            continue
        if isinstance(exchange.feedback, EstimateFeedback):  # what was delivered is the mean of the present estimates
            total = sums[f"residual/{name}"] / (-ranks if exchange.average else -1)
            kinds["delivered"][name] = total - owner if entry.summed_pieces else total
        elif not entry.summed_pieces:  # it no longer travels by two phases
            kinds["residual"][name] += owner if exchange.average else owner / parts
        pieces.update(_own_pieces(exchange, name, owner))
    shares = own_shares(exchange)
    if exchange.plan.by_nodes:
        for kind, vectors in kinds.items():
            own = {name: share for name, share in shares.items() if name in vectors}
            kinds[kind] = {name: vectors[name][slice(*share)].clone() for name, share in own.items()}
    if exchange.feedback:
        exchange.feedback.load_vectors(kinds)
    exchange.owner_feedback.load_vectors({"residual": pieces})
    exchange.memories.load({name: dict(memory) for name, memory in memories.items() if name in shares})
    exchange.steps = steps


def replan(exchange, shapes):
    """Plan other parameters, on all ranks between the same steps.

    The residuals of pieces go to their new owners, and by nodes what a rank remembers of a share to the rank of its
    node that has the share then.
    """
    # As if of nodes of one rank: what is remembered of a share stays as it is.
    sums = memory_sums(exchange, {**exchange.state_dict(), "local_size": 1})
    by_nodes = exchange.plan.by_nodes
    if by_nodes:
        device = next((vector.device for vector in sums.values()), torch.device("cpu"))
        memories = memories_of_node(exchange, exchange.memories.values(), device)
    exchange.prepare(shapes)
    if by_nodes:
        _take_shares(exchange, sums, memories)
    pieces = {}
    for name, entry in exchange.plan.entries.items():
        if f"owner/{name}" not in sums or not entry.summed_pieces:
            continue
        adding = exchange.engine.allreduce(f"replan.{name}", 0, sums[f"owner/{name}"], "sum")
        owner = result(adding, f"the owners' residuals of {name}")
        pieces.update(_own_pieces(exchange, name, owner))
    exchange.owner_feedback.load_vectors({"residual": pieces})


def _take_shares(exchange, vectors, memories):
    """Let this rank take its shares of what its node remembers.

    Args:
        exchange: by nodes, with the new plan.
        vectors: {name: this rank's} as of `memory_sums`, zero outside of the shares that it had.
        memories: as of `memories_of_node`.
    """
    shares, kinds = own_shares(exchange), {kind: {} for kind in (exchange.feedback.kinds if exchange.feedback else ())}
    for key, vector in vectors.items():
        kind, _, name = key.partition("/")
        if kind in kinds:
            adding = exchange.engine.local.allreduce(f"replan.{key}", 0, vector, "sum")
            total = result(adding, f"what the ranks of this node remember of {name}")
            if name in shares:
                kinds[kind][name] = total[slice(*shares[name])].clone()
    if exchange.feedback:
        exchange.feedback.load_vectors(kinds)
    exchange.memories.load({name: memory for name, memory in memories.items() if name in shares})


def memories_of_node(exchange, memories, device):
    """What all ranks of this node have learned, {name: memory}: each has it of other parameters, as its peers do."""
    file = io.BytesIO()
    torch.save(memories, file)
    own = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(device)
    engine, what = exchange.engine.local, "what the ranks of this node remember"
    length, four = u32_bytes(own.numel(), device), [4] * engine.world_size()
    sizes = unpack_bits(result(engine.allgather("state.sizes", 0, length, four), what), len(four), 32).tolist()
    parts = result(engine.allgather("state.memories", 0, own, sizes), what).split(sizes)
    loaded = [torch.load(io.BytesIO(part.cpu().numpy().tobytes()), weights_only=True) for part in parts]
    return {name: memory for each in loaded for name, memory in each.items()}


def _own_pieces(exchange, name, owner):
    """{key: residual} of this rank's pieces, from the residuals of all owners of a parameter."""
    pieces = exchange.plan.owned(name, exchange.engine.rank())
    return {piece.key(name): owner[piece.start : piece.stop].clone() for piece in pieces}


def own_shares(exchange):
    """{parameter: (start, stop)} of the entries that this rank encodes and remembers; of a flat exchange all."""
    rank = exchange.engine.rank() if exchange.engine else 0
    shares = {name: exchange.plan.share(name, rank) for name in (exchange.plan.entries if exchange.plan else ())}
    return {name: (start, stop) for name, (start, stop) in shares.items() if start < stop}
