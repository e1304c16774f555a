"""The step time of every method on a link, and which of them to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..checks import check_integer
from ..compressors import methods
from ..errors import ConfigError
from ..exchange.node_engine import Place, Topology, topology_of
from ..exchange.node_plan import NodePlan
from ..exchange.plan import Plan
from ..policy import Policy, as_policy
from .gloo_costs import GlooCosts, measure_gloo
from .network import Network
from .path_costs import PathCosts, TorchCosts, measure_path, measure_torch
from .step_bytes import BUCKET_BYTES, WITHIN, Transfer, buckets_of, parcels_of
from .timeline import Computing, Errand, Outcome, play

# The engine's own all-reduce: {name: bytes of an entry, -2 for bfloat16 (see TorchCosts)}.
PLAIN = {"none": 4, "bf16": -2, "fp16": 2}
# What may be advised or chosen without being asked for, from the truest on; docs/PLANNING.md says why no other is.
TRUSTED = ("quantize:bits=8", "quantize:bits=4", "mask:sparsity=0.99,bits=2", "polar:rate=1", "polar:rate=0.25")
ADVISED = (*PLAIN, *TRUSTED)
# A truer method is preferred to one that is faster by less than this.
WORTH_IT = 1.1
OTHERS = ("fp8", "mxfp4", "sign", "onebit", "qsgd:bits=4", "natural", "topk:sparsity=0.99", "eden:bits=1")


def every_method() -> list[str]:
    """What `gcompress plan` compares: plain all-reduces, and each registered method at least once."""
    found, listed = methods(), [*ADVISED, *OTHERS]
    missing = set(found) - {spec.partition(":")[0] for spec in listed}
    return [*listed, *(found[name].examples[0] for name in sorted(missing) if found[name].examples)]


def method_policy(method: str) -> Policy:
    """The Policy of "SPEC", "SPEC@EXCHANGE" or a policy's text.

    Raises:
        ConfigError: it is none of these, or not decided.
    """
    spec, at, exchange = method.partition("@")
    policy = dataclasses.replace(as_policy(spec), exchange=exchange) if at else as_policy(method)
    if policy.undecided:
        raise ConfigError(f"methods: got {method!r}, which is yet to be chosen, expected a compressor")
    return policy


class Bench:
    """Measures what forecasts are made of, each once.

    Args:
        shapes: {name: shape} of the model.
        ranks: how many there are.
        device: where gradients lie; None: the processor.
        how: other arguments of `measure_path`.
    """

    def __init__(
        self,
        shapes: dict[str, torch.Size],
        ranks: int,
        device: torch.device | None = None,
        **how: Any,
    ):
        self._shapes, self._ranks, self._device = shapes, ranks, device
        self._how = how
        self._paths: dict[tuple[Policy, int], PathCosts] = {}
        self._torch: TorchCosts | None = None
        self._gloo: GlooCosts | None = None

    def path(self, policy: Policy, ranks: int | None = None) -> PathCosts:
        """Of a policy among that many ranks (None: all), see `measure_path`."""
        key = policy, ranks or self._ranks
        if key not in self._paths:
            self._paths[key] = measure_path(policy, self._shapes, key[1], self._device, **self._how)
        return self._paths[key]

    def torch(self) -> TorchCosts:
        """Of torch's own copies and casts."""
        self._torch = self._torch or measure_torch(self._device)
        return self._torch

    def gloo(self) -> GlooCosts:
        """Of the engine."""
        self._gloo = self._gloo or measure_gloo()
        return self._gloo


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a step time depends on beside the method.

    Args:
        shapes: {name: shape} of the model, in its order.
        ranks: how many train.
        network: the link.
        computing: what a rank computes beside the exchange.
        bucket_bytes: float32 bytes of a bucket of DistributedDataParallel.
    """

    shapes: dict[str, torch.Size]
    ranks: int
    network: Network
    computing: Computing = Computing()
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self):
        check_integer("ranks", self.ranks, 1)
        check_integer("bucket_bytes", self.bucket_bytes, 1)

    def topology(self, policy: Policy) -> Topology:
        """Whether ranks that a launcher has placed on machines exchange by nodes, see docs/NODES.md."""
        local = self.network.local
        return topology_of([Place(*divmod(rank, local), local) for rank in range(self.ranks)], policy)

    def on(self, network: Network) -> Situation:
        """The same over another link."""
        return dataclasses.replace(self, network=network)


class Forecast(NamedTuple):
    """Of one method: seconds of a step, bytes that leave the rank in it, and what link and processor are busy.

    By nodes, bytes are those for other machines.
    """

    method: str
    seconds: float
    wire_bytes: float
    link_seconds: float
    codec_seconds: float


def forecast(method: str, situation: Situation, bench: Bench) -> Forecast:
    """The Forecast of a method: one of PLAIN, the engine's own all-reduce, or what `method_policy` takes."""
    policy = None if method in PLAIN else method_policy(method)
    return forecast_of(method, policy, situation, bench)


def forecast_of(label: str, policy: Policy | None, situation: Situation, bench: Bench) -> Forecast:
    """The Forecast of a decided policy; None: of the engine's own all-reduce that the label names."""
    names = buckets_of(situation.shapes, situation.bucket_bytes)
    entries = [sum(torch.Size(situation.shapes[name]).numel() for name in bucket) for bucket in names]
    network, ranks = situation.network, situation.ranks
    if policy is None:
        buckets = [[_plain(PLAIN[label], count, ranks, bench)] for count in entries]
    elif (topology := situation.topology(policy)).by_nodes:
        nodes = NodePlan(policy, situation.shapes, topology)
        costs = bench.path(_anywhere(policy), topology.nodes)
        sent = [sum(peers.wire_bytes().values()) for peers in nodes.of_local]
        peers = nodes.of_local[sent.index(max(sent))]  # the rank of a machine that has most to send
        buckets = [_errands_by_nodes(nodes, peers, bucket, costs, bench) for bucket in names]
        # It has as many peers as there are other machines, and of its machine's link what the others leave.
        share = max(sent) / sum(sent) if any(sent) else 1 / topology.local_size
        network, ranks = dataclasses.replace(network, rate=share * network.rate, local=1), topology.nodes
    else:
        plan, costs = Plan(policy, situation.shapes, ranks), bench.path(_anywhere(policy), ranks)
        buckets = [_errands(plan, bucket, costs, bench) for bucket in names]
    outcome: Outcome = play(buckets, entries, network, situation.computing, ranks)
    wire = sum(t.wire(0, ranks) for errands in buckets for errand in errands for t in errand.transfers)
    return Forecast(label, outcome.step, wire, outcome.link, outcome.codec)


def _plain(entry, count, ranks, bench):
    transfer = Transfer("allreduce", (abs(entry) * count,))
    copies, cast = bench.torch().copies * count / 2, bench.torch().casts[entry] * count
    carrying = bench.gloo().of("allreduce", entry) * transfer.wire(0, ranks)
    return Errand((transfer,), (copies + cast,), (carrying,), copies)


def _errands(plan, names, costs, bench):
    """One bucket's, of a plan."""
    ranks, errands = plan.world_size, []
    for parcel in parcels_of(plan, names):
        transfers = parcel.transfers
        if parcel.way == "allgather" and costs.size != 1:  # of a size that the data decides
            last = transfers[-1]
            transfers = (*transfers[:-1], Transfer(last.kind, tuple(round(costs.size * s) for s in last.sizes)))
        before = [parcel.entries * each for each in costs.before.get(parcel.way, (0.0,))]
        count = len(transfers)
        before = [*before[: count - 1], sum(before[count - 1 :])] + [0.0] * (count - len(before))
        copies = bench.torch().copies * parcel.entries / 2
        before[0] += copies
        carrying = tuple(bench.gloo().of(each.kind) * each.wire(0, ranks) for each in transfers)
        after = parcel.entries * costs.after.get(parcel.way, 0.0) + copies
        errands.append(Errand(transfers, tuple(before[:count]), carrying, after))
    return errands


def _anywhere(policy):
    """What is measured on one machine, whatever the policy says of machines."""
    return dataclasses.replace(policy, local_size="auto")


def _errands_by_nodes(plan, peers, names, costs, bench):
    """One bucket's, of a NodePlan and a PeersPlan of it."""
    local_size, numel = plan.topology.local_size, sum(plan.entries[name].numel for name in names)
    errands = _errands(peers, [name for name in names if name in peers.entries], costs, bench)
    plain = sum(plan.entries[name].numel for name in names if plan.entries[name].compressor is None)
    if plain or not errands:
        errands.append(_plain(PLAIN["none"], plain // local_size, plan.topology.nodes, bench))
    return [_within(errand, numel / len(errands), local_size, bench) for errand in errands]


def _within(errand, entries, local_size, bench):
    """An errand among peers between an all-to-all and an all-gather of that many float32 entries within a machine."""
    copy, others = bench.torch().copies / 2 * entries, 4 * entries * (local_size - 1) / local_size
    transfer = Transfer(WITHIN, (round(others),))
    # Into what is sent and DistributedDataParallel's bucket; the sum over the machine's ranks; and back.
    first, *before = errand.before
    return Errand(
        (transfer, *errand.transfers, transfer),
        (2 * copy, copy + first, *before, errand.after),
        (bench.gloo().of("alltoall") * others, *errand.carrying, bench.gloo().of("allgather") * others),
        2 * copy,
    )


def truest(forecasts: Iterable[Forecast], order: Sequence[str] = ADVISED) -> Forecast:
    """Of those in `order`, the first whose step is not longer than WORTH_IT times the shortest.

    Raises:
        ConfigError: none of them is there.
    """
    found = {each.method: each for each in forecasts if each.method in order}
    if not found:
        raise ConfigError(f"methods: expected one of {', '.join(order)} among them")
    least = min(each.seconds for each in found.values())
    return next(found[name] for name in order if name in found and found[name].seconds <= WORTH_IT * least)


def code_line(method: str) -> str:
    """The line of a training script that uses a method with DistributedDataParallel."""
    if method == "none":
        return "model = torch.nn.parallel.DistributedDataParallel(model)"
    if method in PLAIN:
        hooks = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
        return f"model.register_comm_hook(None, {hooks}.{method}_compress_hook)"
    spec, _, exchange = method.partition("@")
    return f'gcompress.plugins.ddp.register(model, "{spec}{f"; exchange={exchange}" if exchange else ""}")'
