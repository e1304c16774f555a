"""Every exchange against a simulation, in any order, with the bytes that its plan expects."""

import random

import pytest
import torch

from gcompress import ConfigError, ExchangeError, Policy, Rule, from_spec
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.plan import Plan, borders
from tests.allocations import Allocations
from tests.compressors import SPECS
from tests.local_ranks import World, run_ranks
from tests.simulation import Simulation
from tests.test_feedback import OneRank

SHAPES = {"a": (40, 30), "b": (1000,), "c": (300, 70), "d": (5000,), "e": (16384,), "f": (64, 64, 3)}


def gradients(step, rank, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def train(policy, world, steps=3, shapes=SHAPES, skipped=None):
    """[[{name: mean} of each step] of each rank], gradients starting in another order on each rank and step."""

    def run(rank, exchange):
        exchange.prepare(shapes)
        order, results = random.Random(rank), []
        for step in range(steps):
            own, finish = gradients(step, rank, shapes), {}
            names = [name for name in own if policy.compressor_for(name, own[name].numel())]
            if not world.in_order:
                order.shuffle(names)
            for name in names:
                finish[name] = exchange.start(name, own[name])
            order.shuffle(names)
            results.append({name: finish[name]() for name in names})
            exchange.end_step()
        return results, exchange.report, exchange.state_dict()

    return run_ranks(world, policy, run)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("spec", ["quantize:bits=4", "quantize:bits=2,rounding=stochastic", "topk:sparsity=0.9"])
def test_ranks_get_what_a_simulation_gives_to_the_bit(spec, exchange, size, in_order):
    policy = Policy(spec, exchange=exchange, bucket_bytes=50_000)
    ranks = train(policy, World(size, in_order=in_order, seed=size))
    simulation = Simulation(Plan(policy, SHAPES, size))
    for step in range(3):
        own = [gradients(step, rank) for rank in range(size)]
        expected = simulation.means([{name: g for name, g in rank.items() if g.numel() >= 1024} for rank in own])
        for results, _, _ in ranks:
            assert results[step].keys() == expected.keys()
            for name, mean in expected.items():
                assert torch.equal(results[step][name], mean), (step, name)


@pytest.mark.parametrize("spec", SPECS)
def test_every_compressor_goes_through_two_phases(spec):
    policy = Policy(spec, exchange="twophase")
    shapes = {"w": (9000,), "v": (1025,), "m": (90, 100)}
    ranks = train(policy, World(3), steps=2, shapes=shapes)
    simulation = Simulation(Plan(policy, shapes, 3))
    expected = "twophase" if from_spec(spec).fixed_size else "allgather"
    assert {entry.exchange for entry in simulation.plan.entries.values()} == {expected}
    for step in range(2):
        expected = simulation.means([gradients(step, rank, shapes) for rank in range(3)])
        for results, _, _ in ranks:
            assert all(torch.equal(results[step][name], mean) for name, mean in expected.items())


def test_rules_momentum_correction_and_a_warm_up_go_through_two_phases():
    """Several compressors in one bucket, which change from step to step."""
    rules = [Rule("quantize:bits=4", name="c"), Rule("threshold:threshold=0.5", name="d"), Rule(None, name="e")]
    policy = Policy("topk:sparsity=0.99", rules=rules, momentum=0.9, clip=100.0, warmup_steps=4, exchange="twophase")
    ranks = train(policy, World(3), steps=6)
    plan = Plan(policy, SHAPES, 3)
    ways = {name: entry.exchange for name, entry in plan.entries.items()}
    assert ways == dict(
        zip("abcdef", ["twophase", "allreduce", "twophase", "allgather", "allreduce", "twophase"], strict=True)
    )
    simulation = Simulation(plan)
    for step in range(6):
        own = [gradients(step, rank) for rank in range(3)]
        expected = simulation.means([{name: rank[name] for name in "acdf"} for rank in own])
        for results, _, _ in ranks:
            assert all(torch.equal(results[step][name], mean) for name, mean in expected.items())


def test_a_rule_that_matches_nothing_is_warned_of(caplog):
    rules = [Rule("sign", name="_orig_mod.*"), Rule(None, name="e"), Rule("sign", role="activation")]
    policy = Policy("topk", rules=rules)
    run_ranks(World(2), policy, lambda rank, exchange: exchange.prepare(SHAPES))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "name=_orig_mod.* -> sign matches none of the 6 parameters" in warning


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_nothing_is_lost_over_many_steps(exchange):
    """All steps' means and the residuals add up to what all gradients add up to."""
    steps, size, shapes = 12, 4, {"w": (9000,)}
    policy = Policy("topk:sparsity=0.9", exchange=exchange)
    ranks = train(policy, World(size), steps, shapes)
    given = sum(gradients(step, rank, shapes)["w"] for step in range(steps) for rank in range(size)) / size
    sent = sum(result["w"] for result in ranks[0][0])
    residuals = sum(state["feedback"]["w"] for _, _, state in ranks) / size
    for _, _, state in ranks:
        for key, residual in state["owner_feedback"].items():
            start, stop = map(int, key[2:-1].split(":"))
            residuals[start:stop] += residual
    torch.testing.assert_close(sent + residuals, given, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sent, given, atol=0.1)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("exchange", ["allgather", "twophase", "summed"])
def test_counted_bytes_are_those_of_the_report_and_of_the_plan(size, exchange):
    policy = Policy("randomk:sparsity=0.9" if exchange == "summed" else "quantize:bits=4", exchange=exchange)
    world = World(size)
    ranks = train(policy, world, steps=2)
    planned = sum(sent for way, sent in Plan(policy, SHAPES, size).wire_bytes().items() if way == exchange)
    for rank, (_, report, _) in enumerate(ranks):
        assert report.wire_bytes == world.sent_bytes[rank]
    assert sum(world.sent_bytes) / 2 == pytest.approx(size * planned, abs=2 * size * len(SHAPES))


@pytest.mark.parametrize("spec", ["quantize:bits=4", "topk:sparsity=0.99", "mask:sparsity=0.99,bits=2"])
def test_two_phase_bytes_do_not_grow_with_the_ranks(spec):
    """At most 2 nbytes (N - 1) / N and two hundredths, shared out evenly, for a model of common shapes."""
    shapes = {f"{i}": shape for i, shape in enumerate([(512, 512), (2048, 512), (512, 2048), (512,), (3000, 64)] * 3)}
    compressor, policy = from_spec(spec), Policy(spec, exchange="twophase")
    whole = sum(compressor.nbytes(torch.Size(shape).numel()) for shape in shapes.values() if shape != (512,))
    for size in (2, 4, 8, 32):
        plan = Plan(policy, shapes, size)
        assert plan.wire_bytes()["twophase"] <= 1.02 * 2 * whole * (size - 1) / size
        load = [0] * size
        for entry in plan.entries.values():
            assert sorted(piece.start for piece in entry.pieces) == [piece.start for piece in entry.pieces]
            for piece in entry.pieces:
                load[piece.owner] += compressor.nbytes(piece.numel)
        assert max(load) < 1.05 * sum(load) / size


def test_pieces_cover_a_parameter_and_small_ones_are_not_cut():
    for spec in ("quantize:bits=1", "topk:sparsity=0.9999", "mask:sparsity=0.5,bits=8"):
        for numel in (1, 1023, 4096, 8191, 8192, 100_000, 1_000_003):
            for size in (1, 2, 7, 100):
                pieces = borders(from_spec(spec), torch.Size((numel,)), size)
                assert pieces[0][0] == 0 and pieces[-1][1] == numel and len(pieces) <= size
                assert all(a[1] == b[0] and a[1] % 1024 == 0 for a, b in zip(pieces, pieces[1:], strict=False))
                assert len(pieces) == 1 or min(stop - start for start, stop in pieces) >= 3072


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_starting_and_waiting_deadlocks(seed, in_order):
    """Many small buckets, long random delays, and a mix of all exchanges."""
    shapes = {f"p{i}": (1100 + 37 * i,) for i in range(16)}
    for spec, exchange in (("randomk:sparsity=0.5", "summed"), ("topk:sparsity=0.5", "twophase")):
        policy = Policy(spec, exchange=exchange, bucket_bytes=12_000)
        ranks = train(policy, World(5, in_order=in_order, seed=seed, delays=20), steps=4, shapes=shapes)
        for results, _, _ in ranks[1:]:
            for one, other in zip(results, ranks[0][0], strict=True):
                assert all(torch.equal(one[name], other[name]) for name in shapes)


def test_the_engine_of_these_tests_sees_operations_out_of_order():
    def run(rank, exchange):
        names = ["a", "b"] if rank else ["b", "a"]
        return [exchange.start(name, torch.ones(2000))() for name in names]

    with pytest.raises(AssertionError, match="another one"):
        run_ranks(World(2, in_order=True), "topk", run)


def test_a_bucket_that_waits_for_a_gradient_says_so():
    def run(rank, exchange):
        exchange.prepare({"a": (2000,), "b": (2000,)})
        return exchange.start("a", torch.ones(2000))()

    with pytest.raises(ExchangeError, match="'a'.* waits for b"):
        run_ranks(World(2), Policy("topk", exchange="twophase"), run)


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_a_non_finite_gradient_is_seen_by_all_and_forgotten(exchange):
    def run(rank, world_exchange):
        seen = []
        for step in range(3):
            gradient = torch.randn(9000, generator=torch.Generator().manual_seed(10 * step + rank))
            if step == 1 and rank == 1:
                gradient[8000] = float("nan")
            seen.append(bool(world_exchange.start("w", gradient)().isfinite().all()))
            world_exchange.end_step()
        state = world_exchange.state_dict()
        residuals = [*state["feedback"].values(), *state["owner_feedback"].values()]
        return seen, all(bool(r.isfinite().all()) for r in residuals)

    for result in run_ranks(World(3), Policy("topk:sparsity=0.9", exchange=exchange), run):
        assert result == ([True, False, True], True)


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped():
    policy = Policy("quantize:bits=2", exchange="twophase")
    whole = train(policy, World(3), steps=4)

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        means = []
        for step in range(4):
            if step == 2:
                state = exchange.state_dict()
                exchange = type(exchange)(policy, exchange.engine)
                exchange.prepare(SHAPES)
                exchange.load_state_dict(state)
            own = gradients(step, rank)
            finish = {name: exchange.start(name, g) for name, g in own.items() if g.numel() >= 1024}
            means.append({name: wait() for name, wait in finish.items()})
            exchange.end_step()
        return means, exchange.state_dict()

    again = run_ranks(World(3), policy, run)
    for (means, _), (expected, _, _) in zip(again, whole, strict=True):
        for one, other in zip(means, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
    states = [state for _, state in again]

    def load_another_ranks(rank, exchange):
        exchange.prepare(SHAPES)
        with pytest.raises(ConfigError, match="that of rank . of 3, expected one that rank"):
            exchange.load_state_dict(states[(rank + 1) % 3])

    run_ranks(World(3), policy, load_another_ranks)


@pytest.mark.parametrize(
    "spec, options, size, expected",
    [
        ("quantize:bits=4", {}, 2, "allgather"),  # nothing to gain
        ("quantize:bits=4", {}, 4, "twophase"),
        ("quantize:bits=4", {}, 32, "twophase"),
        ("topk:sparsity=0.999", {}, 4, "allgather"),  # small: one round is quicker
        ("topk:sparsity=0.999", {}, 256, "twophase"),
        ("quantize:bits=4,rounding=stochastic", {}, 4, "allgather"),  # the second error is not remembered
        ("quantize:bits=4,rounding=stochastic", {}, 32, "twophase"),  # but all-gather sends more than float16
        ("randomk:sparsity=0.9", {}, 2, "summed"),
        ("randomk:sparsity=0.9", {"exchange": "allgather"}, 2, "allgather"),
        ("quantize:bits=4", {"exchange": "allgather"}, 32, "allgather"),
        ("quantize:bits=4", {"exchange": "twophase"}, 2, "twophase"),
    ],
)
def test_the_exchange_is_chosen_by_traits_size_and_ranks(spec, options, size, expected):
    shapes = {"w": (1000, 1000), "v": (500, 1000), "bias": (1000,)}
    plan = Plan(Policy(spec, **options), shapes, size)
    assert {name: entry.exchange for name, entry in plan.entries.items()} == {
        "w": expected, "v": expected, "bias": "allreduce",
    }  # fmt: skip
    assert expected in str(plan) and f"{round(sum(plan.wire_bytes().values())):,} bytes" in str(plan)


def test_an_exchange_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="'summed'.*topk"):
        Policy("topk", exchange="summed")
    with pytest.raises(ConfigError, match="exchange: got 'ring'"):
        Policy("topk", exchange="ring")
    with pytest.raises(ConfigError, match="bucket_bytes"):
        Policy("topk", bucket_bytes=0)


def test_the_plan_is_logged_once_by_rank_0(caplog):
    with caplog.at_level("INFO", logger="gcompress"):
        train(Policy("topk:sparsity=0.9", exchange="twophase"), World(2))
    (record,) = caplog.records
    assert "twophase (topk:sparsity=0.9): 5 tensors" in record.message and "bytes each per step" in record.message


def test_a_compressor_that_looks_at_the_shape_gets_whole_rows():
    class ByRows(type(from_spec("topk"))):
        uses_shape = True

    for size in (2, 3, 8):
        plan = Plan(Policy(ByRows(sparsity=0.9), exchange="twophase"), {"w": (90, 7, 50), "v": (3, 20000)}, size)
        for name, row in (("w", 350), ("v", 20000)):
            entry = plan.entries[name]
            assert len(entry.pieces) == min(size, 7 if name == "w" else 3)
            assert all(piece.start % row == piece.stop % row == 0 for piece in entry.pieces)
            assert all(entry.shape_of(piece) == (piece.numel // row, *entry.shape[1:]) for piece in entry.pieces)


def test_nothing_is_decoded_before_the_ranks_agree():
    """A rank of another configuration is found by comparing them, not by one rank's error over its bytes."""

    def run(rank, exchange):
        exchange.agreed = False
        finish = [exchange.start(f"p{i}", torch.ones(2000)) for i in range(20)]
        waiting = len(exchange._schedule._tasks)
        exchange.agreed = True
        exchange.start("last", torch.ones(2000))
        assert (waiting, len(exchange._schedule._tasks)) == (20, 0)
        return [wait() for wait in finish]

    run_ranks(World(1, delays=0), Policy("topk", exchange="allgather"), run)


STEADY = ("quantize:bits=4", "sign", "onebit", "mxfp4", "topk:sparsity=0.99", "mask:sparsity=0.99,bits=2", "eden")


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
@pytest.mark.parametrize("spec", STEADY)
def test_a_steady_step_allocates_nothing_of_the_gradients_size(spec, exchange):
    """One rank's part: what it allocates are payloads, of up to a seventh of the gradient, at most four at a time."""
    made = GradientExchange(Policy(spec, exchange=exchange), OneRank())
    gradient = torch.randn(512, 1024)
    made.prepare({"w": gradient.shape})
    for step in range(4):
        with Allocations() as allocations:
            result = made.start("w", gradient)()
            made.end_step()
        assert result.data_ptr() == gradient.data_ptr()
        # Two steps begin the residuals, applied and proposed; two-phase has an owner's besides.
        assert step < 2 or allocations.peak < 0.6 * 4 * gradient.numel(), step


def test_a_gradient_that_no_compressor_takes_is_refused_by_name():
    def run(rank, exchange):
        exchange.prepare({"w": (40, 50), "b": (50,)})
        with pytest.raises(ConfigError, match="'b': got one that the policy leaves alone"):
            exchange.start("b", torch.ones(50))
        finish = exchange.start("w", torch.ones(40, 50))
        assert not exchange.open_names - {"w"}
        return finish()

    for result in run_ranks(World(2), Policy("topk:sparsity=0"), run):
        assert torch.equal(result, torch.ones(40, 50))
