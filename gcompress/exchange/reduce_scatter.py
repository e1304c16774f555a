"""A reduce-scatter of packed gradients: the first half of a two-phase exchange (ways.py).

Every parameter belongs in rows (its first dimension) to the ranks, as FSDP shards it. Every rank encodes each owner's
rows, with error feedback; an all-to-all brings them to their owner, which decodes and adds them in float32. A rank
sends (N - 1) / N payloads. Nothing is encoded again: weights, not means, go back to the ranks (differences.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from .. import packing
from ..compressors import Compressor
from ..errors import ConfigError
from ..policy import as_policy
from .exchange import Bucket, GradientExchange, place_of
from .plan import Piece, Plan
from .scaling import unscaled
from .ways import Gradient, Ways, check_used, places_of, split_rows, values_of


class ScatterPlan(Plan):
    """The plan of parameters that are cut by rows: rank r owns the r-th of torch.chunk's chunks of each.

    Args: see `Plan`.
    """

    reference, reference_rounds = "reduce-scatter", 1

    def _cut(self):
        for entry in self.entries.values():
            entry.exchange = "scatter"
            rows, row = entry.shape[0], entry.shape[1:].numel()
            chunk = -(-rows // self.world_size)
            borders = [(min(rank * chunk, rows), min((rank + 1) * chunk, rows)) for rank in range(self.world_size)]
            pieces = [Piece(owner, start * row, stop * row) for owner, (start, stop) in enumerate(borders)]
            entry.pieces = tuple(piece for piece in pieces if piece.numel)


class ScatterWays(Ways):
    """The one way of one rank's reduce-scatter."""

    def reduce_scatter(self, gradients, factor):
        """All-to-all of {name: Gradient}; returns {name: sum over ranks of this rank's rows, times a factor}.

        A Gradient's values are the whole parameter's, its place is for this rank's rows.
        """
        world_size, rank = self._exchange.engine.world_size(), self._exchange.engine.rank()
        entries = self._exchange.plan.entries
        coded = {name: each for name, each in gradients.items() if entries[name].compressor}
        plain = {name: each for name, each in gradients.items() if not entries[name].compressor}
        route, what = self._route(coded, True), f"gradients {', '.join(gradients)}"
        parts = self._encoded(route, coded, plain)
        sizes = [part.numel() for part in parts]
        numel = sum(entries[name].numel for name in gradients)
        self._exchange.report.add_reduce_scatter(numel, sum(sizes), sizes[rank], world_size)
        received = yield "alltoall", torch.cat(parts), sizes, [sizes[rank]] * world_size
        rows = split_rows(received, [sizes[rank]] * world_size, what)
        rows = self._decoded(route, coded, rows, factor)
        for each in plain.values():
            rows = _added(each.place, rows, factor)
        check_used(rows, what)
        return places_of(gradients)

    def _encoded(self, route, coded, plain):
        """What goes to each owner: the payloads of its rows, then the rows that are not compressed, as float32."""
        rank, world_size = self._exchange.engine.rank(), self._exchange.engine.world_size()
        parts = [[] for _ in range(world_size)]
        if coded:
            coder = self._coder(route, route.items, coded)
            seed_of = functools.partial(self._seed_of, rank)
            packed = coder.encode(values_of(coded), self._memory_of, seed_of).split(route.sizes)
            parts = [[payload] for payload in packed]
        for name, each in plain.items():
            values = packing.to_type(each.values.detach().reshape(-1), torch.float32)
            for piece in self._exchange.plan.entries[name].pieces:
                parts[piece.owner].append(packing.float_to_bytes(values[piece.start : piece.stop]))
        like = next(iter({**coded, **plain}.values())).values
        return [torch.cat(part) if part else like.new_empty(0, dtype=torch.uint8) for part in parts]

    def _seed_of(self, rank, item):
        return self._seed(item.name, rank, item.start)

    def _decoded(self, route, coded, rows, factor):
        """Decode the sums of this rank's compressed rows to their places; returns what follows in the payloads."""
        rank = self._exchange.engine.rank()
        items = [item._replace(start=0, stop=item.numel) for item in route.owned[rank]]
        if not items:
            return rows
        size = route.sizes[rank]
        rest = [row[size:] for row in rows]
        if rest[0].numel():  # what decodes all ranks' payloads by one call has them one behind the other
            rows = torch.cat([row[:size] for row in rows]).split(size)
        check_used(self._coder(route, items, coded).decode_sum(rows, factor, places_of(coded)), "gradients")
        return rest


def _added(place, rows, factor):
    """Add up to `place` what starts the rows as float32, times a factor; returns what follows."""
    size = 4 * place.numel()
    for number, row in enumerate(rows):
        values = packing.bytes_to_float(row[:size])
        place.add_(values) if number else place.copy_(values)
    if factor != 1.0:
        place.mul_(factor)
    return [row[size:] for row in rows]


class ScatterExchange(GradientExchange):
    """One rank's side of the reduce-scatter of a model's gradients: policy, memory, report.

    Residuals have the whole parameter's size on every rank, since every rank computes whole gradients.

    Args: see `GradientExchange`.

    Raises:
        ConfigError: the policy asks for what a reduce-scatter cannot: another exchange, compressors whose payloads
            differ in size, EF21's estimates, or means over senders.
    """

    _plan_type = ScatterPlan

    def __init__(self, policy, engine=None, *, scaler=None):
        super().__init__(_checked(as_policy(policy)), engine, scaler=scaler)
        self._ways = ScatterWays(self)

    def start_rows(
        self,
        gradients: dict[str, torch.Tensor],
        rows: dict[str, torch.Tensor],
        *,
        factor: float,
        absent: Iterable[str] = (),
    ) -> Bucket:
        """Encode and send all of {name: gradient}; what is sent may be written over when this returns.

        Args:
            gradients: whole parameters', of the shapes that were planned; they may carry the loss scale.
            rows: {name: where the result for this rank's rows goes}. Written to at once where contiguous float32.
            factor: of the results; 1 / N for the mean.
            absent: names of which this rank has no gradient: theirs are zero, and memory is left alone.

        Returns a function that waits and returns {name: sum over ranks of this rank's rows, times the factor}.
        """
        moving, results = {}, {}
        for name, gradient in gradients.items():
            entry = self._entry(name, gradient.shape)
            scale = self._opened(name, name in absent) if entry.compressor else 1.0
            moving[name] = Gradient(unscaled(gradient, scale), place_of(rows[name]))
            results[name] = rows[name], scale, factor
        self._measure("scatter", moving)
        steps = self._ways.reduce_scatter(moving, factor)
        task = self._schedule.start(self.engine, f"scatter.{next(iter(gradients))}", steps, moving)
        self._schedule.advance(self.engine)
        return Bucket(self._schedule, self.engine, [task], self._rows_result, results)

    def _rows_result(self, name, total, rows, scale, factor):
        """The result for this rank's rows in their type, shape and scale."""
        entry = self.plan.entries[name]
        if entry.compressor:
            self._note_empty(name, total)  # a rank may own no rows, or rows whose gradient is zero
        if scale != 1.0:
            total.mul_(scale)
        result, beyond = packing.saturated(total, rows.dtype)
        if beyond is not None and entry.compressor and self._ways.remembers(entry.compressor, name):
            whole, (start, stop) = beyond.new_zeros(entry.numel), self._own_rows(entry)
            whole[start:stop] = beyond / (scale * factor)
            self.feedback.add(name, whole)
        return result.view(rows.shape)

    def _own_rows(self, entry):
        rank = self.engine.rank()
        return next(((piece.start, piece.stop) for piece in entry.pieces if piece.owner == rank), (0, 0))


def _checked(policy):
    """The policy, if a reduce-scatter can do what it says."""
    if policy.exchange not in ("auto", "twophase"):
        raise ConfigError(f"exchange: got {policy.exchange!r}, expected 'auto': gradients travel by a reduce-scatter")
    if policy.error_feedback == "ef21":
        raise ConfigError("error_feedback: got 'ef21', expected residuals: owners deliver no estimates of their own")
    if policy.mean != "ranks":
        raise ConfigError(f"mean: got {policy.mean!r}, expected 'ranks': owners get sums")
    for compressor in (each.compressor for each in (*policy.rules, policy)):
        if isinstance(compressor, Compressor) and not compressor.fixed_size:  # "auto" takes none that is not
            raise ConfigError(f"compressor: got {compressor}, expected one whose payloads have a fixed size")
    return policy
