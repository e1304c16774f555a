"""How gradients travel by nodes: summed within the node, in shares among peers, gathered within the node.

1. Within the node: an all-to-all in float32. Every local rank gets its shares from all, and makes their mean.
2. Among peers: a share is a gradient like any other, which travels by the ways of ways.py among as many ranks as there
   are nodes. Only that leaves the node, and only that is compressed. What an encoding loses is remembered by the rank
   that has the share, in the units of a rank's gradient.
3. Within the node: an all-gather of the results in float32.

So a node is to the others what a single rank with its mean gradient would be. What is not compressed goes the same way,
with an all-reduce among peers, where the engine leaves it to us.
"""

from __future__ import annotations

import functools

import torch

from ..feedback import flat_values
from ..memory import Scratch
from .encoding_errors import add_errors
from .node_engine import PEER_ROUNDS
from .plan import Piece
from .ways import Gradient, Ways, places_of, split_rows

NOTHING = torch.empty(0)


class PeersView:
    """A rank's exchange as its ways among peers see it: shares for parameters, nodes for ranks.

    Attributes:
        absent: names of which no rank of this node has a gradient in this step.
    """

    def __init__(self, exchange):
        self._exchange, self.absent = exchange, set()

    def __getattr__(self, name):
        return getattr(self._exchange, name)  # policy, memory and counts are the exchange's

    @property
    def engine(self):
        """That of the peers."""
        return self._exchange.engine.peers

    @property
    def plan(self):
        """That of this rank's shares."""
        return self._exchange.plan.of_local[self._exchange.engine.local.rank()]

    @property
    def local_size(self):
        """How many ranks a node has."""
        return self._exchange.engine.topology.local_size

    def compressor_for(self, name, numel):
        """The whole parameter's: a policy does not know of shares."""
        return self._exchange.compressor_for(name, self._exchange.plan.entries[name].numel)


class PeerWays(Ways):
    """The ways of a rank's shares among its peers; view: of its exchange."""

    def __init__(self, view: PeersView):
        super().__init__(view)
        self.view = view

    def _factor(self):
        """What makes the wanted result of the nodes' sum of means."""
        return 1.0 / self._exchange.engine.world_size() if self._exchange.average else float(self._exchange.local_size)

    def _key_of(self, item):
        start = self._exchange.plan.offsets[item.name]
        return Piece(0, start + item.start, start + item.stop).key(item.name)

    def _seed(self, name, *what):
        return super()._seed(name, *what, f"from {self._exchange.plan.offsets[name]}")


class NodeWays(Ways):
    """The ways of one rank's exchange by nodes.

    Args:
        exchange: the GradientExchange, with a NodePlan and a NodeEngine.
    """

    def __init__(self, exchange):
        super().__init__(exchange)
        self._peers = PeerWays(PeersView(exchange))
        self._sent: dict[str, Scratch] = {}  # what goes to others of the node, by a bucket's first name
        self.in_buckets = {way: functools.partial(self._by_nodes, way) for way in ("allgather", "twophase", "summed")}

    def remembers(self, compressor, name):
        start, stop = self._exchange.plan.share(name, self._exchange.engine.rank())
        return start < stop and self._peers.remembers(compressor, name)

    def _sum(self, flat):
        what = "uncompressed gradients"
        sizes = [len(part) for part in flat.tensor_split(self._exchange.engine.topology.local_size)]
        own = yield from self._summed_within_node(flat, sizes, what)
        own = yield from self._among_peers(self._peers._sum(own))
        rows = yield from self._gathered(own, sizes, what)
        return torch.cat(rows)

    def _by_nodes(self, way, gradients):
        """The exchange of {name: Gradient}; returns {name: mean}, in their places."""
        what, places = f"gradients {', '.join(gradients)}", places_of(gradients)
        plan, local = self._exchange.plan, self._exchange.engine.local.rank()
        spans = plan.spans(gradients)
        own = yield from self._shares(gradients, spans, what)
        values = dict(zip((name for name, _, _ in spans[local]), own.split(_lengths(spans[local])), strict=True))
        shapes = plan.of_local[local].entries
        shares = {name: Gradient(share.view(shapes[name].shape), share) for name, share in values.items()}
        results = yield from self._among_peers(self._steps(way, shares))
        for name, mean in results.items():
            self._exchange.deliver(name, mean)
            if mean.data_ptr() != values[name].data_ptr():  # else it was decoded to its place
                values[name].copy_(mean)
        sizes = [sum(_lengths(each)) for each in spans]
        rows = yield from self._gathered(own, sizes, what)
        for row, each in zip(rows, spans, strict=True):
            for (name, start, stop), part in zip(each, row.split(_lengths(each)), strict=True):
                places[name][start:stop].copy_(part)
        return places

    def _steps(self, way, shares):
        """The exchange of this rank's shares, {name: Gradient}, among its peers; returns {name: mean}."""
        if not shares:
            return {}
        if self._exchange.measures_errors():
            add_errors(self._peers.view, self._peers, way, shares)
        return (yield from self._peers.in_buckets[way](shares))

    def _shares(self, gradients, spans, what):
        """Within the node: the means over its ranks of this rank's shares, one after the other, 1-D float32."""
        local_size, absent, view = len(spans), self._exchange.absent, self._peers.view
        values = {name: flat_values(each.values) for name, each in gradients.items()}
        device = next(iter(values.values())).device
        missing = torch.tensor([float(name in absent) for name in gradients], device=device)
        parts = [[*(values[name][start:stop] for name, start, stop in each), missing] for each in spans]
        sizes = [sum(map(len, each)) for each in parts]
        flat = self._sent.setdefault(next(iter(gradients)), Scratch()).floats(sum(sizes), device)
        torch.cat([part for each in parts for part in each], out=flat)
        total = yield from self._summed_within_node(flat, sizes, what)
        view.absent.difference_update(gradients)
        own, counts = total.split([len(total) - len(gradients), len(gradients)])
        if not absent.isdisjoint(gradients):  # otherwise the node has all, and no device is waited for to say so
            found = zip(gradients, counts.tolist(), strict=True)
            view.absent.update(name for name, count in found if count == local_size)
        return own.mul_(1.0 / local_size)

    def _summed_within_node(self, flat, sizes, what):
        """The sum over the node's ranks, in their order, of this rank's part of a 1-D tensor; sizes: of all parts."""
        width, own = flat.element_size(), sizes[self._exchange.engine.local.rank()]
        to, back = [width * size for size in sizes], [width * own] * len(sizes)
        self._exchange.report.within_node_bytes += flat.nbytes
        received = yield "local.alltoall", flat.view(torch.uint8), to, back
        total, *others = (row.view(flat.dtype) for row in split_rows(received, back, what))
        for other in others:
            total.add_(other)
        return total

    def _gathered(self, own, sizes, what):
        """Within the node: every rank's 1-D tensor of these sizes, of one type."""
        self._exchange.report.within_node_bytes += own.nbytes
        sizes = [own.element_size() * size for size in sizes]
        gathered = yield "local.allgather", own.contiguous().view(torch.uint8), sizes
        return [row.view(own.dtype) for row in split_rows(gathered, sizes, what)]

    def _among_peers(self, steps):
        """Run steps of an exchange among peers, and pause in the rounds that it does not need; returns its result."""
        rounds, result = 0, None
        while True:
            try:
                method, *arguments = steps.send(result)
            except StopIteration as stop:
                for _ in range(rounds, PEER_ROUNDS):
                    yield "pause", NOTHING
                return stop.value
            result = yield f"peers.{method}", *arguments
            rounds += 1


def _lengths(spans):
    return [stop - start for _, start, stop in spans]
