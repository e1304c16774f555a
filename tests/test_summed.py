"""Methods that an all-reduce sums: exact integers, and low rank that survives what gradients do."""

import pytest
import torch

from gcompress import ConfigError, LowRank, Policy, SharedScale, backends
from gcompress.compressors.lowrank import matrix_sides, orthonormal
from gcompress.compressors.shared import pack_fields, unpack_fields, word_count
from tests.compressors import same_or_nan
from tests.local_ranks import World, run_ranks


def gradients(rank, step=0, shape=(60, 50)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + rank)) * (1 + rank)


def sum_by_hand(compressor, tensors, memories=None, seed=5):
    """(total, owns) of the generator's protocol, run in this thread; every rank's total must be the same."""
    size = len(tensors)
    memories = memories or [{} for _ in tensors]
    rounds = [
        compressor.sum_rounds(t.reshape(-1), shape=t.shape, seed=seed, world_size=size, memory=memory)
        for t, memory in zip(tensors, memories, strict=True)
    ]
    sent, handed = [next(steps) for steps in rounds], 0
    while True:
        handed += sent[0][0].numel() * sent[0][0].element_size()
        stacked = torch.stack([tensor for tensor, _ in sent])
        summed = stacked.sum(0) if sent[0][1] == "sum" else stacked.amax(0)
        results = []
        for number, steps in enumerate(rounds):
            try:
                sent[number] = steps.send(summed.clone())
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            assert len(results) == size and all(same_or_nan(total, results[0][0]) for total, _ in results)
            return results[0][0], [own for _, own in results], handed


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("size", [2, 3, 4, 16, 127, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_sum_exactly(backend, size, bits):
    """Also where every rank's entry is the largest: the sum needs the whole width."""
    with backends.use_backend(backend):
        compressor = SharedScale(bits=bits, bucket=100)
        tensors = [gradients(rank, shape=(523,)) for rank in range(size)]
        for tensor in tensors:
            tensor[:7], tensor[100:107] = 400.0, -400.0
        total, owns, handed = sum_by_hand(compressor, tensors)
        assert handed == compressor.summed_nbytes(tensors[0].shape, size)
        scales = torch.stack([t.abs() for t in tensors]).amax(0)
        scales = torch.nn.functional.pad(scales, (0, 77)).view(6, 100).amax(1).repeat_interleave(100)[:523]
        limit = 2 ** (bits - 1) - 1
        steps = scales / torch.full_like(scales, float(limit))
        codes = torch.stack([torch.round(own / steps) for own in owns])
        assert int(codes.abs().max()) <= limit
        assert torch.equal(total, codes.sum(0) * steps)
        assert all(bool(((own - t).abs() <= steps * 0.5001).all()) for own, t in zip(owns, tensors, strict=True))


def test_all_backends_sum_to_the_same_bits():
    for spec in (
        SharedScale(bits=4),
        SharedScale(bits=3, rounding="stochastic", bucket=0),
        LowRank(rank=3, exchanges=2),
    ):
        tensors = [gradients(rank, shape=(97, 83)) for rank in range(5)]
        results = []
        for backend in backends.available_backends():
            with backends.use_backend(backend):
                total, owns, _ = sum_by_hand(spec, tensors)
            results.append(torch.stack([total, *owns]))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("width", range(2, 25))
def test_fields_come_back_and_never_carry_into_each_other(width):
    for numel in (1, 63, 64, 64 * (64 // width), 64 * (64 // width) + 1, 5000):
        top = 2 ** (width - 1) - 1
        codes = torch.randint(-top, top + 1, (numel,), generator=torch.Generator().manual_seed(numel))
        codes[::3], codes[1::5] = top, -top
        words = pack_fields(codes, width)
        assert words.numel() == word_count(numel, width)
        assert torch.equal(unpack_fields(words, numel, width), codes)


def test_stochastic_rounding_of_ranks_averages_out():
    compressor, size = SharedScale(bits=2, bucket=0, rounding="stochastic"), 8
    tensors = [gradients(0, shape=(400,)) + 0.01 * gradients(rank, 1, (400,)) for rank in range(size)]
    exact = torch.stack(tensors).sum(0)
    totals = torch.stack([sum_by_hand(compressor, tensors, seed=seed)[0] for seed in range(300)])
    z = (totals.mean(0) - exact) / (totals.std(0) / 300**0.5).clamp(min=1e-3)
    assert z.abs().max() < 6 and z.square().mean() < 1.3
    # Errors of ranks that rounded alike would add up to eight times one's, and not to sqrt(8) times.
    alone = torch.stack([sum_by_hand(compressor, tensors[:1], seed=seed)[0] for seed in range(300)])
    assert totals.std(0).mean() < 4 * alone.std(0).mean()


def test_too_many_ranks_are_refused():
    with pytest.raises(ConfigError, match="bits: got 8"):
        SharedScale(bits=8).width(2**20)


@pytest.mark.parametrize("exchanges", [1, 2])
def test_low_rank_finds_a_matrix_of_its_rank_and_improves_from_step_to_step(exchanges):
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(60, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    tensors = [thin * 0.7, thin * 0.3]
    memories, errors = [{}, {}], []
    for step in range(4):
        total, _, handed = sum_by_hand(LowRank(rank=3, exchanges=exchanges), tensors, memories, seed=step)
        errors.append(float((total.view(60, 50) - thin).norm() / thin.norm()))
        side = {1: (50, 60)[step % 2 == 0], 2: 110}[exchanges]
        assert handed == 4 * 3 * side
    assert errors[1] < 1e-5 and errors[-1] < 1e-5
    noisy = thin + 0.5 * torch.randn(60, 50, generator=generator)
    best = float(torch.linalg.svdvals(noisy)[3:].norm())
    for step in range(12):
        total, _, _ = sum_by_hand(LowRank(rank=3, exchanges=exchanges), [noisy], memories[:1], seed=step)
    assert float((total.view(60, 50) - noisy).norm()) < 1.02 * best


@pytest.mark.parametrize("exchanges", [1, 2])
def test_neither_zeros_nor_a_step_that_is_not_finite_poison_low_rank(exchanges):
    """Through the real exchange, with its memories put back and its error feedback."""
    policy = Policy(LowRank(rank=2, exchanges=exchanges), exchange="summed")

    def run(rank, exchange):
        seen = []
        for step in range(12):
            gradient = gradients(rank, step)
            if step < 3:
                gradient = torch.zeros(60, 50)
            if step in (5, 6) and rank == 1:
                gradient[17, 3] = float("nan") if step == 5 else float("inf")
            seen.append(exchange.start("w", gradient)())
            exchange.end_step()
        return seen, exchange.state_dict()

    (one, state), (two, _) = run_ranks(World(2), policy, run)
    for step in range(12):
        assert same_or_nan(one[step], two[step])
        assert bool(one[step].isfinite().all()) == (step not in (5, 6))
        assert (one[step] == 0).all() == (step < 3)
    assert state["memories"]["w"]["basis"].isfinite().all()
    assert state["feedback"]["w"].isfinite().all()


def test_what_low_rank_did_not_send_comes_later():
    policy = Policy(LowRank(rank=4), exchange="summed")
    constant = [gradients(rank) for rank in range(2)]

    def run(rank, exchange):
        total = 0
        for _ in range(150):
            total = total + exchange.start("w", constant[rank].clone())()  # the result is written there
            exchange.end_step()
        return total / 150

    mean = (constant[0] + constant[1]) / 2
    for found in run_ranks(World(2), policy, run):
        assert (found - mean).norm() < 0.12 * mean.norm()


def test_a_gradient_whose_factors_are_not_smaller_is_sent_as_it_is():
    tensors = [gradients(rank, shape=(8, 6)) for rank in range(2)]
    total, owns, handed = sum_by_hand(LowRank(rank=4), tensors)
    assert handed == 4 * 48 == LowRank(rank=4).summed_nbytes(tensors[0].shape, 2)
    assert torch.equal(total, tensors[0].view(-1) + tensors[1].view(-1)) and torch.equal(owns[1], tensors[1].view(-1))


def test_a_basis_is_orthonormal_whatever_it_spans():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(40, 5, generator=generator)
    for matrix in (
        full,
        full * 1e-30,
        full[:, :1].expand(40, 5),
        torch.zeros(40, 5),
        torch.eye(40)[:, [3, 3, 7, 7, 7]],
    ):
        basis = orthonormal(matrix, seed=1)
        torch.testing.assert_close(basis.t() @ basis, torch.eye(5), atol=1e-6, rtol=0)
        kept = basis @ (basis.t() @ matrix)
        torch.testing.assert_close(kept, matrix, atol=1e-5 * float(matrix.abs().max()), rtol=1e-5)
    assert matrix_sides(torch.Size((32, 16, 3, 3))) == (32, 144)
    assert matrix_sides(torch.Size((1024,))) == (32, 32)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    "spec, rounds", [("randomk:sparsity=0.75", 1), ("shared:bits=4", 2), ("lowrank:rank=2,exchanges=2", 2)]
)
def test_gradients_that_travel_together_are_one_sum_a_round(spec, rounds, in_order):
    """With the results of each by itself, by `start` and by `start_bucket`, where some have another compressor."""
    shapes = {"a": (40, 50), "b": (7,), "other": (900,), "c": (30, 20, 2), "d": (1200,)}

    def train(policy, whole):
        def run(rank, exchange):
            lanes, allreduce = [], exchange.engine.allreduce
            exchange.engine.allreduce = lambda name, lane, *given: lanes.append(lane) or allreduce(name, lane, *given)
            exchange.prepare({name: torch.Size(shape) for name, shape in shapes.items()})
            means = []
            for step in range(3):
                mine = {name: gradients(rank, step, shape) for name, shape in shapes.items()}
                if whole:
                    means.append(exchange.start_bucket(mine)())
                else:
                    finish = {name: exchange.start(name, gradient) for name, gradient in mine.items()}
                    means.append({name: each() for name, each in finish.items()})
                exchange.end_step()
                assert all(means[-1][name].data_ptr() == mine[name].data_ptr() for name in shapes), "not in its place"
            return means, lanes

        return run_ranks(World(3, in_order=in_order), policy, run)

    policy = f"{spec}; name=other -> randomk:sparsity=0.5; min_numel=0; exchange=summed; error_feedback=true"
    alone = train(f"{policy}; bucket_bytes=1", False)
    for whole in (False, True):
        for (means, lanes), (expected, _) in zip(train(policy, whole), alone, strict=True):
            assert len(lanes) == 3 * (rounds + 1) and max(lanes) == rounds - 1
            for one, other in zip(means, expected, strict=True):
                assert all(torch.equal(one[name], other[name]) for name in shapes)
    assert len(alone[0][1]) > 3 * (rounds + 1)
