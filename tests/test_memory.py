"""Memory in two moves, states of all ranks on other numbers of them, and the loss scale that a gradient carries."""

import copy
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint

from gcompress import ConfigError, Policy, merge_states
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.scaling import LossScale
from gcompress.memory import Memory
from tests.local_ranks import World, run_ranks

SHAPES = {"a": (40, 30), "c": (300, 70), "e": (16384,)}


def test_what_is_proposed_counts_once_it_is_applied():
    memory = Memory()
    memory.put("w", 1)
    assert memory.get("w") is None and memory.latest("w") == 1
    memory.apply(["v", "w"])
    memory.put("w", 2)
    assert memory.get("w") == 1
    memory.discard()
    memory.apply()
    assert memory.get("w") == 1 == memory.latest("w")
    memory.put("w", 3)
    memory.carry_on("w")
    assert memory.get("w") == 3 and memory.values() == {"w": 1}
    memory.put("w", 4)
    memory.discard(["w"])
    assert memory.get("w") == 1
    assert Memory(at_once=True).get("w", 7) == 7


def gradients(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def trained(policy, size, states=None, steps=4):
    """The ranks' states after some steps that begin from states, and the sum of the means they got."""

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        if states is not None:
            exchange.load_state_dict(states)
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(steps):
            finish = {name: exchange.start(name, g) for name, g in gradients(step, rank).items()}
            for name, mean in finish.items():
                total[name] += mean()
            exchange.end_step()
        return exchange.state_dict(), total

    return run_ranks(World(size), policy, run)


def residuals(states):
    """{name: residuals of ranks and owners, as a part of the mean}."""
    found = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in SHAPES.items()}
    for state in states:
        feedback = state["feedback"]
        for name, residual in feedback.get("residual", feedback).items():
            found[name] += residual / len(states)
        for key, residual in state["owner_feedback"].items():
            start, stop = map(int, key[2:-1].split(":"))
            found[key[0]][start:stop] += residual
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("exchange", ["allgather", "twophase", "auto"])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_residuals_of_four_ranks_go_to_any_number_of_ranks(size, exchange, momentum):
    policy = Policy("topk:sparsity=0.9", exchange=exchange, momentum=momentum)
    before = [state for state, _ in trained(policy, 4)]
    merged = merge_states(copy.deepcopy(before))
    expected = residuals(before)
    loaded = [state for state, _ in trained(policy, size, merged, steps=0)]
    for name, value in residuals(loaded).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
        assert value.abs().max() > 0
    assert {state["steps"] for state in loaded} == {4}
    if not momentum:  # and nothing is lost on the way
        after = trained(policy, size, merged, steps=3)
        for name in SHAPES:
            given = sum(gradients(step, rank)[name] for step in range(3) for rank in range(size)) / size
            left = residuals([state for state, _ in after])[name]
            assert torch.allclose(after[0][1][name].view(-1) + left, given.view(-1) + expected[name], atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_memory_takes_what_the_plan_says_and_twice_that_before_a_step_is_applied(exchange, momentum):
    policy = Policy("topk:sparsity=0.9", exchange=exchange, momentum=momentum)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}

    def held(memories):
        tensors = {id(t): t for each in memories for part in (each._values, each._proposed) for t in part.values()}
        return sum(tensor.numel() * 4 for tensor in tensors.values())

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        exchange.watch(parameters)
        memories = [*exchange.feedback.memories.values(), *exchange.owner_feedback.memories.values()]
        for step in range(3):
            finish = {name: exchange.start(name, g) for name, g in gradients(step, rank).items()}
            for wait in finish.values():
                wait()
            exchange.end_step()
            before = held(memories)
            exchange.applied()
        return before, held(memories), exchange.plan.memory_bytes()

    ranks = run_ranks(World(4), policy, run)
    for before, after, _ in ranks:
        assert before == 2 * after
    assert sum(after for _, after, _ in ranks) / 4 == pytest.approx(ranks[0][2], abs=16)


def test_an_optimizer_steps_while_another_ones_exchange_is_collected():
    """Python may collect it at any moment, also between two looks at it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    exchange = GradientExchange(Policy("topk:sparsity=0.9"))
    exchange.watch({"a": parameter})
    watch, gone = exchange._watch, weakref.ref(exchange)
    del exchange
    gc.collect()
    assert gone() is None
    watch.before_step(optimizer)
    watch.after_step(optimizer)


def test_states_that_do_not_belong_together_are_not_merged():
    policy = Policy("topk:sparsity=0.9", exchange="twophase")
    states = [state for state, _ in trained(policy, 3, steps=2)]
    for wrong, text in (
        (states[:2], "ranks \\[0, 1\\]"),
        ([*states[:2], states[1]], "ranks \\[0, 1, 1\\]"),
        ([], "at least one"),
        ([*states[:2], {**states[2], "steps": 9}], "steps"),
        ([*states[:2], {**states[2], "policy": Policy("sign").to_dict()}], "policy"),
        ([*states[:2], {"rank": 2}], "has no"),
        ([*states[:2], 7], "int"),
        ([*states[:2], {**states[2], "owner_feedback": {"c[0:17": torch.zeros(17)}}], "owner"),
        ([*states[:2], {**states[2], "owner_feedback": {"c[0:99]": torch.zeros(17)}}], "owner"),
    ):
        with pytest.raises(ConfigError, match=text):
            merge_states(wrong)
    merged = merge_states(states)
    for wrong in (
        {**merged, "shapes": {"a": [7]}},
        {**merged, "sums": {**merged["sums"], "residual/a": torch.full((1200,), torch.nan)}},
        {**merged, "sums": {**merged["sums"], "residual/x": torch.zeros(3)}},
    ):
        with pytest.raises(ConfigError, match="state"):
            trained(policy, 2, wrong, steps=0)


def test_the_scale_is_that_of_the_loss_that_is_differentiated():
    parameter, scale, seen = torch.nn.Parameter(torch.ones(3)), LossScale(), []

    def look(gradient):
        seen.append(scale.now())
        scale.step_over()

    parameter.register_hook(look)
    one, other = (torch.amp.GradScaler("cpu", init_scale=2.0**power) for power in (8, 4))
    off = torch.amp.GradScaler("cpu", enabled=False)
    one.scale(parameter.sum()).backward()
    parameter.sum().backward()
    for loss in other.scale([parameter.sum(), (parameter.square().sum(),)]):
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    for loss in one.scale({"a": parameter.sum()}.values()):
        loss.backward()
    off.scale(parameter.sum()).backward()
    one.scale(other.scale(parameter.sum()) * 0.5)  # never differentiated
    parameter.sum().backward()
    assert seen == [2.0**8, 1.0, 2.0**4, 2.0**4, 2.0**8, 1.0, 1.0]


def test_a_backward_pass_that_fails_leaves_no_scale_behind():
    parameter, scale, seen = torch.nn.Parameter(torch.ones(3)), LossScale(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("caught by the script")

    with pytest.raises(MemoryError):
        scaler.scale(Fails.apply(parameter).sum()).backward()
    scale.step_over()
    parameter.register_hook(lambda gradient: seen.append(scale.now()))
    parameter.sum().backward()
    assert seen == [1.0]


def test_a_pass_within_a_pass_carries_the_scale_of_the_outer_one():
    parameter, scale, seen = torch.nn.Parameter(torch.ones(3)), LossScale(), []
    parameter.register_hook(lambda gradient: seen.append(scale.now()))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.ones(3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: x * parameter, x, use_reentrant=True)
    scaler.scale(y.sum()).backward()
    assert seen == [256.0]


def test_a_rank_without_a_backward_pass_takes_the_scaler_that_it_used_last():
    parameter, scale = torch.nn.Parameter(torch.ones(3)), LossScale()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.tensor(0.0))  # an empty batch's loss
    assert scale.now() == 256.0
    scale.step_over()
    assert scale.now() == 256.0  # not used in this step at all
    scale.step_over()
    torch.autograd.grad(parameter.sum(), parameter)  # something else is differentiated
    assert scale.now() == 256.0


def test_other_loss_scaling_is_said():
    assert LossScale(128).now() == 128.0 and LossScale(lambda: 4).now() == 4.0
    assert LossScale(torch.amp.GradScaler("cpu", init_scale=32.0)).now() == 32.0
    for wrong in ("auto", -1.0, 0, True, float("inf")):
        with pytest.raises(ConfigError, match="scaler"):
            LossScale(wrong)

    class Sharded(torch.amp.GradScaler):
        def scale(self, outputs):
            return outputs * self.get_scale() if self.get_scale() else outputs

    parameter, scale, seen = torch.nn.Parameter(torch.ones(3)), LossScale(), []
    parameter.register_hook(lambda gradient: seen.append(scale.now()))
    scaler = Sharded("cpu", init_scale=64.0)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    scaler.scale(parameter.sum()).backward()
    assert seen == [64.0]
    with pytest.raises(ConfigError, match="scaler: got the loss scale 0"):
        LossScale(lambda: 0).now()
