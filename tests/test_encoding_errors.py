"""Errors of encoding, measured on request: what they are, and that measuring them changes nothing."""

import pytest
import torch

from gcompress import ConfigError, Policy, Rule
from gcompress.exchange.encoding_errors import EncodingErrors
from gcompress.exchange.exchange import GradientExchange
from tests.local_ranks import World, run_ranks
from tests.nested import assert_same
from tests.test_times import EVERY_WAY, ONE_BY_ONE, trained


@ONE_BY_ONE
def test_measuring_errors_changes_no_bit_of_results_or_memory(policy):
    plain = run_ranks(World(3), policy, trained)
    measured = run_ranks(World(3), policy, lambda rank, exchange: trained(rank, exchange, measured=1))
    for (results, state), (others, memory) in zip(plain, measured, strict=True):
        assert_same(results, others)
        assert_same(state, memory)


def by_hand(exchange, name, gradient, rank):
    """The error of a deterministic compressor, from what is remembered before the step."""
    entry, residual = exchange.plan.entries[name], exchange.feedback.residual(name)
    corrected = gradient.reshape(-1) + (0 if residual is None else residual)
    turn = (rank - exchange.steps) % exchange.plan.world_size
    pieces = {
        "allgather": [(0, gradient.numel())],
        "twophase": [(piece.start, piece.stop) for piece in entry.pieces],
        "turns": [(piece.start, piece.stop) for piece in entry.pieces if piece.owner == turn],
    }[entry.exchange]
    lost = whole = 0.0
    for start, stop in pieces:
        part = corrected[start:stop]
        sent = entry.compressor.decompress(*entry.compressor.compress(part))
        lost += float((part.double() - sent).square().sum())
        whole += float(part.double().square().sum())
    return lost / whole if pieces else None


@pytest.mark.parametrize("exchange", ["allgather", "twophase", "turns"])
@pytest.mark.parametrize("spec", ["topk:sparsity=0.9", "quantize:bits=2"])
def test_errors_are_what_one_computes_by_hand(spec, exchange):
    """In steps 0 and 2 of three, with a residual in the last; of a gradient that is absent in between, too."""
    policy = Policy(spec, exchange=exchange, error_feedback=True, rules=[Rule(None, name="e")])

    def run(rank, exchange):
        expected, found = [], []

        def before(exchange, own, absent):
            found.append(exchange.report.errors)
            names = [name for name in own if exchange.plan.entries[name].compressor and name not in absent]
            expected.append({name: by_hand(exchange, name, own[name], rank) for name in names})

        trained(rank, exchange, measured=2, between=before)
        found.append(exchange.report.errors)
        return expected, found, exchange.report.encoding_errors.step

    for expected, found, last in run_ranks(World(3), policy, run):
        present = [{name: error for name, error in each.items() if error is not None} for each in expected]
        assert found[0] == {} and last == 2
        for at, step in ((1, 0), (2, 0), (3, 2)):
            assert found[at].keys() == present[step].keys() and "e" not in found[at]
            for name, error in present[step].items():
                assert found[at][name] == pytest.approx(error, rel=1e-5) and 0 < error < 1, (at, name)


def test_errors_of_a_summed_method_are_of_what_this_rank_contributed():
    policy = Policy("randomk:sparsity=0.75", exchange="summed", error_feedback=True)

    def run(rank, exchange):
        exchange.prepare({"w": (4096,)})
        exchange.measure_errors(1)
        gradient = torch.randn(4096, generator=torch.Generator().manual_seed(rank))
        given = gradient.double()
        exchange.start("w", gradient)()
        exchange.end_step()
        lost = exchange.feedback.residual("w").double()
        return exchange.report.errors["w"], float(lost.square().sum() / given.square().sum())

    for error, expected in run_ranks(World(2), policy, run):
        assert error == pytest.approx(expected, rel=1e-6) and 0.1 < error


@pytest.mark.parametrize("policy", EVERY_WAY[:3], ids=["allgather", "twophase", "turns"])
def test_errors_of_zeros_of_absent_gradients_and_of_what_is_not_finite(policy):
    def run(rank, exchange):
        exchange.prepare({"zero": (2048,), "absent": (2048,), "nan": (2048,)})
        exchange.measure_errors(1)
        given = {"zero": torch.zeros(2048), "absent": torch.zeros(2048), "nan": torch.full((2048,), float("nan"))}
        for finish in [exchange.start(name, each, absent=name == "absent") for name, each in given.items()]:
            finish()
        exchange.end_step()
        return exchange.report.errors

    (errors,) = run_ranks(World(1), policy, run)
    assert errors.keys() == {"zero", "nan"} and errors["zero"] == 0.0 and errors["nan"] != errors["nan"]


def test_nothing_is_measured_that_nobody_asked_for(monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr("gcompress.exchange.exchange.add_errors", unexpected)
    monkeypatch.setattr(EncodingErrors, "add", unexpected)
    for policy in EVERY_WAY:
        run_ranks(World(2), policy, trained)

    def stopped(rank, exchange):
        exchange.measure_errors(1)
        exchange.measure_errors(0)
        trained(rank, exchange)

    run_ranks(World(2), EVERY_WAY[0], stopped)
    for wrong in (-1, 1.5, None, True):
        with pytest.raises(ConfigError, match="every: got"):
            GradientExchange(None).measure_errors(wrong)
