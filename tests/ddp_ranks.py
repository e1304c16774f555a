"""What the ranks of tests/test_ddp.py run: `torchrun … ddp_ranks.py OUT SCENARIO…`.

Each scenario trains a few steps with DistributedDataParallel on Gloo and checks on every
rank; rank 0 writes {scenario: "ok" or the error} to OUT.
"""

import copy
import datetime
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

import gcompress
from gcompress import Policy
from gcompress.exchange.plan import Plan
from tests import ddp_auto, ddp_late, ddp_torch_expects, ddp_uses  # noqa: F401
from tests.ddp_tools import SCENARIOS, backward, make_model, rank_and_gather, same_on_all_ranks, scenario, wrapped
from tests.processes import expect_error
from tests.scenarios import run_scenarios
from tests.simulation import Simulation

SECONDS = 60  # of the job's time-out: ranks of a busy machine meet late


def check_steps(policy, steps=4, ranks=None, **options):
    """Steps of DDP, whose buckets are rebuilt after the first, against a simulation of all ranks."""
    ranks = ranks or range(dist.get_world_size())
    policy, model, alone = gcompress.as_policy(policy), make_model(), make_model()
    plan = Plan(policy, {name: p.shape for name, p in model.named_parameters()}, len(ranks))
    simulation = Simulation(plan)
    parallel, state = wrapped(model, policy, **options)
    for step in range(steps):
        gradients = []
        for rank in ranks:
            backward(alone, step, rank)
            gradients.append({name: p.grad.clone() for name, p in alone.named_parameters()})
        backward(parallel, step, dist.get_rank())
        small = [name for name, entry in plan.entries.items() if entry.compressor is None]
        plain = {name: sum(rank.pop(name) for rank in gradients) / len(ranks) for name in small}
        expected = simulation.means(gradients)
        for name, p in model.named_parameters():
            if name in plain:
                torch.testing.assert_close(p.grad, plain[name])
            elif plan.entries[name].exchange == "summed":
                torch.testing.assert_close(p.grad, expected[name])
            else:
                assert torch.equal(p.grad, expected[name]), (step, name)
        state.exchange.applied()  # the simulation's weights stand still
    return state


@scenario
def every_exchange_gives_what_a_simulation_gives():
    for exchange in ("allgather", "twophase"):
        for spec in ("topk:sparsity=0.9", "quantize:bits=4", "quantize:bits=3,rounding=stochastic"):
            state = check_steps(Policy(spec, exchange=exchange))
            report, plan = state.exchange.report, state.exchange.plan
            sent = torch.tensor(float(report.wire_bytes))
            dist.all_reduce(sent)
            expected = 4 * dist.get_world_size() * sum(plan.wire_bytes().values())
            assert abs(float(sent) - expected) < 100, (float(sent), expected)
    check_steps("randomk:sparsity=0.75")
    check_steps("threshold:threshold=0.002")
    rules = [gcompress.Rule("topk:sparsity=0.9", name="0.*"), gcompress.Rule("randomk", name="2.*")]
    check_steps(Policy("quantize:bits=4", rules=rules, exchange="twophase", min_numel=10))


@scenario
def some_of_the_ranks():
    for ranks in ([0, 1], [1, 2, 3]):
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            check_steps(Policy("topk:sparsity=0.9", exchange="twophase"), ranks=ranks, process_group=group)


@scenario
def stalls_and_unused_parameters():
    """Each rank stalls elsewhere in its backward pass, and one layer is unused on some ranks."""

    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(6))

        def forward(self, x, skipped):
            for number, layer in enumerate(self.layers):
                x = x if number == skipped else layer(x).relu()
            return x

    random.seed(dist.get_rank())
    for exchange in ("allgather", "twophase"):
        torch.manual_seed(0)
        policy = Policy("topk:sparsity=0.5", exchange=exchange)
        model, _ = wrapped(Branches(), policy, find_unused_parameters=True)
        for p in model.parameters():
            p.register_hook(lambda gradient: time.sleep(random.random() * 0.003))
        for step in range(5):
            model.zero_grad()
            skipped = step if dist.get_rank() % 2 == 0 else None
            model(torch.randn(4, 40), skipped).square().mean().backward()
            for p in model.parameters():
                assert same_on_all_ranks(p.grad)


@scenario
def exchanges_run_during_the_backward_pass():
    """When the first layer's gradient is computed, payloads of the last ones are under way."""
    model, state = wrapped(make_model(), Policy("topk:sparsity=0.9", exchange="twophase"))
    backward(model, 0, dist.get_rank())
    first, sent = next(model.parameters()), []
    before = state.exchange.report.sent_bytes
    first.register_hook(lambda gradient: sent.append(state.exchange.report.sent_bytes - before))
    backward(model, 1, dist.get_rank())
    assert 0 < sent[0] < state.exchange.report.sent_bytes - before


@scenario
def training_goes_on_from_a_saved_state_to_the_bit():
    policy = Policy("quantize:bits=2", exchange="twophase")
    model, state = wrapped(make_model(), policy)
    for step in range(3):
        backward(model, step, dist.get_rank())
        state.exchange.applied()
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other, other_state = wrapped(make_model(), policy)  # its buckets are not rebuilt yet
    other_state.load_state_dict(torch.load(file, weights_only=True))
    for step in (3, 4):
        for each, its_state in ((model, state), (other, other_state)):
            backward(each, step, dist.get_rank())
            its_state.exchange.applied()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) or p.numel() < 1024
    assert other_state.exchange.report == state.exchange.report


@scenario
def a_non_finite_gradient_is_seen_by_all_and_forgotten():
    model, state = wrapped(make_model(), Policy("topk:sparsity=0.9", exchange="twophase"))
    for step in range(3):
        x = torch.randn(8, 40)
        model.zero_grad()
        poison = float("nan") if step == 1 and dist.get_rank() == 1 else 1.0
        (model(x).square().mean() * poison).backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters()) == (step != 1)
        state.exchange.applied()
    saved = state.state_dict()
    assert all(r.isfinite().all() for r in [*saved["feedback"].values(), *saved["owner_feedback"].values()])


@scenario
def other_types():
    for dtype in (torch.bfloat16, torch.float64):
        model = make_model().to(dtype)
        parallel, _ = wrapped(model, Policy("topk:sparsity=0.5", exchange="twophase"))
        parallel(torch.ones(8, 40, dtype=dtype) * (dist.get_rank() + 1)).square().mean().backward()
        assert all(p.grad.dtype == dtype and same_on_all_ranks(p.grad.float()) for p in model.parameters())


@scenario
def accumulated_gradients():
    """no_sync: the sum of two batches is exchanged once."""
    model, state = wrapped(make_model(), "topk:sparsity=0.9")
    with model.no_sync():
        model(torch.randn(8, 40)).sum().backward()
    assert state.exchange.report.steps == 0
    model(torch.randn(8, 40)).sum().backward()
    assert state.exchange.report.steps == 1 and all(same_on_all_ranks(p.grad) for p in model.parameters())


@scenario
def every_form_of_ddp_gives_the_same_weights():
    """Also when it exchanges after the backward pass (static_graph), and with a loss scaler."""

    def trained(scaled, **options):
        model, state = wrapped(make_model(), Policy("topk:sparsity=0.9", exchange="twophase"), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            scaler.scale(model(torch.randn(8, 40, generator=generator)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert state.exchange.steps == 4 and state.state_dict()["feedback"]["0.weight"].any()
        return torch.cat([p.detach().view(-1) for p in model.parameters()])

    expected = trained(False)
    for option in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view"):
        for scaled in (False, True):
            torch.testing.assert_close(trained(scaled, **{option: True}), expected, atol=1e-6, rtol=1e-5)


@scenario
def parameters_of_another_model_are_refused():
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    state = ddp.register(torch.nn.parallel.DistributedDataParallel(make_model()), "topk")
    model.register_comm_hook(state, ddp.compress)
    try:
        backward(model, 0, dist.get_rank())
    except gcompress.ConfigError as error:
        assert "none of the model's" in str(error)
    else:
        raise AssertionError("expected ConfigError")


class WithTable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(200, 16, sparse=True)
        self.rest = torch.nn.Linear(16, 200)

    def forward(self, numbers):
        return self.rest(self.table(numbers))


@scenario
def sparse_gradients_that_no_compressor_takes_are_passed_on():
    rank, size = dist.get_rank(), dist.get_world_size()
    for policy in ("none", "topk:sparsity=0.9; name=table.* -> none"):
        model, state = wrapped(WithTable(), policy)
        for _ in range(3):
            model.zero_grad()
            model(torch.tensor([rank, 100])).sum().backward()
            gradient = model.module.table.weight.grad
            assert gradient.is_sparse
            expected = model.module.rest.weight.sum(0) / size
            for row in (*range(size), 100):
                torch.testing.assert_close(gradient.to_dense()[row], expected * (size if row == 100 else 1))
            assert same_on_all_ranks(model.module.rest.weight.grad)
        assert state.exchange.report.last_step_bytes > 2 * (8 + 16 * 4)
    model, _ = wrapped(WithTable(), "topk:sparsity=0.9")
    expect_error(
        gcompress.ConfigError, "'table.weight' is sparse", lambda: model(torch.tensor([rank])).sum().backward()
    )


@scenario
def residuals_lie_in_the_order_of_the_parameters_shape():
    """Whatever the memory format: a state fits a model of another."""
    states = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3), torch.nn.Flatten(), torch.nn.Linear(24 * 16, 10))
        model, state = wrapped(model.to(memory_format=layout).double(), "topk:sparsity=0.9")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            x = torch.randn(4, 16, 6, 6, generator=generator, dtype=torch.double).to(memory_format=layout)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert same_on_all_ranks(model.module[0].weight.grad.contiguous())
            optimizer.step()
        states.append(state.state_dict())
    one, other = (state["feedback"] for state in states)
    assert one["0.weight"].abs().max() > 0
    for name, residual in one.items():
        torch.testing.assert_close(residual, other[name], atol=1e-6, rtol=1e-4)


@scenario
def wrapped_models_can_be_copied_and_saved_whole():
    model, state = wrapped(make_model(), "topk:sparsity=0.9")
    backward(model, 0, dist.get_rank())
    state.exchange.applied()
    duplicate = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for each in (duplicate, loaded):
        assert all(map(torch.equal, each.parameters(), model.parameters()))
        ((_, its_state),) = each._comm_hooks
        assert its_state is not state
        assert torch.equal(its_state.state_dict()["feedback"]["0.weight"], state.state_dict()["feedback"]["0.weight"])
        anew = ddp.register(torch.nn.parallel.DistributedDataParallel(each.module), "topk:sparsity=0.9")
        anew.load_state_dict(its_state.state_dict())
        assert torch.equal(anew.state_dict()["feedback"]["0.weight"], state.state_dict()["feedback"]["0.weight"])
    expect_error(gcompress.ConfigError, "got a copy", lambda: duplicate._comm_hooks[0][1].start(None))


@scenario
def compiled_models_are_those_that_were_compiled():
    """torch.compile around a DistributedDataParallel of some ranks, and inside it."""
    rank = dist.get_rank()
    policy = "none; name=0.* -> topk:sparsity=0.9; name=2.* -> quantize:bits=4"
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    group = groups[rank // 2]
    parallel = torch.nn.parallel.DistributedDataParallel(make_model(), process_group=group)
    inside = torch.nn.parallel.DistributedDataParallel(
        torch.compile(make_model(), backend="eager"), process_group=group
    )
    for model in (torch.compile(parallel, backend="eager"), inside):
        state = ddp.register(model, policy)
        assert state.exchange.engine.world_size() == 2
        compressors = {name: str(entry.compressor) for name, entry in state.exchange.plan.entries.items()}
        assert compressors["0.weight"] == "topk:sparsity=0.9" and compressors["2.weight"] == "quantize:bits=4"
        backward(model, 0, rank)
        gradient = next(model.parameters()).grad
        rows = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(rows, gradient, group=group)
        assert torch.equal(*rows)


@scenario
def what_cannot_be_exchanged_is_refused_when_it_is_registered():
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(make_model())
    expect_error(gcompress.ConfigError, "FSDP", lambda: ddp.register(sharded, "topk"))
    expect_error(gcompress.ConfigError, "Sequential", lambda: ddp.register(make_model(), "topk"))
    waves = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(2000, dtype=torch.complex64))})
    parallel = torch.nn.parallel.DistributedDataParallel(waves)
    expect_error(gcompress.ConfigError, "'w': got torch.complex64", lambda: ddp.register(parallel, "topk"))


@scenario
def complex_gradients_without_a_compressor_are_averaged():
    class Waves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.v = torch.nn.Parameter(torch.zeros(30, 2, dtype=torch.complex64))
            self.w = torch.nn.Parameter(torch.zeros(2000, dtype=torch.complex64))

        def forward(self, x):
            return (self.w * x).real.sum() + 3.0 * self.v.real.sum()

    model, _ = wrapped(Waves(), "topk; name=w -> none")  # v is too small
    x = torch.full((2000,), complex(1.0 + dist.get_rank(), 2.0 * dist.get_rank()))
    model(x).backward()
    size = dist.get_world_size()
    expected = torch.full((2000,), complex((1 + size) / 2, -(size - 1)))  # conjugated
    torch.testing.assert_close(model.module.w.grad, expected)
    torch.testing.assert_close(model.module.v.grad, torch.full((30, 2), complex(3.0)))


@scenario
def momentum_in_optimizer_and_policy_is_refused_at_the_first_step():
    model, _ = wrapped(make_model(), Policy("topk:sparsity=0.9", momentum=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, 0, dist.get_rank())
    expect_error(gcompress.ConfigError, "parameter_groups", optimizer.step)
    other = torch.optim.SGD(make_model().parameters(), lr=0.1, momentum=0.9)  # another model's is nobody's business
    other.step()


@scenario
def results_that_nobody_ever_applies_are_warned_of():
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("gcompress.exchange.applied").addHandler(handler)
    model, _ = wrapped(make_model(), "topk:sparsity=0.9")
    for step in range(25):
        backward(model, step, dist.get_rank())
        for p in model.parameters():
            p.data -= 0.1 * p.grad
    assert len(warnings) == 1 and "applied()" in warnings[0], warnings


@scenario
def checkpoints_of_torch_distributed():
    """One checkpoint for all ranks: their residuals together are in it."""
    import torch.distributed.checkpoint as dcp

    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    model, state = wrapped(make_model(), policy)
    for step in range(3):
        backward(model, step, dist.get_rank())
        state.exchange.applied()
    expected = state.full_state_dict()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"gcompress": state.exchange.all_ranks}, checkpoint_id=folder[0])
    _, other = wrapped(make_model(), policy)
    dcp.load({"gcompress": other.exchange.all_ranks}, checkpoint_id=folder[0])
    assert other.exchange.steps == 3
    found = other.full_state_dict()
    for name, residuals in expected["sums"].items():
        torch.testing.assert_close(found["sums"][name], residuals)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def one_rank_never_registers():
    group = dist.new_group(timeout=datetime.timedelta(seconds=6))  # of all ranks; what they start by has longer
    model = torch.nn.parallel.DistributedDataParallel(make_model(), process_group=group)
    started = time.monotonic()
    try:
        if dist.get_rank() != 1:
            ddp.register(model, "topk:sparsity=0.9")
        backward(model, 0, dist.get_rank())
    finally:
        assert time.monotonic() - started < SECONDS
        if dist.get_rank() == 1:
            time.sleep(3)  # its end, with which its connections close, must not be what the others hear of first


def killed_rank():
    model, _ = wrapped(make_model(), Policy("topk:sparsity=0.9", exchange="twophase"))
    for step in range(100000):
        if step == 3 and dist.get_rank() == 1:
            first = next(model.parameters())
            first.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))  # others are under way
        backward(model, step, dist.get_rank())


def main():
    out, names = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    if len(names) == 1 and names[0] not in SCENARIOS:
        try:
            globals()[names[0]]()
        except Exception as error:
            with open(f"{out}.{dist.get_rank()}", "w") as file:
                json.dump([type(error).__name__, str(error)], file)
            raise
        return
    run_scenarios({name: SCENARIOS[name] for name in names or SCENARIOS}, out, *rank_and_gather())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
