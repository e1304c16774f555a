"""The exchange by nodes: against a simulation, in any order, with the bytes that its plan expects, and its promises."""

import random

import pytest
import torch

import gcompress
from gcompress import ConfigError, Policy, Rule, from_spec
from gcompress.exchange.node_engine import Place, Topology, topology_of
from gcompress.exchange.node_plan import NodePlan
from gcompress.exchange.plan import Plan
from tests.local_ranks import ThreadEngine, World, engines_of_nodes, run_ranks
from tests.simulation import NodeSimulation

SHAPES = {"a": (40, 30), "b": (1000,), "c": (300, 70), "d": (5000,), "e": (16384,), "f": (64, 64, 3)}
SIZES = [(2, 2), (2, 3), (4, 2), (2, 4), (4, 4)]  # nodes, ranks of each


def gradients(step, rank, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def train(policy, size, steps=3, shapes=SHAPES, in_order=False, delays=3, average=True, buckets=False):
    """[(means of each step, exchange)] of all ranks, and where the peers meet."""
    nodes, local_size = size
    world = World(nodes * local_size, in_order=in_order, seed=nodes, delays=delays)
    make_engine, peers = engines_of_nodes(world, local_size)

    def run(rank, exchange):
        exchange.average = average
        exchange.prepare(shapes)
        order, results = random.Random(rank), []
        for step in range(steps):
            own = gradients(step, rank, shapes)
            results.append(by_buckets(exchange, own) if buckets else by_names(exchange, own, order, in_order))
            exchange.end_step()
        return results, exchange

    return run_ranks(world, policy, run, make_engine), peers


def by_names(exchange, own, order, in_order):
    names = [name for name in own if exchange.compressor_for(name, own[name].numel())]
    if not in_order:
        order.shuffle(names)
    finish = {name: exchange.start(name, own[name]) for name in names}
    order.shuffle(names)
    return {name: finish[name]() for name in names}


def by_buckets(exchange, own):
    names = list(own)
    waiting = [exchange.start_bucket({name: own[name] for name in names[start : start + 2]}) for start in (4, 2, 0)]
    return {name: mean for wait in waiting for name, mean in wait().items()}


def simulated(policy, size, steps=3, shapes=SHAPES, average=True):
    nodes, local_size = size
    plan = NodePlan(policy, shapes, Topology(nodes, local_size, ""))
    simulation = NodeSimulation(plan, average)
    for step in range(steps):
        own = [gradients(step, rank, shapes) for rank in range(nodes * local_size)]
        compressed = [{name: g for name, g in rank.items() if plan.entries[name].compressor} for rank in own]
        yield simulation.means(compressed)
        simulation.end_step()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_get_what_a_simulation_gives_to_the_bit(size, exchange, in_order):
    for spec in ("quantize:bits=4", "quantize:bits=2,rounding=stochastic", "topk:sparsity=0.9"):
        policy = Policy(spec, exchange=exchange, bucket_bytes=50_000)
        ranks, _ = train(policy, size, in_order=in_order)
        for step, expected in enumerate(simulated(policy, size)):
            for results, _ in ranks:
                assert results[step].keys() == expected.keys()
                assert all(torch.equal(results[step][name], mean) for name, mean in expected.items()), (spec, step)


@pytest.mark.parametrize("in_order", [False, True])
def test_every_kind_of_exchange_side_by_side(in_order):
    """Summed, of variable size, in two phases and uncompressed, in buckets; shares that only some ranks have."""
    rules = [Rule("randomk", name="c"), Rule("threshold:threshold=0.5", name="d"), Rule(None, name="e")]
    policy = Policy("topk:sparsity=0.9", rules=rules, momentum=0.9, warmup_steps=2, exchange="twophase", min_numel=1100)
    for size in ((2, 3), (3, 4)):
        ranks, _ = train(policy, size, in_order=in_order, delays=20, buckets=in_order)
        plan = ranks[0][1].plan
        ways = {name: entry.exchange for name, entry in plan.entries.items()}
        assert ways == dict(
            zip("abcdef", ["twophase", "allreduce", "twophase", "allgather", "allreduce", "twophase"], strict=True)
        )
        assert any(len(peers.entries) < 4 for peers in plan.of_local)
        for step, expected in enumerate(simulated(policy, size)):
            own = [gradients(step, rank) for rank in range(size[0] * size[1])]
            for results, _ in ranks:
                assert all(torch.equal(results[step][name], mean) for name, mean in expected.items())
                for name in "be" if in_order else "":
                    torch.testing.assert_close(results[step][name], sum(each[name] for each in own) / len(own))
                    assert torch.equal(results[step][name], ranks[0][0][step][name])


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_starting_and_waiting_deadlocks(seed, in_order):
    """Ranks of a node with different numbers of rounds, long random delays."""
    shapes = {f"p{i}": (1100 + 1337 * i,) for i in range(12)}
    rules = [Rule("randomk", name="p[13579]"), Rule("threshold:threshold=1.0", name="p[28]")]
    policy = Policy("topk:sparsity=0.5", rules=rules, bucket_bytes=12_000 * (seed + 1))
    ranks, _ = train(policy, (2, 3), in_order=in_order, delays=30, steps=3, shapes=shapes)
    for results, _ in ranks[1:]:
        for one, other in zip(results, ranks[0][0], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in shapes)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_nothing_is_lost_over_many_steps(exchange, average):
    """All steps' results and what the ranks remember together add up to what all gradients add up to."""
    size, shapes, steps = (2, 4), {"w": (90, 400)}, 8
    policy = Policy("topk:sparsity=0.9", exchange=exchange)
    ranks, _ = train(policy, size, steps, shapes, average=average)
    for step, expected in enumerate(simulated(policy, size, steps, shapes, average)):
        assert torch.equal(ranks[3][0][step]["w"], expected["w"])
    merged = gcompress.merge_states([exchange.state_dict() for _, exchange in ranks])
    factor = 1 / 8 if average else 1.0
    given = sum(gradients(step, rank, shapes)["w"] for step in range(steps) for rank in range(8)) * factor
    missing = merged["sums"]["residual/w"] * factor + merged["sums"]["owner/w"]
    sent = sum(result["w"] for result in ranks[0][0]).reshape(-1)
    torch.testing.assert_close(sent + missing, given.reshape(-1), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(sent, given.reshape(-1), atol=0.1)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", [{}, {"exchange": "twophase"}, {"error_feedback": "ef21"}, {"momentum": 0.9}])
def test_merged_states_go_on_in_other_topologies(options, average):
    """From 2 x 4 ranks to flat 8, 4 x 2, flat 3 and back: what is missing stays what it was."""
    policy, shapes = Policy("topk:sparsity=0.9", **options), {"w": (9000,), "v": (130, 100)}
    ranks, _ = train(policy, (2, 4), 3, shapes, average=average)
    merged = gcompress.merge_states([exchange.state_dict() for _, exchange in ranks])
    first = missing(merged, average)
    for nodes, local_size in ((8, 1), (4, 2), (3, 1), (2, 4)):

        def load(rank, exchange):
            exchange.average = average
            exchange.prepare(shapes)
            exchange.load_state_dict(merged)  # noqa: B023 (run at once)
            full = exchange.full_state_dict()
            return exchange.state_dict(), full

        world = World(nodes * local_size)
        make = engines_of_nodes(world, local_size)[0] if local_size > 1 else ThreadEngine
        found = run_ranks(world, policy, load, make)
        merged = gcompress.merge_states([state for state, _ in found])
        for name, vector in missing(merged, average).items():
            torch.testing.assert_close(vector, first[name], rtol=1e-4, atol=1e-5)
        for name, vector in found[0][1]["sums"].items():
            torch.testing.assert_close(vector, merged["sums"][name], rtol=1e-4, atol=1e-5)


def missing(merged, average):
    """{name: what a merged state says is missing from the mean or sum}; of EF21 it is the estimate."""
    ranks = merged["world_size"] if average else 1
    names = {name.partition("/")[2] for name in merged["sums"]}
    found = {name: merged["sums"][f"residual/{name}"] / ranks + merged["sums"][f"owner/{name}"] for name in names}
    for name in names if f"velocity/{min(names)}" in merged["sums"] else ():
        found[f"velocity {name}"] = merged["sums"][f"velocity/{name}"] / ranks
    return found


def test_training_goes_on_from_a_saved_state_to_the_bit():
    policy, size = Policy("quantize:bits=2", exchange="twophase"), (2, 2)
    whole, _ = train(policy, size, steps=4)
    make, _ = engines_of_nodes(World(4), 2)

    def run(rank, exchange):
        for step in range(4):
            exchange.prepare(SHAPES)
            if step == 2:
                state = exchange.state_dict()
                exchange = type(exchange)(policy, exchange.engine)
                exchange.prepare(SHAPES)
                exchange.load_state_dict(state)
            own = gradients(step, rank)
            finish = {name: exchange.start(name, g) for name, g in own.items() if g.numel() >= 1024}
            means = {name: wait() for name, wait in finish.items()}
            exchange.end_step()
        return means, exchange.state_dict()

    found = run_ranks(World(4), policy, run, make)
    for (means, _), (expected, _) in zip(found, whole, strict=True):
        assert all(torch.equal(means[name], expected[3][name]) for name in means)

    def load_what_does_not_fit(rank, exchange):
        exchange.prepare(SHAPES)
        state = found[rank][1]
        broken = [{**state, "shares": {"c": [0, 22000]}}, {**state, "shares": 3}, {**state, "local_size": "2"}]
        broken += [{key: value for key, value in state.items() if key != "shares"}, found[rank - 1][1]]
        for each in broken:
            with pytest.raises(ConfigError, match="state|residual"):
                exchange.load_state_dict(each)
        with pytest.raises(ConfigError, match="states|state"):
            gcompress.merge_states([{**state, "shares": {"c": [-1, 5]}} for _, state in found])

    run_ranks(World(4), policy, load_what_does_not_fit, make)


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_a_non_finite_gradient_is_seen_by_all_and_what_is_thrown_away_leaves_no_trace(exchange):
    shapes = {"w": (20000,)}
    policy = Policy("topk:sparsity=0.9", exchange=exchange)
    expected, _ = train(policy, (2, 2), 3, shapes)

    def run(rank, exchange):
        exchange.prepare(shapes)
        results = []
        for step in range(3):
            for poisoned in (True, False):
                gradient = gradients(step, rank, shapes)["w"]
                if poisoned and rank == step:
                    gradient[19000 - 9000 * step] = float("nan")
                result = exchange.start("w", gradient)()
                assert bool(result.isfinite().all()) != poisoned
                if poisoned:
                    exchange.discard()
            results.append(result)
            exchange.end_step()
        return results

    make, _ = engines_of_nodes(World(4), 2)
    for results in run_ranks(World(4), policy, run, make):
        assert all(torch.equal(one, other["w"]) for one, other in zip(results, expected[0][0], strict=True))


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_memory_waits_only_where_no_rank_of_the_node_has_a_gradient(exchange):
    def run(rank, exchange):
        exchange.prepare({"w": (20000,)})
        first = gradients(0, rank, {"w": (20000,)})["w"]
        exchange.start("w", first)()
        exchange.end_step()
        before = exchange.state_dict()["feedback"]["w"]
        absent = rank != 3  # of node 0 both, of node 1 one
        result = exchange.start("w", torch.zeros(20000) if absent else first, absent=absent)()
        exchange.end_step()
        return torch.equal(before, exchange.state_dict()["feedback"]["w"]), bool(result.any())

    make, _ = engines_of_nodes(World(4), 2)
    found = run_ranks(World(4), Policy("topk:sparsity=0.9", exchange=exchange), run, make)
    assert found == [(True, True), (True, True), (False, True), (False, True)]


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_errors_of_encoding_are_those_of_a_ranks_shares(exchange):
    """Of what a rank encodes, the mean over its node, in the pieces in which it does."""
    shapes, compressor = {"w": (200, 100), "v": (90, 50)}, from_spec("topk:sparsity=0.9")

    def run(rank, exchange):
        exchange.prepare(shapes)
        exchange.measure_errors(1)
        own = gradients(0, rank, shapes)
        finish = {name: exchange.start(name, own[name]) for name in shapes}
        for wait in finish.values():
            wait()
        exchange.end_step()
        return exchange.report.errors, exchange.plan

    found = run_ranks(World(4), Policy(compressor, exchange=exchange), run, engines_of_nodes(World(4), 2)[0])
    for rank, (errors, plan) in enumerate(found):
        node, local = divmod(rank, 2)
        own = [gradients(0, 2 * node + each, shapes) for each in range(2)]
        peers, expected = plan.of_local[local], {}
        for name, entry in peers.entries.items():
            mean = (own[0][name].reshape(-1) + own[1][name].reshape(-1)) * 0.5
            share = mean[peers.offsets[name] :][: entry.numel]
            cuts = [(piece.start, piece.stop) for piece in entry.pieces] or [(0, entry.numel)]
            sent = torch.cat([compressor.decompress(*compressor.compress(share[a:b])) for a, b in cuts])
            expected[name] = float((share - sent).double().square().sum() / share.double().square().sum())
        assert errors == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("exchange", ["allgather", "twophase", "summed"])
def test_counted_bytes_are_those_of_the_report_and_of_the_plan(size, exchange):
    """Between nodes no more than with one rank a node, whatever the number of its ranks."""
    shapes = {"w": (512, 256), "v": (256, 300), "b": (40000,)}
    policy = Policy("randomk:sparsity=0.9" if exchange == "summed" else "quantize:bits=4", exchange=exchange)
    ranks, peers = train(policy, size, steps=2, shapes=shapes)
    nodes, local_size = size
    plan, numel = ranks[0][1].plan, sum(torch.Size(shape).numel() for shape in shapes.values())
    for rank, (_, made) in enumerate(ranks):
        assert made.report.wire_bytes == peers[rank % local_size].sent_bytes[rank // local_size]
        flags = 4 * local_size * len(shapes)  # of every parameter, whether a rank has its gradient
        assert made.report.within_node_bytes == 2 * (4 * numel + flags) + made.report.fp32_bytes
    sent = sum(sum(each.sent_bytes) for each in peers) / nodes / 2
    assert sent == pytest.approx(plan.between_nodes_bytes(), abs=2 * len(shapes) * local_size)
    assert sent <= 1.02 * sum(Plan(policy, shapes, nodes).wire_bytes().values())
    assert sum(made.report.fp32_bytes for _, made in ranks) == 2 * 4 * numel * nodes  # each rank has its share
    wire = sum(made.report.wire_bytes for _, made in ranks) / len(ranks) / 2
    assert wire == pytest.approx(sum(plan.wire_bytes().values()), abs=8 * len(shapes) * local_size)
    assert str(round(plan.between_nodes_bytes())) in str(plan).replace(",", "")
    ring = 2 * (nodes * local_size - 1) * 2 * numel // (nodes * local_size)  # of float16, through all ranks
    assert plan.reference_bytes() == ring // local_size
    packed = NodePlan(Policy(policy.compressor, exchange=exchange, residual="int8"), shapes, plan.topology)
    largest = max(entry.numel for peers in packed.of_local for entry in peers.entries.values())
    unpacked = packed.scratch_bytes() // 4
    assert unpacked == 0 if exchange == "summed" else largest <= unpacked <= 2 * largest


def places(*nodes):
    """Of ranks that are numbered node by node."""
    return [Place(node, local, ranks) for node, ranks in enumerate(nodes) for local in range(ranks)]


@pytest.mark.parametrize(
    "where, options, expected, why",
    [
        (places(2, 2), {}, (2, 2), "launcher has placed"),
        (places(4, 4, 4), {}, (3, 4), "launcher has placed"),
        (places(4), {}, (4, 1), "all ranks are on one node"),
        (places(1, 1, 1), {}, (3, 1), "every node has one rank"),
        (places(2, 1, 2), {}, (5, 1), "different numbers of ranks: 1, 2"),
        (places(2, 2)[::2] + places(2, 2)[1::2], {}, (4, 1), "not numbered node by node"),
        (places(2, 2)[:2] * 2, {}, (4, 1), "not numbered node by node"),
        ([None] * 4, {}, (4, 1), "does not tell"),
        (places(2, 2), {"local_size": 1}, (4, 1), "local_size=1"),
        ([None] * 8, {"local_size": 4}, (2, 4), "local_size=4"),
        (places(4), {"local_size": 4}, (4, 1), "puts all 4 ranks on one node"),
        (places(2, 2), {"momentum": 0.9, "clip": 1.0}, (4, 1), "clip"),
        (places(2, 2), {"exchange": "turns"}, (4, 1), "turns"),
        (places(2, 2), {"mean": "senders"}, (4, 1), "senders"),
    ],
)
def test_the_topology_is_chosen_by_a_rule_and_says_why(where, options, expected, why):
    topology = topology_of(where, Policy("topk", **options))
    assert topology[:2] == expected and why in str(topology)
    assert str(topology).startswith("by nodes" if topology.by_nodes else "flat")


def test_a_local_size_that_cannot_be_is_refused():
    for wrong in (0, "all", True, 2.0, None):
        with pytest.raises(ConfigError, match="local_size"):
            Policy("topk", local_size=wrong)
    with pytest.raises(ConfigError, match="local_size: got 3, expected.* divisor of the 4 ranks"):
        topology_of([None] * 4, Policy("topk", local_size=3))
    with pytest.raises(ConfigError, match="local_size: got 2, expected.*clip"):
        topology_of([None] * 4, Policy("topk", local_size=2, clip=1.0))
    with pytest.raises(ConfigError, match="no exchange by nodes"):
        run_ranks(World(4), Policy("topk", local_size=2), lambda rank, exchange: exchange.prepare(SHAPES))


def test_local_size_is_written_like_other_options():
    policy = gcompress.as_policy("topk:sparsity=0.9; local_size=4")
    assert policy == Policy("topk:sparsity=0.9", local_size=4) == gcompress.as_policy(policy.to_dict())
    assert gcompress.as_policy("topk; local_size=auto") == Policy("topk") and "local_size" not in str(Policy("topk"))


def test_ranks_that_see_other_nodes_plan_differently():
    one, other = (NodePlan(Policy("topk"), SHAPES, Topology(*size, "")) for size in ((2, 4), (4, 2)))
    assert len({one.digest(), other.digest(), Plan(Policy("topk"), SHAPES, 8).digest()}) == 3


@pytest.mark.parametrize("average", [True, False])
def test_ef21_comes_to_deliver_a_gradient_that_stays(average):
    """Of shares: each rank of a node delivers its own, to all."""
    shapes, make = {"w": (20000,)}, engines_of_nodes(World(4), 2)[0]

    def run(rank, exchange):
        exchange.average = average
        exchange.prepare(shapes)
        for _ in range(25):
            result = exchange.start("w", gradients(0, rank, shapes)["w"])()
            exchange.end_step()
        return result

    expected = sum(gradients(0, rank, shapes)["w"] for rank in range(4)) / (4 if average else 1)
    for result in run_ranks(World(4), Policy("topk:sparsity=0.7", error_feedback="ef21"), run, make):
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("numel", [2048, 20000])  # a share of some ranks, shares of all
def test_what_lies_beyond_float16_comes_with_later_gradients(numel, average):
    make = engines_of_nodes(World(4), 2)[0]

    def run(rank, exchange):
        exchange.average = average
        exchange.prepare({"w": (numel,)})
        arrived = torch.zeros(numel)
        for step in range(6):
            gradient = torch.full((numel,), 60000.0 if step == 0 else 1.0, dtype=torch.float16)
            result = exchange.start("w", gradient)()
            exchange.end_step()
            assert bool(result.isfinite().all())
            arrived += result
        return arrived, exchange.state_dict()

    found = run_ranks(World(4), Policy("mxfp4", error_feedback=True), run, make)
    merged = gcompress.merge_states([state for _, state in found])
    expected = torch.full((numel,), 60005.0 if average else 4 * 60005.0)
    torch.testing.assert_close(found[0][0] + missing(merged, average)["w"], expected, rtol=2e-4, atol=1)


def test_what_the_engine_adds_up_is_one_ranks_share_and_its_memory():
    policy, shapes = Policy("lowrank:rank=2"), {"w": (300, 200), "v": (100, 400)}
    ranks, _ = train(policy, (2, 2), 2, shapes)
    states = [exchange.state_dict() for _, exchange in ranks]
    assert [sorted(state["memories"]) for state in states] == [["w"], ["v"]] * 2
    for plan in (ranks[0][1].plan, NodePlan(Policy("randomk"), shapes, Topology(2, 2, ""))):
        assert all(len(entry.pieces) == 1 for entry in plan.entries.values())
    merged = gcompress.merge_states(states)
    assert set(merged["memories"]) == {"w", "v"}
    make = engines_of_nodes(World(4), 2)[0]

    def load(rank, exchange):
        exchange.prepare(shapes)
        exchange.load_state_dict({**merged, "policy": {**merged["policy"], "local_size": 2}})  # as another run had it
        return exchange.state_dict(), exchange.full_state_dict()["memories"]

    for (state, memories), before in zip(run_ranks(World(4), policy, load, make), states, strict=True):
        assert state["memories"].keys() == before["memories"].keys() and memories.keys() == {"w", "v"}
        for name, memory in state["memories"].items():
            assert torch.equal(memory["basis"], before["memories"][name]["basis"])


@pytest.mark.parametrize("in_order", [False, True])
def test_what_is_not_compressed_leaves_a_node_once(in_order):
    ranks, peers = train(Policy(None), (2, 4), 1, in_order=in_order, buckets=True)
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert sum(sum(each.sent_bytes) for each in peers) == sum(made.report.wire_bytes for _, made in ranks)
    assert sum(made.report.wire_bytes for _, made in ranks) == pytest.approx(2 * 4 * numel, abs=100)
    for name in SHAPES:
        expected = sum(gradients(0, rank)[name] for rank in range(8)) / 8
        torch.testing.assert_close(ranks[0][0][0][name].view(SHAPES[name]), expected)
        assert all(torch.equal(results[0][name], ranks[0][0][0][name]) for results, _ in ranks)
