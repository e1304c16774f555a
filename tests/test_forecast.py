"""Step times before there are steps: bytes that are exact, laws that hold on every link, advice that says no."""

import dataclasses
import math

import pytest
import torch

from gcompress import ConfigError, Policy, as_policy
from gcompress.exchange.node_engine import Topology
from gcompress.exchange.node_plan import NodePlan
from gcompress.forecast import path_costs
from gcompress.forecast.advice import (
    ADVISED,
    PLAIN,
    TRUSTED,
    Forecast,
    Situation,
    code_line,
    every_method,
    forecast,
    forecast_of,
    method_policy,
    truest,
)
from gcompress.forecast.gloo_costs import GlooCosts, measure_gloo
from gcompress.forecast.network import Network
from gcompress.forecast.path_costs import PathCosts, TorchCosts, measure_path, sampled
from gcompress.forecast.step_bytes import buckets_of, step_bytes
from gcompress.forecast.timeline import TIME_SLICE, Computing, Errand, Transfer, play, slowest_of
from tests.local_ranks import World, run_ranks

SHAPES = {
    "a": torch.Size((40, 30)),
    "b": torch.Size((1000,)),
    "c": torch.Size((300, 700)),
    "d": torch.Size((5000,)),
    "e": torch.Size((3, 3, 64, 500)),
}
RATES = [10.0**exponent for exponent in range(6, 13)]
POLICIES = [
    "none",
    "quantize:bits=4",
    "quantize:bits=4; exchange=twophase",
    "topk:sparsity=0.99; exchange=allgather",
    "mask:sparsity=0.99,bits=2; name=c -> none",
    "randomk:sparsity=0.9; min_numel=10",
    "polar:rate=0.25; exchange=twophase; name=d -> bf16",
    "sign; exchange=turns",
]


class QuickBench:
    """Costs that were not measured: nanoseconds for an entry, the same in every run."""

    def __init__(self, shapes=None, ranks=None, device=None, nanoseconds=2.0):
        self.nanoseconds = nanoseconds

    def path(self, policy, ranks=None):
        ways = ("allgather", "twophase", "summed", "allreduce", "turns")
        return PathCosts({way: (self.nanoseconds * 1e-9,) * 2 for way in ways}, dict.fromkeys(ways, 1e-9))

    def torch(self):
        return TorchCosts(1e-10, {4: 1e-10, 2: 5e-10, -2: 4e-10})

    def gloo(self):
        return GlooCosts({4: 1e-9, 2: 2e-9, -2: 1e-9}, 1e-9, 1e-9)


def situation(rate=1e9, ranks=4, seconds=0.05, **options):
    return Situation(SHAPES, ranks, Network(rate, **options), Computing(seconds))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("text", POLICIES)
def test_bytes_are_those_that_a_real_exchange_counts(text, ranks):
    policy = as_policy(text)

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        for names in buckets_of(SHAPES, 100_000):
            exchange.start_bucket({name: torch.randn(SHAPES[name]) for name in names})()
        exchange.end_step()
        return exchange.report.sent_bytes, exchange.report.wire_bytes

    counted = run_ranks(World(ranks, in_order=True, delays=0), policy, run)
    assert counted == [step_bytes(policy, SHAPES, ranks, rank, 100_000) for rank in range(ranks)]


def test_buckets_are_those_of_distributed_data_parallel():
    shapes = {str(number): torch.Size((1000, 400)) for number in range(9)}  # 1.6 MB each
    assert buckets_of(shapes, 4_000_000) == [["8"], ["7", "6", "5"], ["4", "3", "2"], ["1", "0"]]
    assert buckets_of({"a": torch.Size((0,))}) == [["a"]]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", [*PLAIN, "quantize:bits=4", "topk:sparsity=0.99@allgather", "sign@twophase"])
def test_a_faster_link_is_never_slower(method, shared):
    seconds = [forecast(method, situation(rate, shared=shared), QuickBench()).seconds for rate in RATES]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 10 * seconds[-1]


@pytest.mark.parametrize("rate", RATES)
def test_more_bytes_are_never_faster(rate):
    """The same code at growing rates, whose processor's part is the same here."""
    methods = [f"quantize:bits={bits}@twophase" for bits in (2, 4, 8)]
    found = [forecast(method, situation(rate), QuickBench()) for method in methods]
    assert [each.wire_bytes for each in found] == sorted(each.wire_bytes for each in found)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)


def test_more_latency_more_computing_fewer_cores_and_slower_codecs_are_never_faster():
    base = situation()
    for method in ("none", "quantize:bits=4@twophase"):
        least = forecast(method, base, QuickBench()).seconds
        later = [
            forecast(method, base.on(Network(1e9, latency=0.01)), QuickBench()),
            forecast(method, dataclasses.replace(base, computing=Computing(0.3)), QuickBench()),
            forecast(method, dataclasses.replace(base, computing=Computing(0.05, share=40.0)), QuickBench()),
            forecast(method, dataclasses.replace(base, computing=Computing(0.05, jitter=0.5)), QuickBench()),
        ]
        assert all(each.seconds > least for each in later)
    quick, slow = (
        forecast("quantize:bits=4", base, QuickBench(nanoseconds=nanoseconds)).seconds for nanoseconds in (2, 200)
    )
    assert quick < slow


def test_a_step_is_never_shorter_than_its_computation_or_its_link():
    for rate in RATES:
        for method in ("none", "sign", "topk"):
            found = forecast(method, situation(rate), QuickBench())
            assert found.seconds >= max(0.05, found.link_seconds)


def test_what_the_backward_pass_hides_costs_nothing():
    """Four equal buckets, 10 ms apart, each a millisecond on the link: only the last one is waited for."""
    transfer = Transfer("allreduce", (1_000_000,))
    errand = Errand((transfer,), (0.0,), (0.0,), 0.0)
    network, ranks = Network(8e9, latency=0, efficiency=1), 2
    seconds = 0.04 / 0.6
    outcome = play([[errand]] * 4, [1] * 4, network, Computing(seconds), ranks)
    message = network.delay("allreduce", (1,), ranks)
    assert outcome.step == pytest.approx(seconds + 0.001 + message)
    assert outcome.link == pytest.approx(0.004)
    apart = play([[errand]] * 4, [1] * 4, network, Computing(0.0), ranks)
    assert apart.step == pytest.approx(0.004 + message)


def test_the_second_round_waits_for_the_first_and_its_codec():
    transfers = (Transfer("alltoall", (500_000,) * 2), Transfer("allgather", (500_000,) * 2))
    errand = Errand(transfers, (0.003, 0.005), (0.0, 0.0), 0.007)
    network = Network(8e9, latency=0, efficiency=1)
    outcome = play([[errand]], [1], network, Computing(0.0), 2)
    delays = sum(network.delay(each.kind, each.sizes, 2) for each in transfers)
    assert outcome.step == pytest.approx(0.003 + 0.0005 + 0.005 + 0.0005 + 0.007 + delays)


def test_a_pause_fills_the_bucket_of_a_burst():
    errand = Errand((Transfer("allreduce", (1_000_000,)),), (0.0,), (0.0,), 0.0)
    plain, bursting = (
        play([[errand]], [1], Network(8e6, 0, True, 1, 1, burst), Computing(1.0), 2) for burst in (0, 500_000)
    )
    assert plain.step - bursting.step == pytest.approx(0.5, abs=0.01)  # at a megabyte a second


def test_what_an_operation_leaves_in_the_bucket_is_there_for_the_next():
    """Of three operations of 250 kB, at a megabyte a second, two pass in a burst after a pause."""
    errand = Errand((Transfer("allreduce", (125_000,)),), (0.0,), (0.0,), 0.0)
    network = Network(8e6, 0, True, 1, 1, 500_000)
    rested, busy = (play([[errand]] * 3, [1] * 3, network, Computing(pause=each), 2) for each in (10.0, 0.0))
    assert rested.link == pytest.approx(0.25, abs=1e-3)
    assert busy.link == pytest.approx(0.75, abs=1e-3)  # but for what passes while a message is under way
    assert busy.step - rested.step == pytest.approx(0.5, abs=1e-3)


def test_messages_wait_for_a_core_as_far_as_cores_are_busy():
    errand = Errand((Transfer("allreduce", (1000,)),), (0.0,), (0.0,), 0.0)
    network, ranks = Network(1e12, latency=0), 4
    alone, shared, idle = (
        play([[errand]], [1], network, computing, ranks).step
        for computing in (Computing(1.0, others=0.0), Computing(1.0, others=2.0), Computing(0.0, others=2.0))
    )
    assert shared - alone == pytest.approx(2 * (ranks - 1) * 2 * TIME_SLICE, rel=0.05)  # of a ring's messages
    assert idle < 1e-3 + network.delay("allreduce", (1000,), ranks)
    assert play([[errand]], [1], network, Computing(1.0, share=3.0), ranks).step == pytest.approx(shared, rel=1e-3)


def test_loads_of_rings_and_direct_messages():
    own, shared = Network(1e9), Network(1e9, shared=True)
    assert own.load("allreduce", (800,), 4) == 2 * 3 * 200 and shared.load("allreduce", (800,), 4) == 4 * 2 * 3 * 200
    assert own.load("allgather", (100,) * 4, 4) == 300 and shared.load("allgather", (100,) * 4, 4) == 1200
    assert own.load("alltoall", (100,) * 4, 4) == 300 and shared.load("alltoall", (100,) * 4, 4) == 1200
    assert own.load("alltoall", (100, 0, 0, 0), 4) == 300  # the one owner receives from three
    pairs = Network(1e9, local=2)
    assert pairs.load("allreduce", (800,), 4) == 1200  # a ring leaves a machine once
    assert pairs.load("alltoall", (100,) * 4, 4) == 400  # two ranks with two others each
    for kind, sizes in (("allreduce", (800,)), ("allgather", (100,) * 2), ("alltoall", (100,) * 2)):
        assert pairs.load(kind, sizes, 2) == 0  # within one machine


@pytest.mark.parametrize(
    "text",
    ["quantize:bits=4; exchange=twophase", "topk:sparsity=0.99; exchange=allgather", "randomk; name=d -> none"],
)
def test_by_nodes_what_leaves_a_machine_is_what_its_plan_says(text):
    policy = as_policy(text)
    there = situation(1e8, ranks=8, local=2)
    found = forecast_of("", policy, there, QuickBench())
    plan = NodePlan(policy, SHAPES, Topology(4, 2, ""))
    plain = sum(4 * entry.numel for entry in plan.entries.values() if not entry.compressor) * 2 * 3 / 4
    most = max(sum(each.wire_bytes().values()) for each in plan.of_local)  # of a machine's two ranks
    assert found.wire_bytes == pytest.approx(most + plain / 2, rel=0.03, abs=40)
    leaving = there.network.seconds_of(plan.between_nodes_bytes() + plain)
    assert found.link_seconds == pytest.approx(leaving, rel=0.1)
    flat = forecast_of("", dataclasses.replace(policy, local_size=1), there, QuickBench())
    # A ring of ranks that are numbered machine by machine leaves a machine once, with 7 / 8 of the bytes; now 3 / 4.
    assert found.link_seconds < (0.9 if "randomk" in text else 0.7) * flat.link_seconds
    # What joins the ranks of a machine takes time, too.
    slowly = forecast_of("", policy, situation(1e8, ranks=8, local=2, within=1e8), QuickBench())
    assert slowly.seconds > found.seconds and slowly.link_seconds == pytest.approx(found.link_seconds)
    assert not situation(ranks=7, local=2).topology(policy).by_nodes


def test_the_slowest_of_many_is_later_than_of_few():
    places = [slowest_of(ranks) for ranks in (1, 2, 4, 64, 4096)]
    assert places == sorted(places) and places[0] == 0
    assert slowest_of(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)


def test_on_a_fast_link_the_advice_is_not_to_compress():
    for rate, expected in ((1e12, "none"), (1e6, "polar:rate=0.25")):
        found = [forecast(method, situation(rate), QuickBench()) for method in ADVISED]
        assert truest(found).method == expected


def test_the_truest_of_what_is_nearly_as_fast_is_advised():
    def found(**seconds):
        return [Forecast(name.replace("_", ":bits="), each, 0, 0, 0) for name, each in seconds.items()]

    assert truest(found(none=1.09, bf16=1.0)).method == "none"
    assert truest(found(none=1.2, bf16=1.0)).method == "bf16"
    assert truest(found(none=9.0, quantize_8=1.05, quantize_4=1.0, sign=0.1)).method == "quantize:bits=8"
    with pytest.raises(ConfigError, match="methods"):
        truest(found(sign=0.1))


def test_every_method_is_compared_and_can_be_pasted():
    methods = every_method()
    assert len(set(methods)) == len(methods) > 20
    for method in [*methods, "topk@allgather"]:
        line = code_line(method)
        if method not in PLAIN:
            assert as_policy(line.split('"')[1]) == method_policy(method)
    assert set(TRUSTED) < set(methods)


@pytest.mark.parametrize(
    "text", ["quantize:bits=4@twophase", "topk@allgather", "randomk", "none", "entropy:(quantize:bits=4)"]
)
def test_a_path_is_measured_in_all_its_parts(text):
    costs = measure_path(method_policy(text), SHAPES, 3, repeat=1)
    assert costs.before.keys() == costs.after.keys()
    assert all(0 < each < 1e-3 for parts in costs.before.values() for each in parts), costs
    assert all(0 < costs.after[way] < 1e-3 for way in costs.after if way != "allreduce"), costs
    assert len(costs.before.get("twophase", (0, 0))) == 2
    assert (costs.size < 1) == text.startswith("entropy")


def test_a_gather_among_many_grows_with_the_ranks(monkeypatch):
    """What is not measured lies on the line through what is."""
    monkeypatch.setattr(path_costs, "MANY_RANKS", 4)
    costs = {4: 1.0, 8: 3.0}

    def found(policy, shapes, ranks, *arguments):
        return PathCosts({"allgather": (1.0,)}, {"allgather": costs[ranks]})

    monkeypatch.setattr(path_costs, "_measured", found)
    policy = Policy("topk", exchange="allgather")
    assert measure_path(policy, SHAPES, 4).after["allgather"] == 1.0
    assert measure_path(policy, SHAPES, 16).after["allgather"] == 7.0
    assert measure_path(policy, SHAPES, 16).before["allgather"] == (1.0,)


def test_a_sample_is_spread_over_the_model():
    shapes = {str(number): torch.Size((1024, 1024)) for number in range(64)}
    names = [name for bucket in sampled(shapes, limit=8 << 20, nbytes=1) for name in bucket]
    assert len(names) == 8 and max(map(int, names)) > 48 and min(map(int, names)) < 16
    assert sampled({"a": torch.Size((10**9,))}) == [["a"]]


def test_the_engine_is_measured():
    costs = measure_gloo(repeat=1)
    assert all(0 < each < 1e-5 for each in (*costs.allreduce.values(), costs.allgather, costs.alltoall))


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": math.inf}, {"latency": -1}, {"local": 0}, {"efficiency": 2}])
def test_a_link_that_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: got"):
        Network(**{"rate": 1e9, **options})
