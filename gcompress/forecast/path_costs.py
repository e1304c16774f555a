"""What a rank's processor does in a step beside computing gradients, measured here and now."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import NamedTuple

import torch

from ..exchange.plan import Plan
from ..policy import Policy
from .mirror import MirroredPath, moment, own_clock, shortest
from .step_bytes import buckets_of, parcels_of

SAMPLE_ENTRIES = 8 << 20  # of a model's gradients that are measured
LARGEST_TENSOR = 1 << 22  # entries; of a larger one, this many are measured
GATHERED_ENTRIES = 1 << 18  # of an all-gather among many ranks, of whose payloads there is one from each
MANY_RANKS = 64  # up to which the C++ kernels add up all payloads in one call


class PathCosts(NamedTuple):
    """Seconds for an entry, by way (`Entry.exchange`).

    before: by way, those before its first operation starts, before its second, and so on.
    after: by way, those after the last one has ended.
    size: the bytes of payloads over those that `nbytes` says: 1 but where a compressor's size depends on the data.
    """

    before: dict[str, tuple[float, ...]]
    after: dict[str, float]
    size: float = 1.0

    @property
    def total(self) -> dict[str, float]:
        return {way: sum(parts) + self.after[way] for way, parts in self.before.items()}


def sampled(shapes: dict[str, torch.Size], limit: int = SAMPLE_ENTRIES, nbytes: int = 8 << 20) -> list[list[str]]:
    """Buckets of {name: shape}, spread over the model, of about `limit` entries together; at least one."""
    buckets = buckets_of(shapes, nbytes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    count = max(1, min(len(buckets), round(len(buckets) * limit / max(1, total))))
    return [buckets[(2 * number + 1) * len(buckets) // (2 * count)] for number in range(count)]


def gradients_like(shapes: dict[str, torch.Size], device: torch.device) -> dict[str, torch.Tensor]:
    """{name: tensor} as gradients are: normally distributed, of scales that differ."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        scale = 10 ** (-3 + torch.rand((), generator=generator).item())
        made[name] = torch.empty(shape).normal_(0, scale, generator=generator).to(device)
    return made


def measure_path(
    policy: Policy,
    shapes: dict[str, torch.Size],
    ranks: int,
    device: torch.device | None = None,
    repeat: int = 3,
    sample: int = SAMPLE_ENTRIES,
    beside_others: bool = False,
) -> PathCosts:
    """PathCosts of a policy for a model of {name: shape}, from `repeat` steps of a sample.

    Encoders, memory, decoders and sums over ranks are real (see MirroredPath). The rank has one thread. What counts is
    the shortest, of the time that the processor gave this thread; `beside_others`: the median, of the time that passed,
    since other ranks are measured on the same cores now and will be there in training.

    Among more than MANY_RANKS an all-gather is measured among as many and twice as many, and taken to grow on along
    that line.
    """
    device = device or torch.device("cpu")
    shapes = {name: _cut(torch.Size(shape)) for name, shape in shapes.items()}
    plan = Plan(policy, shapes, ranks)
    gathers = any(entry.exchange == "allgather" for entry in plan.entries.values())
    if not gathers or ranks <= MANY_RANKS:
        limit = min(sample, _room(ranks)) if gathers else sample
        return _measured(policy, shapes, ranks, device, repeat, limit, beside_others)
    policy = dataclasses.replace(policy, exchange="allgather") if policy.exchange == "auto" else policy
    few, many = (
        _measured(policy, shapes, count, device, repeat, _room(count), beside_others)
        for count in (MANY_RANKS, 2 * MANY_RANKS)
    )
    steps = (ranks - MANY_RANKS) / MANY_RANKS

    def grown(low, high):
        return max(low, low + steps * (high - low))

    before = {way: tuple(map(grown, parts, many.before[way])) for way, parts in few.before.items()}
    return PathCosts(before, {way: grown(after, many.after[way]) for way, after in few.after.items()}, few.size)


def _room(ranks):
    """Entries whose payloads from that many ranks take no more memory than a few hundred MB."""
    return max(GATHERED_ENTRIES, (SAMPLE_ENTRIES * 16) // ranks)


def _cut(shape):
    """The shape, or as many whole rows of it as make LARGEST_TENSOR."""
    numel = shape.numel()
    if numel <= LARGEST_TENSOR:
        return shape
    row = shape[1:].numel()
    if row > LARGEST_TENSOR:
        return torch.Size((LARGEST_TENSOR,))
    return torch.Size((LARGEST_TENSOR // row, *shape[1:]))


def _measured(policy, shapes, ranks, device, repeat, limit, beside_others):
    meter = PathMeter(policy, shapes, ranks, device, limit, beside_others)
    for _ in range(repeat):
        meter.step()
    return meter.costs()


class PathMeter:
    """Measures a policy's PathCosts step by step; see `measure_path` for the arguments.

    limit: about this many entries are measured.
    """

    def __init__(
        self,
        policy: Policy,
        shapes: dict[str, torch.Size],
        ranks: int,
        device: torch.device | None = None,
        limit: int = SAMPLE_ENTRIES,
        beside_others: bool = False,
    ):
        device = device or torch.device("cpu")
        self._typical = statistics.median if beside_others else min
        self._buckets = sampled(shapes, limit, max(1 << 20, min(8 << 20, 4 * limit)))
        names = [name for bucket in self._buckets for name in bucket]
        gradients = gradients_like({name: shapes[name] for name in names}, device)
        clock = functools.partial(moment, device) if beside_others else own_clock(device)
        self._path = MirroredPath(policy, gradients, ranks, shapes, clock)
        self._rounds: list[dict[tuple[str, int], float]] = []
        for _ in range(2):  # memory begins
            self.step()
        self._rounds.clear()

    def step(self) -> None:
        """Exchange the sample once more, by one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._rounds.append(self._timed_step())
        finally:
            torch.set_num_threads(threads)

    def costs(self) -> PathCosts:
        """Of the steps so far."""
        entries: dict[str, int] = {}
        for parcel in self._parcels():
            entries[parcel.way] = entries.get(parcel.way, 0) + parcel.entries
        keys = {key: None for spent in self._rounds for key in spent}
        typical = {(way, at): self._typical(r[way, at] for r in self._rounds) / entries[way] for way, at in keys}
        lanes = {way: max(at for found, at in keys if found == way and at >= 0) for way, _ in keys}
        before = {way: tuple(typical.get((way, lane), 0.0) for lane in range(last + 1)) for way, last in lanes.items()}
        return PathCosts(before, {way: typical.get((way, -1), 0.0) for way in lanes}, self._size())

    def _parcels(self):
        return [parcel for bucket in self._buckets for parcel in parcels_of(self._path.exchange.plan, bucket)]

    def _timed_step(self):
        """{(way, number of the operation that follows, or -1): seconds} of one step, bucket by bucket."""
        path = self._path
        path.renew()
        spent: dict[tuple[str, int], float] = {}
        for bucket in self._buckets:
            path.engine.started.clear()
            last = path.now()
            path.exchange.start_bucket({name: path.gradients[name] for name in bucket})()
            way = "allreduce"
            entries = path.exchange.plan.entries
            for name, lane, at in path.engine.started:
                first = name.removesuffix(f".{lane}") if lane else name  # a parameter's name, or WAY.NAME
                way = entries[first].exchange if first in entries else first.partition(".")[0]
                spent[way, lane] = spent.get((way, lane), 0.0) + at - last
                last = at
            spent[way, -1] = spent.get((way, -1), 0.0) + path.now() - last
        start = path.now()
        path.settle()
        share = (path.now() - start) / max(1, len(spent))
        return {key: seconds + share for key, seconds in spent.items()}

    def _size(self):
        """Bytes that were sent over those that were expected at most."""
        ranks = self._path.engine.world_size()
        expected = sum(transfer.wire(0, ranks) for parcel in self._parcels() for transfer in parcel.transfers)
        return self._path.wire_bytes() / expected if expected else 1.0


class TorchCosts(NamedTuple):
    """Seconds for an entry of what torch does to gradients itself, one thread of the processor.

    copies: DistributedDataParallel's, into its bucket and back.
    casts: {bytes of an entry on the wire: seconds} of its hooks for an all-reduce, float32 at 4, float16 at 2, and
        bfloat16 under -2.
    """

    copies: float
    casts: dict[int, float]


def measure_torch(device: torch.device | None = None, entries: int = 1 << 22, repeat: int = 5) -> TorchCosts:
    """TorchCosts of this machine."""
    device = device or torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, out = torch.randn(entries, device=device), torch.empty(entries, device=device)

        def hook(dtype):
            out.copy_(values.to(dtype).div_(2))

        clock = own_clock(device)
        copy = shortest(repeat, lambda: out.copy_(values), device, clock)
        casts = {
            4: shortest(repeat, lambda: out.div_(2), device, clock),
            2: shortest(repeat, lambda: hook(torch.float16), device, clock),
            -2: shortest(repeat, lambda: hook(torch.bfloat16), device, clock),
        }
    finally:
        torch.set_num_threads(threads)
    return TorchCosts(2 * copy / entries, {size: seconds / entries for size, seconds in casts.items()})
