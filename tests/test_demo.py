"""DeMo on ranks that are threads: what a step computes, and what a loss scaler and a resumed run see of it."""

import copy
import io

import pytest
import torch

from gcompress import ConfigError, DeMo, NotFiniteError, from_spec
from tests.local_ranks import World, run_ranks

TRANSFORM = "dct:(topk:sparsity=0.99,chunk=4096)"
WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))


def ranks(function, size=2, **options):
    """[function(rank, engine) of each rank]."""
    return run_ranks(World(size, **options), None, lambda rank, exchange: function(rank, exchange.engine))


def gradient(step, rank):
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(100 * step + rank))


def made(engine, rank=0, **options):
    """A parameter, which rank 0's value replaces, and its DeMo."""
    weight = torch.nn.Parameter(WEIGHT + rank)
    return weight, DeMo([("w", weight)], engine, **{"lr": 0.01, "compression": TRANSFORM, **options})


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_a_step_is_that_of_the_paper(decay):
    def train(rank, engine):
        weight, demo = made(engine, rank, decay=decay, weight_decay=0.1)
        for step in range(5):
            weight.grad = gradient(step, rank)
            demo.step()
        assert demo.exchange.report.ratio > 20
        return weight.detach()

    compressor, expected = from_spec(TRANSFORM), WEIGHT.clone()
    momenta = [torch.zeros(64, 96) for _ in range(2)]
    for step in range(5):
        sent = []
        for rank, momentum in enumerate(momenta):
            momentum.mul_(decay).add_(gradient(step, rank))
            sent.append(compressor.decompress(*compressor.compress(momentum)))
            momentum.sub_(sent[-1])
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (sum(sent) / 2).sign()
    found = ranks(train)
    assert torch.equal(found[0], found[1])
    # Where the mean is all but zero, its sign may be that of a rounding error.
    assert ((found[0] - expected).abs() > 1e-5).float().mean() < 0.001


@pytest.mark.parametrize(
    "compression", ["sign", "dct:(chain:(topk:sparsity=0.99,chunk=4096),(sign))", "topk:sparsity=0.9"]
)
def test_other_compressors_take_the_transforms_place(compression):
    def train(rank, engine):
        weight, demo = made(engine, rank, compression=compression)
        for step in range(20):
            weight.grad = 2 * (weight.detach() - 1) + 0.1 * gradient(step, rank)  # towards 1
            demo.step()
        return weight.detach()

    found = ranks(train)
    assert torch.equal(found[0], found[1])
    assert (found[0] - 1).norm() < (WEIGHT - 1).norm()


def test_an_overflow_on_one_rank_is_a_step_of_none():
    def train(rank, engine):
        weight, demo = made(engine)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            demo.zero_grad()
            loss = (weight * gradient(step, rank)).sum()
            scaler.scale(loss).backward()
            if step == 1 and rank == 1:
                weight.grad[0, 0] = float("inf")
            before, memory = weight.detach().clone(), demo.exchange.state_dict()["feedback"].get("w")
            scaler.step(demo)
            scaler.update()
            assert torch.equal(weight, before) == (step == 1)
            if step == 1:
                assert torch.equal(demo.exchange.state_dict()["feedback"]["w"], memory)
        return weight.detach()

    def plain(rank, engine):
        weight, demo = made(engine)
        for step in (0, 2):
            weight.grad = gradient(step, rank)
            demo.step()
        return weight.detach()

    found, expected = ranks(train), ranks(plain)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], expected[0])


def test_without_a_scaler_what_is_not_finite_is_an_error_on_all():
    def train(rank, engine):
        weight, demo = made(engine)
        weight.grad = gradient(0, rank)
        weight.grad[3, 3] = float("nan") if rank == 1 else 0.0
        with pytest.raises(NotFiniteError, match="'w'"):
            demo.step()
        return torch.equal(weight, WEIGHT)

    assert ranks(train) == [True, True]


def test_a_resumed_run_goes_on_to_the_bit():
    def train(rank, engine, state=None, start=0, stop=6):
        weight, demo = made(engine)
        if state is not None:
            saved_weight, saved = torch.load(io.BytesIO(state[rank]), weights_only=True)
            with torch.no_grad():
                weight.copy_(saved_weight)
            demo.load_state_dict(saved)
        for step in range(start, stop):
            weight.grad = gradient(step, rank)
            demo.step()
        file = io.BytesIO()
        torch.save((weight.detach(), copy.deepcopy(demo.state_dict())), file)
        return weight.detach(), file.getvalue()

    whole = ranks(train)
    half = [state for _, state in ranks(lambda rank, engine: train(rank, engine, stop=3))]
    resumed = ranks(lambda rank, engine: train(rank, engine, half, 3))
    assert torch.equal(resumed[0][0], whole[0][0]) and torch.equal(resumed[1][0], whole[1][0])


WRONG = [({"lr": 0}, "lr: got 0"), ({"decay": 2}, "decay: got 2"), ({"weight_decay": -1}, "weight_decay: got -1")]


@pytest.mark.parametrize("options, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ranks(lambda rank, engine: made(engine, **options), size=1)


def test_a_state_of_another_optimizer_is_refused():
    def train(rank, engine):
        _, demo = made(engine)
        with pytest.raises(ConfigError, match="has no 'exchange'"):
            demo.load_state_dict({"state": {}, "param_groups": []})
        return True

    assert ranks(train, size=1) == [True]
