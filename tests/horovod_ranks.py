"""What the ranks of tests/test_horovod.py run: `horovodrun -np N python horovod_ranks.py OUT SCENARIO…`.

Each scenario trains a few steps and checks on every rank; rank 0 writes {scenario: "ok" or
the error} to OUT. The expected mean is computed from what each rank encoded, all-gathered
as plain float32 by Horovod itself.
"""

import functools
import sys
import zlib

import gcompress.plugins.horovod as gcompress_hvd
import horovod.torch as hvd
import torch

import gcompress
from gcompress import MaskSparse, Policy, Quantize, RandomK, TopK
from gcompress.exchange.plan import Plan
from tests.patience import wait_patiently
from tests.processes import expect_error
from tests.scenarios import Scenarios, run_scenarios
from tests.simulation import Simulation

SCENARIOS = scenario = Scenarios()


def make_model(seed=0, width=60):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(40, width), torch.nn.ReLU(), torch.nn.Linear(width, 50, bias=False))


def make_optimizer(model, compression, **keywords):
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    return hvd.DistributedOptimizer(
        base, named_parameters=model.named_parameters(), compression=compression, **keywords
    )


def backward(model, step, rank=None, batches=1):
    for batch in range(batches):
        generator = torch.Generator().manual_seed(1000 * step + 10 * (hvd.rank() if rank is None else rank) + batch)
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()


def local_gradients(step, rank, batches=1, width=60):
    """The gradients rank `rank` computes in `step`, from a model of its own (weights never change here)."""
    model = make_model(width=width)
    backward(model, step, rank, batches)
    return {name: p.grad for name, p in model.named_parameters()}


def expected_means(policy, steps, average=True, batches=1, ranks=None, width=60):
    """Simulate all ranks in this process; see simulation.py."""
    ranks = range(hvd.size()) if ranks is None else ranks
    shapes = {name: p.shape for name, p in make_model(width=width).named_parameters()}
    plan = Plan(policy, shapes, len(ranks))
    simulation = Simulation(plan, average)
    for step in range(steps):
        gradients = [local_gradients(step, rank, batches, width) for rank in ranks]
        small = [name for name, entry in plan.entries.items() if entry.compressor is None]
        plain = {name: sum(rank.pop(name) for rank in gradients) for name in small}
        scale = 1 / len(ranks) if average else 1.0
        yield {**simulation.means(gradients), **{name: total * scale for name, total in plain.items()}}


def check_steps(policy, steps=3, average=True, batches=1, width=60, **keywords):
    """Real optimizer steps against the simulation, to the bit where the policy compresses."""
    policy = gcompress.as_policy(policy)
    model = make_model(width=width)
    optimizer = make_optimizer(model, policy, **keywords)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, expected in enumerate(expected_means(policy, steps, average, batches, width=width)):
        optimizer.zero_grad()
        backward(model, step, batches=batches)
        optimizer.synchronize()
        for name, p in model.named_parameters():
            if policy.compressor_for(name, p.numel()):
                assert torch.equal(p.grad, expected[name]), (step, name, (p.grad - expected[name]).abs().max())
            else:
                torch.testing.assert_close(p.grad, expected[name])
        with optimizer.skip_synchronize():
            optimizer.step()
        for name, p in model.named_parameters():
            p.data.copy_(start[name])  # the simulation's weights stand still
    return optimizer


@scenario
def mask_with_feedback():
    optimizer = check_steps(Policy(MaskSparse(sparsity=0.95, bits=2)))
    report = gcompress_hvd.exchange(optimizer).report
    compressor = MaskSparse(sparsity=0.95, bits=2)
    per_step = compressor.nbytes(2400) + compressor.nbytes(3000) + 4 * 60
    assert (report.steps, report.last_step_bytes, report.sent_bytes) == (3, per_step, 3 * per_step), report
    assert report.fp32_bytes == 3 * 4 * (2400 + 3000 + 60), report
    n = hvd.size()
    assert report.wire_bytes == 3 * ((n - 1) * (per_step - 240) + 2 * (n - 1) * 240 // n), report


@scenario
def topk_and_quantize():
    check_steps(TopK(sparsity=0.9))
    check_steps("quantize:bits=3,bucket=64")
    check_steps(Policy(Quantize(bits=4), min_numel=0, error_feedback=False))


@scenario
def summed_by_horovods_own_all_reduce():
    """RandomK: the same entries on all ranks; what was dropped comes later, and a NaN is seen by all."""
    model, compressor = make_model(), RandomK(sparsity=0.75)
    optimizer = make_optimizer(model, compressor)
    exchange = gcompress_hvd.exchange(optimizer)
    residual = {rank: torch.zeros(2400) for rank in range(hvd.size())}
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        seed = zlib.crc32(f"0.weight/{step}".encode())
        expected = torch.zeros(2400)
        for rank in residual:
            corrected = local_gradients(step, rank)["0.weight"].view(-1) + residual[rank]
            own = compressor.decompress(*compressor.compress(corrected, seed=seed))
            residual[rank] = corrected - own
            expected += own / hvd.size()
        torch.testing.assert_close(model[0].weight.grad.view(-1), expected)
        exchange.applied()
        assert torch.equal(exchange.state_dict()["feedback"]["0.weight"], residual[hvd.rank()])
        assert same_on_all_ranks(model[0].weight.grad)
    assert exchange.report.last_step_bytes == 4 * (600 + 750 + 60)
    optimizer.zero_grad()
    (model(torch.randn(8, 40)).square().mean() * (float("nan") if hvd.rank() == 1 else 1.0)).backward()
    optimizer.synchronize()
    assert not any(model[i].weight.grad.isfinite().all() for i in (0, 2))


@scenario
def integers_and_low_rank_by_horovods_own_all_reduce():
    """Exact where the method is: sums of integers, and a gradient of rank 1 once its space is found."""
    for compressor, tolerance in ((gcompress.SharedScale(bits=8), 0.02), (gcompress.LowRank(rank=2), 1e-3)):
        parameter = torch.nn.Parameter(torch.zeros(64, 48))
        base = torch.optim.SGD([parameter], lr=1.0)
        name = f"summed.{compressor.name}"
        policy = Policy(compressor, error_feedback=False)
        optimizer = hvd.DistributedOptimizer(base, named_parameters=[(name, parameter)], compression=policy)
        direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) @ torch.linspace(-1, 1, 48).view(
            1, 48
        )
        for _ in range(3):
            parameter.grad = None
            (parameter * direction * (1.0 + hvd.rank())).sum().backward()
            optimizer.synchronize()
            gcompress_hvd.exchange(optimizer).applied()
        mean = direction * (1 + hvd.size()) / 2
        assert (parameter.grad - mean).norm() < tolerance * mean.norm(), compressor
        assert same_on_all_ranks(parameter.grad)
        expected = compressor.summed_nbytes(parameter.shape, hvd.size())
        assert gcompress_hvd.exchange(optimizer).report.last_step_bytes == expected


def same_on_all_ranks(tensor):
    rows = hvd.allgather(tensor.reshape(1, -1).view(torch.int32), name="same")
    return bool((rows == rows[0]).all())


@scenario
def payloads_of_unequal_sizes():
    optimizer = check_steps("threshold:threshold=0.002")
    sizes = hvd.allgather(torch.tensor([gcompress_hvd.exchange(optimizer).report.sent_bytes]), name="sizes")
    assert len(set(sizes.tolist())) > 1, sizes


@scenario
def momentum_correction_and_warm_up():
    check_steps(Policy(TopK(sparsity=0.95), momentum=0.9, warmup_steps=2, clip=0.01))
    check_steps(Policy("quantize:bits=4", rules=[gcompress.Rule("topk:sparsity=0.9", name="0.*")]))
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    expect_error(
        gcompress.ConfigError,
        "parameter_groups",
        lambda: hvd.DistributedOptimizer(base, model.named_parameters(), compression=Policy("topk", momentum=0.9)),
    )


@scenario
def sum_predivide_and_passes():
    check_steps(TopK(sparsity=0.9), op=hvd.Sum, average=False)
    check_steps(Policy(TopK(sparsity=0.9), exchange="twophase"), op=hvd.Sum, average=False)
    check_steps(TopK(sparsity=0.9), gradient_predivide_factor=2.0)
    check_steps(TopK(sparsity=0.9), backward_passes_per_step=2, batches=2)


@scenario
def two_phases():
    """Sparse and dense, in one bucket and in several; what is counted is what the plan expects."""
    for spec in ("topk:sparsity=0.9", "quantize:bits=4", "quantize:bits=3,rounding=stochastic"):
        for bucket_bytes in (1 << 20, 1):
            policy = Policy(spec, exchange="twophase", bucket_bytes=bucket_bytes)
            exchange = gcompress_hvd.exchange(check_steps(policy, width=300))
            assert len(exchange.plan.buckets) == (2 if bucket_bytes == 1 else 1)
            pieces = {piece.owner for entry in exchange.plan.entries.values() for piece in entry.pieces}
            assert len(pieces) == hvd.size(), "some rank owns nothing"
            sent = hvd.allreduce(torch.tensor(float(exchange.report.wire_bytes)), op=hvd.Average, name="sent")
            expected = 3 * sum(exchange.plan.wire_bytes().values())
            assert abs(float(sent) - expected) < 32, (float(sent), expected)
    check_steps(Policy("topk:sparsity=0.9", exchange="twophase"))  # one owner for each
    check_steps(Policy("topk:sparsity=0.9", exchange="twophase"), groups=2, width=300)


@scenario
def groups():
    check_steps(MaskSparse(sparsity=0.9, bits=3), groups=2)
    model = make_model()
    optimizer = make_optimizer(model, TopK(sparsity=0.9), groups=[[model[0].weight, model[2].weight]])
    # A group of which only one member's hook fires: the rest must not wait for it.
    (model[0].weight.sum() * (hvd.rank() + 1)).backward()
    optimizer.step()


@scenario
def process_sets():
    members = [0, hvd.size() - 1]
    process_set = hvd.add_process_set(members)
    for policy in (gcompress.as_policy("topk:sparsity=0.9"), Policy("topk:sparsity=0.9", exchange="twophase")):
        model = make_model()
        optimizer = make_optimizer(model, policy, process_set=process_set)
        backward(model, 0)
        optimizer.synchronize()
        if hvd.rank() in members:
            (expected,) = expected_means(policy, 1, ranks=members)
            assert torch.equal(model[2].weight.grad, expected["2.weight"])
    hvd.remove_process_set(process_set)


@scenario
def any_order_of_hooks():
    """Each rank's hooks fire in another order, with stalls, and one parameter is unused on some ranks."""
    for spec, exchange in (
        ("topk:sparsity=0.5", "allgather"),
        ("topk:sparsity=0.5", "twophase"),
        ("randomk", "summed"),
    ):
        train_in_any_order(Policy(spec, exchange=exchange, bucket_bytes=10_000))


def train_in_any_order(policy):
    import random
    import time

    parameters = [torch.nn.Parameter(torch.zeros(1100 + i)) for i in range(12)]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0), named_parameters=named, compression=policy
    )
    random.seed(hvd.rank())
    for step in range(6):
        optimizer.zero_grad()  # sets gradients to None
        order = list(range(len(parameters)))
        random.shuffle(order)
        for i in order:
            if i == step and hvd.rank() % 2 == 0:
                continue
            (parameters[i] * float(hvd.rank() + 1 + i)).sum().backward()
            time.sleep(random.random() * 0.002)
        optimizer.synchronize()
        sums = [hvd.allreduce(p.grad, name=f"check{i}", op=hvd.Sum) for i, p in enumerate(parameters)]
        for p, total in zip(parameters, sums, strict=True):
            assert torch.equal(p.grad * hvd.size(), total), "ranks hold different means"
        with optimizer.skip_synchronize():
            optimizer.step()


@scenario
def exchanges_start_during_the_backward_pass():
    """When the first layer's gradient is computed, the last layer's payload is under way or has arrived."""
    compressor = TopK(sparsity=0.9)
    for exchange in ("allgather", "twophase"):
        model, sent = make_model(), []
        optimizer = make_optimizer(model, Policy(compressor, exchange=exchange, bucket_bytes=1))
        report = gcompress_hvd.exchange(optimizer).report
        model[0].weight.register_hook(lambda gradient, report=report, sent=sent: sent.append(report.sent_bytes))
        backward(model, 0)
        optimizer.step()
        assert sent[0] >= compressor.nbytes(3000), "the last layer's payload waits"
        assert report.sent_bytes - sent[0] >= compressor.nbytes(2400), "the first layer's was not counted then"


@scenario
def other_types():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        parameter = torch.nn.Parameter(torch.zeros(2048, dtype=dtype))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0), named_parameters=[(f"w{dtype}", parameter)],
            compression=TopK(sparsity=0.5),
        )  # fmt: skip
        (parameter[:100] * (hvd.rank() + 1)).sum().backward()
        optimizer.synchronize()
        expected = torch.zeros(2048, dtype=dtype)
        expected[:100] = (hvd.size() + 1) / 2
        assert parameter.grad.dtype == dtype and torch.equal(parameter.grad, expected)


@scenario
def non_finite_is_seen_and_forgotten():
    """A NaN on one rank is seen by all, no memory keeps it, and the next step is clean."""
    model = make_model()
    optimizer = make_optimizer(model, MaskSparse(sparsity=0.9, bits=2))
    exchange = gcompress_hvd.exchange(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        exchange.applied()
        before = {name: t.clone() for name, t in exchange.state_dict()["feedback"].items()}
        optimizer.zero_grad()
        poison = float("nan") if hvd.rank() == 1 else 1.0
        (model(torch.randn(8, 40)).square().mean() * poison).backward()
        optimizer.synchronize()
        assert not any(p.grad.isfinite().all() for p in (model[0].weight, model[2].weight))
        exchange.applied()
        after = exchange.state_dict()["feedback"]
        if hvd.rank() == 1:
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(t.isfinite().all() for t in after.values())


@scenario
def state_per_rank():
    """Training that is saved and loaded goes on exactly as if it had not been interrupted."""
    model, copy = make_model(), make_model()
    optimizer = make_optimizer(model, Quantize(bits=2, rounding="stochastic"))
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    state = gcompress_hvd.exchange(optimizer).state_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    copy.load_state_dict(weights)
    other = make_optimizer(copy, Quantize(bits=2, rounding="stochastic"))
    gcompress_hvd.exchange(other).load_state_dict(state)
    backward(copy, 2)
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))
    wrong = gcompress_hvd.exchange(make_optimizer(make_model(), TopK(sparsity=0.9)))
    expect_error(gcompress.ConfigError, "topk", lambda: wrong.load_state_dict(state))


@scenario
def sparse_gradients():
    def run(sparse_as_dense):
        table = torch.nn.Embedding(200, 16, sparse=True)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(table.parameters(), lr=1.0), named_parameters=table.named_parameters(),
            compression=TopK(sparsity=0.5), sparse_as_dense=sparse_as_dense,
        )  # fmt: skip
        table(torch.tensor([hvd.rank()])).sum().backward()
        optimizer.synchronize()
        expected = torch.zeros(200, 16)
        expected[: hvd.size()] = 1 / hvd.size()
        assert torch.equal(table.weight.grad.to_dense(), expected)

    run(True)
    expect_error(gcompress.ConfigError, "sparse_as_dense", lambda: run(False))


@scenario
def sparse_gradients_that_no_compressor_takes_are_passed_on():
    table = torch.nn.Embedding(200, 16, sparse=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=1.0), named_parameters=[("passed.on", table.weight)],
        compression="topk:sparsity=0.5; name=passed.* -> none",
    )  # fmt: skip
    table(torch.tensor([hvd.rank(), 7])).sum().backward()
    optimizer.synchronize()
    dense = table.weight.grad.to_dense()
    assert table.weight.grad.is_sparse and torch.equal(dense[7], torch.ones(16))
    assert torch.equal(dense[: hvd.size()], torch.full((hvd.size(), 16), 1 / hvd.size()))
    assert gcompress_hvd.exchange(optimizer).report.sent_bytes == 2 * 8 + 2 * 16 * 4


@scenario
def complex_parameters_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(2000, dtype=torch.complex64))
    base = torch.optim.SGD([parameter], lr=1.0)
    make = lambda: hvd.DistributedOptimizer(base, [("waves", parameter)], compression="topk")  # noqa: E731
    expect_error(gcompress.ConfigError, "'waves': got torch.complex64", make)


@scenario
def adasum_is_refused():
    expect_error(gcompress.ConfigError, "Adasum", lambda: make_optimizer(make_model(), TopK(), op=hvd.Adasum))


@scenario
def stock_compression_is_counted():
    for compression, size in ((hvd.Compression.none, 4), (hvd.Compression.fp16, 2)):
        model = make_model()
        optimizer = make_optimizer(model, compression)
        backward(model, 0)
        optimizer.step()
        assert gcompress_hvd.exchange(optimizer).report.sent_bytes == size * (2400 + 60 + 3000)


@scenario
def sparse_gradients_of_stock_horovod_are_counted():
    table = torch.nn.Embedding(200, 16, sparse=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=1.0), named_parameters=[("stock.sparse", table.weight)]
    )
    table(torch.tensor([hvd.rank(), 7])).sum().backward()
    optimizer.step()
    assert gcompress_hvd.exchange(optimizer).report.sent_bytes == 2 * 8 + 2 * 16 * 4


@scenario
def join_when_all_are_done():
    model = make_model()
    optimizer = make_optimizer(model, TopK(sparsity=0.9))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert 0 <= hvd.join() < hvd.size()
    optimizer.zero_grad()
    backward(model, 9)
    expect_error(gcompress.ExchangeError, "under way", hvd.join)
    optimizer.step()


def main():
    out, names = sys.argv[1], sys.argv[2:]
    hvd.init()
    wait_patiently()
    gather = functools.partial(hvd.allgather_object, name="failures")
    run_scenarios({name: SCENARIOS[name] for name in names or SCENARIOS}, out, hvd.rank(), gather)


if __name__ == "__main__":
    main()
