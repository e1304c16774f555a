"""compression="auto": one choice by all ranks together, which is then a policy like any other."""

import copy
import json
import logging

import pytest
import torch

from gcompress import ConfigError, ConfigMismatchError, DeMo, OuterOptimizer, Policy, as_policy
from gcompress.auto import Auto
from gcompress.exchange import merge_states
from gcompress.exchange.exchange import GradientExchange
from gcompress.forecast import decide as deciding
from gcompress.forecast.decide import decide, measure_link
from gcompress.policy import check_types
from tests.local_ranks import ThreadEngine, World, engines_of_nodes, run_ranks
from tests.test_forecast import QuickBench

SHAPES = {"a": torch.Size((300, 700)), "b": torch.Size((5000,)), "c": torch.Size((10,))}
TEXTS = [
    "auto",
    "auto:link=1gbit",
    "auto:link=100mbit,shared=true,latency=5ms,step=0.3",
    "auto:step=300ms; min_numel=4096; name=*.bias -> none",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Costs that were not measured."""
    monkeypatch.setattr(deciding, "Bench", lambda shapes, ranks, device, **how: QuickBench())


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_a_policy_with_a_text_and_a_dict(text):
    policy = as_policy(text)
    assert policy.undecided and as_policy(str(policy)) == policy
    assert as_policy(json.loads(json.dumps(policy.to_dict()))) == policy
    assert as_policy(Auto.read(text.partition(";")[0])).compressor == policy.compressor
    assert not Policy("topk").undecided


@pytest.mark.parametrize(
    "text, words",
    [
        ("auto:link=fast", "auto: link: got 'fast'"),
        ("auto:latency=far", "auto: latency: got 'far'"),
        ("auto:step=-1", "auto: step: got '-1'"),
        ("auto:speed=9", "auto: got the option 'speed'"),
        ("auto:link", "auto: got 'link'"),
        ("auto:link=1gbit,link=2gbit", "auto: got 'link=2gbit'"),
        ("auto:shared=true", "shared: got true without a link"),
        ("auto:link=1gbit,shared=1", "shared: got 1"),
        ("auto; momentum=0.9", "momentum: got 0.9 with auto"),
        ("auto; error_feedback=false", "error_feedback: got False"),
        ("auto; exchange=turns", "exchange: got 'turns'"),
        ("auto; mean=senders", "mean: got 'senders'"),
        ("topk; name=a -> auto", "'auto'"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(text, words):
    with pytest.raises(ConfigError) as caught:
        as_policy(text)
    assert words in str(caught.value)


def steps(rank, exchange, count=2):
    """[{name: mean}] of some steps."""
    exchange.prepare(SHAPES)
    found = []
    for step in range(count):
        generator = torch.Generator().manual_seed(100 * step + rank)
        own = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        found.append({name: mean.clone() for name, mean in exchange.start_bucket(own)().items()})
        exchange.end_step()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("link, expected", [("1mbit", "polar:rate=0.25"), ("1tbit", "none"), (None, None)])
def test_all_ranks_choose_the_same_and_get_what_it_gives(link, expected, ranks):
    text = f"auto:link={link}" if link else "auto"
    chosen = run_ranks(World(ranks), text, lambda rank, exchange: (steps(rank, exchange), str(exchange.policy)))
    assert len({policy for _, policy in chosen}) == 1
    if expected:
        assert chosen[0][1] == (expected if ranks > 1 else "none")
    named = run_ranks(World(ranks), chosen[0][1], steps)
    for (own, _), other in zip(chosen, named, strict=True):
        for mine, theirs in zip(own, other, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)


def test_ranks_that_measure_differently_follow_rank_0_by_the_slowest(monkeypatch, caplog):
    """Were each to choose for itself, they would choose differently."""
    speeds = {0: 1.0, 1: 5000.0, 2: 1.0}
    found = {}

    def run(rank, exchange):
        policy = as_policy("auto:link=1gbit,step=0.1ms")
        bench = QuickBench(nanoseconds=speeds[rank])
        network = deciding._given(policy.compressor)
        situation = deciding.Situation(SHAPES, 3, network, deciding.Computing(1e-4))
        own = deciding.candidates(policy, situation, bench)
        found[rank] = deciding.truest(own, deciding.CANDIDATES).method
        return decide(policy, exchange.engine, SHAPES, bench=bench).compressor

    with caplog.at_level(logging.INFO, logger="gcompress.forecast.decide"):
        decided = run_ranks(World(3), "topk", run)
    assert found[0] != found[1]
    assert len(set(decided)) == 1
    assert str(decided[0] or "none") == found[1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and found[1] in messages[0] and "1gbit" in messages[0]


def test_ranks_of_nodes_choose_for_the_exchange_that_they_will_have(monkeypatch):
    seen, candidates = [], deciding.candidates

    def watched(policy, situation, bench):
        seen.append((situation.network.local, situation.topology(policy).by_nodes))
        return candidates(policy, situation, bench)

    monkeypatch.setattr(deciding, "candidates", watched)
    for text, local_size, expected in (
        ("auto:link=1gbit", 2, (2, True)),
        ("auto:link=1gbit,shared=true", 2, (1, False)),
        ("auto:link=1gbit", 1, (1, False)),
    ):
        world = World(4)
        make = engines_of_nodes(world, 2)[0] if local_size > 1 else ThreadEngine
        policies = run_ranks(world, text, lambda rank, exchange: exchange.prepare(SHAPES) or exchange.policy, make)
        assert len(set(policies)) == 1 and seen == [expected] * 4
        seen.clear()


def test_the_choice_keeps_the_policys_rules_and_options():
    text = "auto:link=1mbit; exchange=allgather; min_numel=2000; name=b -> none"
    (policy, *_) = run_ranks(World(2), text, lambda rank, exchange: exchange.prepare(SHAPES) or exchange.policy)
    assert str(policy) == "polar:rate=0.25; min_numel=2000; exchange=allgather; name=b -> none"


def test_ranks_that_are_configured_differently_are_told():
    def run(rank, exchange):
        policy = as_policy(f"auto:link={rank + 1}gbit")
        with pytest.raises(ConfigMismatchError, match="compression: expected the same"):
            decide(policy, exchange.engine, SHAPES)

    run_ranks(World(2), "topk", run)


class Servers:
    """Ranks without collective operations, as of parameter servers."""

    def __init__(self, engine):
        self.rank, self.world_size, self.gather_texts = engine.rank, engine.world_size, engine.gather_texts


def test_on_servers_the_rate_must_be_named():
    def run(rank, exchange):
        with pytest.raises(ConfigError, match="expected its rate, such as auto:link=1gbit"):
            decide(as_policy("auto"), Servers(exchange.engine), SHAPES)
        return str(decide(as_policy("auto:link=1mbit"), Servers(exchange.engine), SHAPES))

    assert run_ranks(World(2), "topk", run) == ["polar:rate=0.25"] * 2


def test_where_nothing_can_decide_it_is_refused():
    engine = ThreadEngine(World(1), 0)
    engine.elastic = True
    with pytest.raises(ConfigError, match="elastic job"):
        decide(as_policy("auto:link=1gbit"), engine, SHAPES)
    with pytest.raises(ConfigError, match="not chosen a compressor yet"):
        as_policy("auto").compressor_for("a", 5000)
    model = torch.nn.Linear(40, 40)
    with pytest.raises(ConfigError, match="for OuterOptimizer"):
        OuterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, engine, "auto")
    with pytest.raises(ConfigError, match="for DeMo"):
        DeMo(model.named_parameters(), engine, compression="auto")
    with pytest.raises(ConfigError, match="complex64"):
        check_types(as_policy("auto"), {"w": torch.nn.Parameter(torch.zeros(50, 50, dtype=torch.complex64))})


def test_a_saved_state_has_the_choice_and_goes_on_with_it(caplog):
    def first(rank, exchange):
        steps(rank, exchange)
        return exchange.state_dict()

    states = run_ranks(World(2), "auto:link=1mbit,step=1ms", first)
    assert all(as_policy(state["policy"]) == as_policy("polar:rate=0.25") for state in states)
    merged = merge_states(copy.deepcopy(states))

    def second(rank, exchange, state):
        exchange.prepare(SHAPES)
        exchange.load_state_dict(state)
        return str(exchange.policy), steps(rank, exchange, 3)[2]

    for saved in (states, [merged] * 2):
        for text in ("auto:link=1tbit,step=1s", "polar:rate=0.25"):  # now it would choose none
            caplog.clear()
            went_on = run_ranks(World(2), text, lambda rank, exchange, s=saved: second(rank, exchange, s[rank]))
            assert [policy for policy, _ in went_on] == ["polar:rate=0.25"] * 2
            assert ("as the saved state" in caplog.text) == text.startswith("auto")


def test_a_choice_is_not_changed_by_a_state_that_does_not_fit_or_comes_late():
    state = run_ranks(World(1), "sign", lambda rank, exchange: steps(rank, exchange) and exchange.state_dict())[0]

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        broken = {**state, "shapes": {**state["shapes"], "a": [1, 2]}}
        with pytest.raises(ConfigError, match="another model's"):
            exchange.load_state_dict(broken)
        assert str(exchange.policy) == "none" and not exchange.plan.entries["a"].compressor
        steps(rank, exchange)
        with pytest.raises(ConfigError, match="this run uses"):
            exchange.load_state_dict(state)
        return str(exchange.policy)

    assert run_ranks(World(1), "auto:link=1tbit", run) == ["none"]


def test_a_named_policy_does_not_give_way_to_a_states():
    state = run_ranks(World(1), "sign", lambda rank, exchange: steps(rank, exchange) and exchange.state_dict())[0]
    exchange = GradientExchange("topk", ThreadEngine(World(1), 0))
    exchange.prepare(SHAPES)
    with pytest.raises(ConfigError, match="this run uses"):
        exchange.load_state_dict(state)


class SlowOperation:
    """An operation on a link: it takes `seconds` of the engine's own clock."""

    def __init__(self, engine, seconds, result):
        engine.now += seconds
        self._result = result

    def ready(self):
        return True

    def wait(self):
        return self._result


class SlowEngine:
    """Two ranks' all-gathers and all-reduces, on a clock of its own, over a link of 80 Mbit/s and 3 ms."""

    now = 0.0

    def world_size(self):
        return 3

    def allgather(self, name, lane, payload, sizes):
        return SlowOperation(self, 2 * (3e-3 + len(payload) / 1e7), payload.repeat(3))

    def allreduce(self, name, lane, tensor, op):
        return SlowOperation(self, 4 * 3e-3, tensor.clone())


def test_a_link_is_measured_by_what_comes_of_it(monkeypatch):
    engine = SlowEngine()
    monkeypatch.setattr(deciding.time, "perf_counter", lambda: engine.now)
    network = measure_link(engine)
    assert network.rate == pytest.approx(8e7, rel=0.01) and network.latency == pytest.approx(3e-3, rel=0.01)
    assert network.efficiency == 1
