"""What the ranks of tests/test_ddp.py run: `torchrun … ddp_ranks.py OUT SCENARIO…`.

Each scenario trains a few steps with DistributedDataParallel on Gloo and checks on every
rank; rank 0 writes {scenario: "ok" or the error} to OUT.
"""

import copy
import datetime
import io
import json
import os
import random
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

import gcompress
from gcompress import Policy
from gcompress.plan import Plan
from gcompress.plugins import ddp
from simulation import Simulation

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 300), torch.nn.ReLU(), torch.nn.Linear(300, 50), torch.nn.Linear(50, 30, bias=False)]
    return torch.nn.Sequential(*layers)


def wrapped(model, compression, **options):
    """A DistributedDataParallel of buckets of at most 40 kB, and its state."""
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.04, **options)
    return model, ddp.register(model, compression)


def backward(model, step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    model.zero_grad()
    model(torch.randn(8, 40, generator=generator)).square().mean().backward()


def check_steps(policy, steps=4, ranks=None, process_group=None):
    """Steps of DDP, whose buckets are rebuilt after the first, against a simulation of all ranks."""
    ranks = ranks or range(dist.get_world_size())
    policy, model, alone = gcompress.as_policy(policy), make_model(), make_model()
    plan = Plan(policy, {name: p.shape for name, p in model.named_parameters()}, len(ranks))
    simulation = Simulation(plan)
    parallel, state = wrapped(model, policy, process_group=process_group)
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


def same_on_all_ranks(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


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
def parameters_of_another_model_are_refused():
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    state = ddp.GradientState(make_model(), "topk")
    model.register_comm_hook(state, ddp.compress)
    try:
        backward(model, 0, dist.get_rank())
    except gcompress.ConfigError as error:
        assert "none of the model's" in str(error)
    else:
        raise AssertionError("expected ConfigError")


def different_configurations():
    model, _ = wrapped(make_model(), "quantize:bits=4" if dist.get_rank() == 1 else "topk:sparsity=0.9")
    backward(model, 0, dist.get_rank())


def another_ranks_state():
    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    model, state = wrapped(make_model(), policy)
    backward(model, 0, dist.get_rank())
    saved = [None] * dist.get_world_size()
    dist.all_gather_object(saved, copy.deepcopy(state.state_dict()))
    ddp.GradientState(make_model(), policy).load_state_dict(saved[(dist.get_rank() + 1) % len(saved)])


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
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    if len(names) == 1 and names[0] not in SCENARIOS:
        try:
            globals()[names[0]]()
        except Exception as error:
            with open(f"{out}.{dist.get_rank()}", "w") as file:
                json.dump([type(error).__name__, str(error)], file)
            raise
        return
    results = {}
    for name in names or SCENARIOS:
        failure = None
        try:
            SCENARIOS[name]()
        except Exception:
            failure = f"rank {dist.get_rank()}:\n{traceback.format_exc()}"
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = "\n".join(filter(None, failures)) or "ok"
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
