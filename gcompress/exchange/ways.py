"""The ways in which gradients travel: all-gather, two-phase, turns, summed, and the plain all-reduce.

Each is a generator for `Schedule`: it yields the collective operation that it wants next, and is sent the result.

allgather: every rank receives every other's payload, and decodes and adds them all. One
    round, one encoding; a rank sends N - 1 payloads.
twophase: every parameter is cut into pieces, each owned by a rank, as if the ranks were each
    other's parameter servers. All-to-all: every rank sends its encoded pieces to their owners,
    which decode and add them in float32 and encode the mean again, with an error feedback of
    their own. All-gather: the owners send that to all. A rank sends 2 (N - 1) / N payloads.
turns: every parameter is cut into pieces as for two-phase, and each piece comes from one rank alone, in
    the next round from the next rank. What stands for the mean is thus a sample of it, at N times the bits that
    as many bytes give an entry when all ranks send all. What arrives is taken off every rank's memory, whoever
    sent it. That is for outer steps, in which ranks move far and much alike, so that the coder's error is larger than
    the ranks' differences. A rank sends 1 / N payload, and a byte that says whether all its values are finite.
summed: the engine's own all-reduce adds the payloads of a `summable` compressor; a bucket has one compressor.

Parameters travel in buckets. A bucket is encoded and sent as soon as its last gradient is there.
"""

import math
import zlib
from typing import NamedTuple

import torch

from .. import backends, packing
from ..compressors import Compressor
from ..errors import PayloadError
from ..feedback import NoFeedback, flat_values
from ..memory import Scratch
from ..packing import u32_bytes
from . import together
from .packed_together import PackedTogether
from .pieces import Item, OneByOne, decode_mean_of_senders
from .plan import Piece, Plan
from .summed import sum_over_ranks, summed_together


class Gradient(NamedTuple):
    """A gradient that is to travel."""

    values: torch.Tensor
    place: torch.Tensor  # where its mean is to be, 1-D float32


class Route(NamedTuple):
    """What of some gradients travels, in order; the same in every step, as long as plan and compressors are."""

    plan: Plan
    compressors: list[Compressor]  # of the gradients
    items: list[Item]
    owned: list[list[Item]]  # the same by owner, for two-phase
    sizes: list[int]  # bytes by owner; for all-gather the most that a rank sends
    coders: dict[tuple, together.Together | None]  # see `Ways._coder`


class Ways:
    """The ways of one rank's exchange.

    Args:
        exchange: the GradientExchange, whose plan, memory and report they use.
    """

    def __init__(self, exchange):
        self._exchange = exchange
        self.in_buckets = {
            "allgather": self.all_gather,
            "twophase": self.two_phase,
            "turns": self.turns,
            "summed": self.summed,
        }
        self._scratch = Scratch()
        self._routes: dict[tuple, Route] = {}  # by (whether two-phase, names)

    def all_gather(self, gradients):
        """All-gather of {name: Gradient} in one payload; returns {name: mean}, in their places."""
        world_size, rank = self._exchange.engine.world_size(), self._exchange.engine.rank()
        route = self._route(gradients, False)
        items, coder = route.items, self._coder(route, route.items, gradients)
        payload = coder.encode(values_of(gradients), self._memory_of, lambda item: self._seed(item.name, rank))
        numel, sizes = sum(item.numel for item in items), [payload.numel()] * world_size
        self._exchange.report.add_all_gather(numel, payload.numel(), world_size)
        if not all(item.compressor.fixed_size for item in items):
            lengths = yield "allgather", u32_bytes(payload.numel(), payload.device), [4] * world_size
            sizes = packing.unpack_bits(lengths, world_size, 32).tolist()
            self._check_sizes(sizes, route)
            self._exchange.report.add_all_gather(0, 4, world_size)
        gathered = yield "allgather", payload, sizes
        what, places = f"gradients {', '.join(gradients)}", places_of(gradients)
        rows = split_rows(gathered, sizes, what)
        if self._exchange.policy.mean == "senders":
            for item in items:
                rows = decode_mean_of_senders(item, rows, places[item.name], world_size * self._factor())
        else:
            rows = coder.decode_sum(rows, self._factor(), places)
        check_used(rows, what)
        return places

    def _factor(self):
        """What makes the wanted result of the ranks' sum."""
        return 1.0 / self._exchange.engine.world_size() if self._exchange.average else 1.0

    def _check_sizes(self, sizes, route):
        (most,), names = route.sizes, ", ".join(item.name for item in route.items)
        if max(sizes) > most:
            raise PayloadError(
                f"gradients {names}: a rank announces {max(sizes)} bytes, expected at most {most}: "
                "do all ranks have the same model?"
            )

    def all_reduce(self, gradients):
        """All-reduce of {name: gradient} in one tensor, float32 unless one is float64."""
        parts = [_as_real(gradient) for gradient in gradients.values()]
        exact = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        flat = flat_values if exact == torch.float32 else lambda part: part.to(exact).reshape(-1)
        total = yield from self._sum(torch.cat([flat(part) for part in parts]))
        total.mul_(self._factor())
        totals = zip(gradients.items(), total.split([part.numel() for part in parts]), strict=True)
        return {
            name: torch.view_as_complex(part.view(-1, 2)) if gradient.is_complex() else part
            for (name, gradient), part in totals
        }

    def _sum(self, flat):
        """All-reduce of a 1-D tensor."""
        self._exchange.report.add_all_reduce(flat.numel(), flat.nbytes, self._exchange.engine.world_size())
        return (yield "allreduce", flat, "sum")

    def summed(self, gradients):
        """The engine's own sums of {name: Gradient} of one compressor; returns {name: mean}, in their places."""
        world_size, steps = self._exchange.engine.world_size(), {}
        for name, (values, _) in gradients.items():
            compressor = self._exchange.compressor_for(name, values.numel())
            self._exchange.report.add_all_reduce(
                values.numel(), compressor.summed_nbytes(values.shape, world_size), world_size
            )
            steps[name] = sum_over_ranks(
                name,
                values,
                compressor,
                self._memory_for(compressor, name),
                self._exchange.memories,
                seed=self._seed(name),
                world_size=world_size,
                compared=self._exchange.error_taker(name),
            )
        totals, places = (yield from summed_together(steps)), places_of(gradients)
        for name, total in totals.items():
            torch.mul(total, self._factor(), out=places[name])
        return places

    def two_phase(self, gradients):
        """All-to-all and all-gather of {name: Gradient}; returns {name: mean}, in their places."""
        world_size, rank = self._exchange.engine.world_size(), self._exchange.engine.rank()
        route = self._route(gradients, True)
        sizes, coder = route.sizes, self._coder(route, route.items, gradients)
        self._count_two_phase(gradients, sizes)
        what, places = f"gradients {', '.join(gradients)}", places_of(gradients)
        values = values_of(gradients)
        packed = coder.encode(values, self._memory_of, lambda item: self._seed(item.name, rank, item.start))
        received = yield "alltoall", packed, sizes, [sizes[rank]] * world_size
        again = self._encoded_means(route, gradients, split_rows(received, [sizes[rank]] * world_size, what))
        gathered = yield "allgather", again, sizes
        split_rows(gathered, sizes, what)
        coder.decode(gathered.contiguous(), places)
        return places

    def turns(self, gradients):
        """All-gather of {name: Gradient}, each rank sending the pieces whose turn it is; returns {name: result}."""
        world_size, rank = self._exchange.engine.world_size(), self._exchange.engine.rank()
        route = self._route(gradients, True)
        turn = self._exchange.steps if self._exchange.turn is None else self._exchange.turn
        senders = [(number - turn) % world_size for number in range(world_size)]  # whose pieces each rank has now
        sizes = [1 + route.sizes[owner] for owner in senders]
        memories = {item.name: self._memory_of(item) for item in route.items}
        corrected = {
            name: (memories[name] or NoFeedback).corrected(name, gradient.values)
            for name, gradient in gradients.items()
        }
        payload = self._encoded_turn(corrected, route.owned[senders[rank]])
        numel = sum(self._exchange.plan.entries[name].numel for name in gradients)
        self._exchange.report.add_all_gather(numel, payload.numel(), world_size)
        gathered = yield "allgather", payload, sizes
        what, places = f"gradients {', '.join(gradients)}", places_of(gradients)
        rows = split_rows(gathered, sizes, what)
        for owner, row in zip(senders, rows, strict=True):
            OneByOne(route.owned[owner]).decode(row[1:], places)
        poisoned, factor = any(int(row[0]) for row in rows), world_size * self._factor()
        for name, place in places.items():
            if poisoned:
                place.fill_(math.nan)
            if memories[name]:
                memories[name].keep(name, corrected[name], place)
            if factor != 1:
                place.mul_(factor)
        return places

    def _encoded_turn(self, corrected, items):
        """A byte that is 0 if all that this rank has is finite, and the payload of the items of {name: 1-D float32}."""
        rank, payloads = self._exchange.engine.rank(), []
        for item in items:
            values = corrected[item.name][item.start : item.stop].view(item.shape)
            payloads.append(item.compressor.compress(values, seed=self._seed(item.name, rank, item.start))[0])
        poisoned = not all(bool(torch.isfinite(values).all()) for values in corrected.values())
        device = next(iter(corrected.values())).device
        return torch.cat([torch.full((1,), poisoned, dtype=torch.uint8, device=device), *payloads])

    def _encoded_means(self, route, gradients, rows):
        """The payload of the means (or sums) of the items that this rank owns."""
        items = route.owned[self._exchange.engine.rank()]
        longest = max((item.numel for item in items), default=0)
        return self._coder(route, items, gradients).mean(
            rows,
            self._factor(),
            self._scratch.floats(longest, rows[0].device),
            self._owner_memory_of,
            self._key_of,
            lambda item: self._seed(item.name, "mean", item.start),
        )

    def _key_of(self, item):
        """An item's name in its owner's memory."""
        return Piece(0, item.start, item.stop).key(item.name)

    def _owner_memory_of(self, item, total):
        # The residual waits if no rank had a gradient; this one having had one is enough to know otherwise.
        waits = item.name in self._exchange.absent and not bool(total.any())
        return (
            self._exchange.owner_feedback if self._exchange.policy.feedback_for(item.compressor) and not waits else None
        )

    def _route(self, gradients, cut):
        """The Route of {name: Gradient}; cut: into pieces by owner."""
        plan, key = self._exchange.plan, (cut, *gradients)
        compressors = [self._exchange.compressor_for(name, each.values.numel()) for name, each in gradients.items()]
        route = self._routes.get(key)
        if route is not None and route.plan is plan and route.compressors == compressors:
            return route
        owned: list[list[Item]] = [[] for _ in range(plan.world_size if cut else 1)]
        for (name, (values, _)), compressor in zip(gradients.items(), compressors, strict=True):
            entry, whole = plan.entries[name], Piece(0, 0, values.numel())
            for piece in entry.pieces if cut else [whole]:
                shape = entry.shape_of(piece) if cut else values.shape
                owned[piece.owner].append(Item(name, piece.start, piece.stop, shape, compressor))
        sizes = [sum(item.nbytes for item in items) for items in owned]
        items = [item for items in owned for item in items]
        self._routes[key] = Route(plan, compressors, items, owned, sizes, {})
        return self._routes[key]

    def _coder(self, route, items, gradients):
        """What codes the items, some of the Route or all: by one call where that can be, or else one by one."""
        memory, absent, world_size = self._exchange.feedback, self._exchange.absent, self._exchange.engine.world_size()
        if (
            (memory and not memory.together and not memory.packed)
            or not absent.isdisjoint(gradients)
            or not all(each.place.is_cpu for each in gradients.values())
        ):
            return OneByOne(items)
        key = backends.cpu_kernels(), items is route.items
        if key not in route.coders:
            calls = together.calls_of(items, world_size)
            made = PackedTogether if memory and memory.packed else together.Together
            route.coders[key] = made(items, calls, world_size) if calls else None
        return route.coders[key] or OneByOne(items)

    def _count_two_phase(self, names, sizes):
        world_size, own = self._exchange.engine.world_size(), sizes[self._exchange.engine.rank()]
        numel = sum(self._exchange.plan.entries[name].numel for name in names)
        self._exchange.report.add(numel, sum(sizes) + own, sum(sizes) - own + (world_size - 1) * own, world_size)

    def _memory_of(self, item):
        return self._memory_for(item.compressor, item.name)

    def _memory_for(self, compressor, name):
        return self._exchange.feedback if self.remembers(compressor, name) else None

    def remembers(self, compressor, name):
        return self._exchange.policy.feedback_for(compressor) and name not in self._exchange.absent

    def _seed(self, name, *what):
        """32 bits that differ from step to step, and for what differs."""
        again = [f"again {self._exchange.carried[name]}"] if name in self._exchange.carried else []
        return zlib.crc32("/".join(map(str, (name, self._exchange.steps, *what, *again))).encode())


def _as_real(gradient):
    """A gradient as real numbers, without its graph."""
    gradient = gradient.detach() if gradient.requires_grad else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def split_rows(tensor, sizes, what):
    """The ranks' parts of what lies one after the other."""
    if tensor.numel() != sum(sizes):
        raise PayloadError(
            f"{what}: got {tensor.numel()} bytes from {len(sizes)} ranks, expected {sum(sizes)}: "
            "do all ranks have the same model?"
        )
    return tensor.contiguous().split(sizes)


def check_used(rows, what):
    """PayloadError if a rank's payload has bytes that nothing was decoded from."""
    for rank, row in enumerate(rows):
        if row.numel():
            raise PayloadError(f"{what} from rank {rank}: {row.numel()} bytes are left over: have all the same model?")


def values_of(gradients):
    """{name: values} of {name: Gradient}."""
    return {name: gradient.values for name, gradient in gradients.items()}


def places_of(gradients):
    """{name: place} of {name: Gradient}."""
    return {name: gradient.place for name, gradient in gradients.items()}
