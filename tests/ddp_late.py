"""Scenarios of states that are made before their model, and of what others put around the hook."""

import copy
import functools
import pickle

import torch
import torch.distributed as dist
from gcompress.plugins import ddp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import gcompress
from tests.ddp_tools import backward, make_model, same_on_all_ranks, scenario, wrapped
from tests.processes import expect_error


def trained_by(model, steps=3):
    """Train a DistributedDataParallel; returns its parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        backward(model, step, dist.get_rank())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


LATE_POLICY = "topk:sparsity=0.9; name=2.* -> quantize:bits=4"


@scenario
def a_state_made_before_its_model_exchanges_the_same():
    states = []
    for late in (False, True):
        state = ddp.GradientState(LATE_POLICY)
        if late:
            state = pickle.loads(pickle.dumps(state))  # as a launcher that spawns its processes passes it on
            expect_error(gcompress.ConfigError, "without a model", state.state_dict)
            expect_error(gcompress.ConfigError, "planned", state.full_state_dict)
        another_around_the_same = torch.nn.parallel.DistributedDataParallel(make_model())
        model = torch.nn.parallel.DistributedDataParallel(another_around_the_same.module, find_unused_parameters=True)
        one_more = torch.nn.parallel.DistributedDataParallel(model.module)
        if not late:
            state.bind(model)
            expect_error(gcompress.ConfigError, "another model", functools.partial(state.bind, another_around_the_same))
        model.register_comm_hook(state, ddp.compress)
        weights = trained_by(model)
        assert state._maybe_unused and not one_more._comm_hooks
        states.append((weights, state.state_dict()))
    (weights, saved), (late_weights, late_saved) = states
    assert all(map(torch.equal, weights, late_weights))
    assert saved["policy"] == late_saved["policy"] and saved["report"] == late_saved["report"]
    assert all(torch.equal(saved["feedback"][name], late_saved["feedback"][name]) for name in saved["feedback"])
    assert {"0.weight", "2.weight"} <= set(saved["feedback"])


@scenario
def a_saved_state_waits_for_the_model():
    first, state = wrapped(make_model(), LATE_POLICY)
    trained_by(first)
    weights, saved = copy.deepcopy(first.module.state_dict()), state.state_dict()
    expected = trained_by(first)
    model = make_model()
    model.load_state_dict(weights)
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.04)
    late = ddp.GradientState(LATE_POLICY)
    expect_error(gcompress.ConfigError, "bound", lambda: late.exchange.load_state_dict(saved))
    late.load_state_dict(saved)
    assert late.state_dict() is saved and copy.deepcopy(late).state_dict().keys() == saved.keys()
    model.register_comm_hook(late, ddp.compress)
    assert all(map(torch.equal, trained_by(model), expected)) and late.exchange.steps == 6
    wrong = ddp.GradientState(LATE_POLICY)
    wrong.load_state_dict({**saved, "policy": {"compressor": "sign"}})
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    model.register_comm_hook(wrong, ddp.compress)
    expect_error(gcompress.ConfigError, "the saved state is of", lambda: backward(model, 0, dist.get_rank()))


@scenario
def torchs_wrappers_of_hooks_cast_around_this_one():
    expected = trained_by(wrapped(make_model(), LATE_POLICY)[0])
    for wrapper, digits in ((default_hooks.fp16_compress_wrapper, 1e-3), (default_hooks.bf16_compress_wrapper, 8e-3)):
        state, model = ddp.GradientState(LATE_POLICY), torch.nn.parallel.DistributedDataParallel(make_model())
        model.register_comm_hook(state, wrapper(ddp.compress))
        weights = trained_by(model)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(weights, expected, strict=True))
        assert 0 < difference < 10 * digits, difference
        assert same_on_all_ranks(torch.cat([each.view(-1) for each in weights]))
        assert state.exchange.report.last_step_bytes < 4 * sum(w.numel() for w in weights) / 4


@scenario
def two_models_have_a_state_each():
    """As in adversarial training, whose models take turns and share a loss."""
    rank = dist.get_rank()
    both = [torch.nn.parallel.DistributedDataParallel(make_model()) for _ in range(2)]
    states = [ddp.GradientState("topk:sparsity=0.9") for _ in both]
    for model, state in zip(both, states, strict=True):
        model.register_comm_hook(state, ddp.compress)
    for step in range(2):
        for model in both:
            model.zero_grad()
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + rank))
        (both[0](x).square().mean() + both[1](x).mean()).backward()
        for model in both:
            assert same_on_all_ranks(model.module[0].weight.grad)
    assert [state.exchange.report.steps for state in states] == [2, 2]
    names = {name for name, _ in make_model().named_parameters()}
    assert all(set(state.exchange.plan.entries) == names for state in states)
