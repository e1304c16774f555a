"""What FSDP2 and HSDP promise of what is remembered: scenarios as promises.py has them for other engines."""

import contextlib
import io
import shutil
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import gcompress
from gcompress import Policy
from tests.fsdp_models import (
    LEARNING_RATE,
    applied,
    batch,
    equal,
    gathered,
    local,
    make_model,
    memory_of,
    meshes,
    refused,
    scenario,
    train,
    weights_of,
    whole,
)
from tests.promises_of_layers import Two

TOPK = "topk:sparsity=0.9; min_numel=100"


def policies(pair):
    quantize = {"min_numel": 100, "error_feedback": True, "exchange": "auto" if pair[0].ndim == 1 else "twophase"}
    found = [Policy("quantize:bits=2,rounding=stochastic", **quantize)]
    found += [Policy("topk:sparsity=0.95", min_numel=100, momentum=0.9, clip=0.02, warmup_steps=4, feedback_decay=0.9)]
    found += [Policy("quantize:bits=3", min_numel=100, residual="int8")]
    if pair[0].ndim == 2:
        found += [Policy("lowrank:rank=2", min_numel=100, exchange="summed")]
    return found


@scenario
def a_loss_scaler_changes_no_bit():
    """Overflows on another rank each time; weights and memory are those of training without it."""
    for pair in meshes():
        for number, policy in enumerate(policies(pair)):
            model, state, optimizer = applied(pair, policy)
            expected, memory = train(model, optimizer), memory_of(state)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
            model, state, optimizer = applied(pair, policy, scaler=(None, scaler)[number % 2])
            for step in range(4):
                for attempt in range(1 + step % 2):
                    poisoned, before = step % 2 == 1 and attempt == 0, memory_of(state)
                    optimizer.zero_grad()
                    loss = model(batch(step)).square().mean()
                    if poisoned and dist.get_rank() == step:
                        loss = loss * float("inf")
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    assert equal(before, memory_of(state)) == poisoned, (policy, step, attempt)
            assert equal(weights_of(model), expected), policy
            assert equal(memory_of(state), memory), policy


@scenario
def a_step_thrown_away_leaves_no_trace():
    for pair in meshes():
        for policy in policies(pair):
            model, state, optimizer = applied(pair, policy)
            expected, memory = train(model, optimizer), memory_of(state)
            other, other_state, optimizer = applied(pair, policy)

            def thrown_away(step, other=other):
                for extra in range(step % 3):
                    other(batch(100 + 10 * step + extra)).square().mean().backward()
                    other.zero_grad(set_to_none=step % 2 == 0)

            assert equal(train(other, optimizer, between=thrown_away), expected), policy
            assert equal(memory_of(other_state), memory), policy


def assert_nothing_is_lost(model, state, before, given):
    """What was applied, and all residuals, must be the mean over ranks of {name: what each rank gave}."""
    size, remembered = dist.get_world_size(), state.state_dict()["feedback"]
    half = size // 2
    for name, p in model.named_parameters():
        found = gathered((before[name] - local(p).detach()).view(-1) / LEARNING_RATE)
        residuals = gathered(remembered.get(name))
        if state.exchange.engine.world_size() == size:  # FSDP2: of whole parameters
            rows, total = torch.cat(found), sum(torch.zeros(1) if each is None else each for each in residuals) / size
        else:
            rows = torch.cat(found[:half])
            residuals = [torch.zeros_like(rows) if r is None else r for r, rows in zip(residuals, found, strict=True)]
            total = torch.cat([(residuals[shard] + residuals[half + shard]) / 2 for shard in range(half)])
        mean = sum(gathered(given[name])) / size
        torch.testing.assert_close(rows + total, mean.view(-1), atol=1e-5, rtol=1e-4)


@scenario
def accumulated_gradients_arrive_once():
    """By passes that are not exchanged, by passes that add to .grad, and both."""
    for pair in meshes():
        for synchronized in ((False, True), (True, True), (True, False, True)):
            model, state, optimizer = applied(pair, TOPK)
            alone, before = make_model(), weights_of(model)
            for number, sync in enumerate(synchronized):
                model.set_requires_gradient_sync(sync)
                model(batch(number)).square().mean().backward()
                alone(batch(number)).square().mean().backward()
            assert state.report.steps == sum(synchronized)
            optimizer.step()
            assert state.exchange.steps == 1
            assert_nothing_is_lost(model, state, before, {name: p.grad for name, p in alone.named_parameters()})


def together(pair, policy):
    """Two layers in one module of FSDP."""
    from gcompress.plugins import fsdp
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Two(), mesh=pair[1])
    return model, fsdp.apply(model, policy, pair[0]), torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


@scenario
def parameters_without_a_gradient_keep_their_residuals():
    for pair in meshes():
        for unused in (False, True):  # whether torch sends zeros for them
            model, state, optimizer = together(pair, TOPK)
            model.set_reduce_scatter_unused_params(unused)
            train(model, optimizer, steps=2)
            before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
            memory, model.both = memory_of(state), False
            optimizer.zero_grad()
            model(batch(7)).square().mean().backward()
            assert (model.b.weight.grad is None) != unused
            assert model.b.weight.grad is None or not local(model.b.weight.grad).any()
            optimizer.step()
            after = memory_of(state)
            assert torch.equal(after["feedback/b.weight"], memory["feedback/b.weight"])
            assert not torch.equal(after["feedback/a.weight"], memory["feedback/a.weight"])
            assert torch.equal(local(model.b.weight), before["b.weight"])
            model.both = True
            train(model, optimizer, steps=2)  # and on


@scenario
def a_rank_that_leaves_a_layer_out_adds_nothing_to_it():
    """All of it arrives, and that rank's residual waits."""
    for pair in meshes():
        model, state, optimizer = together(pair, TOPK)
        model.set_reduce_scatter_unused_params(True)
        train(model, optimizer, steps=1)
        alone, before, memory = Two(), weights_of(model), memory_of(state)
        alone.load_state_dict({name: whole(p) for name, p in model.named_parameters()})
        model.both = alone.both = dist.get_rank() % (dist.get_world_size() // 2) > 0 or dist.get_rank() == 0
        optimizer.zero_grad()
        alone.zero_grad()
        model(batch(3)).square().mean().backward()
        alone(batch(3)).square().mean().backward()
        optimizer.step()
        waits = dist.get_world_size() - 2  # the rank, and with it the replica, that had nothing
        if pair[0].ndim == 1:
            unchanged = torch.equal(memory_of(state)["feedback/b.weight"], memory["feedback/b.weight"])
            assert unchanged == (dist.get_rank() == waits)
        given = {}
        for name, p in alone.named_parameters():
            residual = memory[f"feedback/{name}"]
            if pair[0].ndim == 1:
                given[name] = residual.view(p.shape)
            else:
                half = dist.get_world_size() // 2
                parts = gathered(residual)
                given[name] = torch.cat(parts[:half] if dist.get_rank() < half else parts[half:]).view(p.shape)
            given[name] = given[name] + (torch.zeros_like(p) if p.grad is None else p.grad)
        assert_nothing_is_lost(model, state, before, given)


@scenario
def what_is_not_finite_is_seen_and_forgotten():
    """By every rank through the norm, by HSDP's replicas in the gradient itself; no memory takes it up."""
    for pair in meshes():
        model, state, optimizer = applied(pair, TOPK)
        for step in range(3):
            optimizer.zero_grad()
            poison = float("nan") if step == 1 and dist.get_rank() == 1 else 1.0
            (model(batch(step)).square().mean() * poison).backward()
            norm = float(whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            assert (norm != norm) == (step == 1), (step, norm)
            state.exchange.applied()
        assert all(bool(value.isfinite().all()) for value in memory_of(state).values())


@scenario
def a_pass_that_ends_with_an_error_is_forgotten():
    for pair in meshes():
        policy = Policy("topk:sparsity=0.9", min_numel=100, exchange="twophase")
        model, _, optimizer = applied(pair, policy)
        expected = train(model, optimizer)
        other, other_state, optimizer = applied(pair, policy)

        def stopped(step, other=other, other_state=other_state):
            if step != 2:
                return
            other.zero_grad()
            with contextlib.suppress(ZeroDivisionError), Stop(other[0]):
                other(batch(50)).square().mean().backward()
            assert len(other_state._passes._pending) > 0
            other.reset_iter_state()

        assert equal(train(other, optimizer, between=stopped), expected)


class Stop:
    """An error in the backward pass when it comes to a module."""

    def __init__(self, module):
        self._module = module

    def __enter__(self):
        self._hook = self._module.register_full_backward_pre_hook(lambda *_: 1 // 0)

    def __exit__(self, *error):
        self._hook.remove()


def resumed(pair, policy, load, weights=None):
    """Train, save by `load(old state)(new state)`, and go on with both: to the bit."""
    model, state, optimizer = applied(pair, policy, weights=weights)
    train(model, optimizer, steps=3)
    other, other_state, other_optimizer = applied(pair, policy, weights=weights)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            local(q).copy_(local(p))
    load(state, other_state)
    expected = train(model, optimizer, steps=3, first=3)
    assert equal(train(other, other_optimizer, steps=3, first=3), expected), policy
    assert equal(memory_of(state), memory_of(other_state))
    assert state.report == other_state.report


@scenario
def training_goes_on_from_a_saved_state_to_the_bit():
    for pair in meshes():
        for policy in policies(pair):
            resumed(pair, policy, by_file)
    resumed(meshes()[0], TOPK, by_file, weights="quantize:bits=4,rounding=stochastic; min_numel=100")


def by_file(state, other):
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


@scenario
def checkpoints_of_torch_distributed_go_on_to_the_bit():
    import torch.distributed.checkpoint as dcp

    def load(state, other):
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        dcp.save({"gcompress": state.checkpoint}, checkpoint_id=folder[0])
        dcp.load({"gcompress": other.checkpoint}, checkpoint_id=folder[0])
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])

    for pair in meshes():
        resumed(pair, TOPK, load, weights="topk:sparsity=0.5; min_numel=100" if pair[0].ndim == 1 else None)


@scenario
def states_of_all_ranks_keep_the_sum_of_residuals():
    for pair in meshes():
        model, state, optimizer = applied(pair, TOPK)
        train(model, optimizer, steps=3)
        full, other = state.full_state_dict(), applied(pair, TOPK)[1]
        other.load_state_dict(full)
        assert other.exchange.steps == 3
        for key, vector in other.full_state_dict()["sums"].items():
            torch.testing.assert_close(vector, full["sums"][key], atol=1e-6, rtol=1e-5)
        assert any(bool(vector.any()) for vector in full["sums"].values())
        if pair[0].ndim == 1:
            merged = gcompress.merge_states(gathered(state.state_dict()))
            for key, vector in merged["sums"].items():
                torch.testing.assert_close(vector, full["sums"][key], atol=1e-6, rtol=1e-5)


@scenario
def a_state_that_is_not_this_ranks_is_refused():
    for pair in meshes():
        model, state, optimizer = applied(pair, TOPK, weights=TOPK if pair[0].ndim == 1 else None)
        train(model, optimizer, steps=2)
        saved, memory = state.state_dict(), memory_of(state)
        states = gathered(saved)
        wrong = [states[(dist.get_rank() + 1) % len(states)], 7, {**saved, "weights": {"x": {}}}]
        wrong += [
            {**saved, "steps": -1},
            {**saved, "feedback": {name: t[:-1] for name, t in saved["feedback"].items()}},
        ]
        if pair[0].ndim == 1:
            wrong += [{**saved, "weights": dict.fromkeys(saved["weights"], 7)}]
        for each in wrong:
            with refused(gcompress.ConfigError, ""):
                state.load_state_dict(each)
            assert equal(memory, memory_of(state))
        state.load_state_dict(saved)
        assert equal(memory, memory_of(state))


def known(state, name):
    """The weights that all ranks know of a module, by its first parameter."""
    return state._weights[name]._known


@scenario
def weights_travel_as_differences():
    """All ranks use the same; what a payload loses comes later, and nothing is sent twice."""
    model, state, optimizer = applied(meshes()[0], "none", weights="topk:sparsity=0.9; min_numel=100")
    model.requires_grad_(True)[2].requires_grad_(False)
    train(model, optimizer, steps=3)
    report, shards = state.weights_report, model[0].weight.to_local().numel() + model[0].bias.to_local().numel()
    for name in state._weights:
        assert all(torch.equal(each, known(state, name)) for each in gathered(known(state, name)))
    row = known(state, "0.weight")[dist.get_rank()]
    weight = model[0].weight.to_local().view(-1)
    lag = (row[: weight.numel()] - weight).abs().max()
    assert 0 < lag < 0.1 and shards > 0
    with torch.no_grad():
        sent = report.sent_bytes
        first = model(batch(0, 0))
        step = report.sent_bytes - sent  # what the last step changed
        assert torch.equal(first, model(batch(0, 0)))  # looking at it changes nothing, and sends a byte a parameter
        assert report.sent_bytes - sent == step + 5
    assert all(torch.equal(first, each) for each in gathered(first))
    frozen = known(state, "2.weight")[dist.get_rank()]
    assert torch.equal(frozen[: model[2].weight.to_local().numel()], model[2].weight.to_local().view(-1))
    output = model(batch(1))
    sent = report.sent_bytes
    output.square().mean().backward()  # gathers anew what was resharded
    assert report.sent_bytes == sent


@scenario
def weights_that_stand_still_are_known_in_the_end():
    model, state, optimizer = applied(meshes()[0], "none", weights="topk:sparsity=0.7; min_numel=100")
    train(model, optimizer, steps=3)
    for step in range(12):
        with torch.no_grad():
            for p in model.parameters():  # in a way that changes versions alone, then a bit that is nothing
                local(p).view(-1)[:1] += 1e-7 * (1 + step % 2)
        model(batch(step))
    for name, p in model.named_parameters():
        if name in state._weights:
            shard = local(p).detach().view(-1)
            torch.testing.assert_close(
                known(state, name)[dist.get_rank()][: shard.numel()], shard, atol=1e-6, rtol=1e-5
            )


@scenario
def weights_that_are_replaced_or_not_finite_are_told_whole():
    model, state, optimizer = applied(meshes()[0], "none", weights="topk:sparsity=0.9; min_numel=0")
    train(model, optimizer, steps=2)
    saved = weights_of(model)
    for replaced in (lambda p: p.fill_(float("nan")), lambda p: p.copy_(torch.randn_like(p))):
        with torch.no_grad():
            for p in model.parameters():
                if dist.get_rank() == 1:
                    replaced(local(p))
        output = model(batch(0, 0))
        assert all(torch.equal(output.isnan(), each.isnan()) for each in gathered(output.detach()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            local(p).copy_(saved[name] * -3)
    alone = make_model()
    alone.load_state_dict({name: whole(p) for name, p in model.named_parameters()})
    torch.testing.assert_close(model(batch(0)), alone(batch(0)))


@scenario
def modules_that_torch_calls_otherwise_still_know_their_layout():
    """Of those whose forward is another method, and of one that is all of the model."""
    from gcompress.plugins import fsdp
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for pair in meshes():
        model = torch.nn.Linear(40, 30)
        model.compute = lambda x, model=model: torch.nn.functional.linear(x, model.weight, model.bias)
        fully_shard(model, mesh=pair[1])
        register_fsdp_forward_method(model, "compute")
        state = fsdp.apply(model, "none", pair[0])
        assert isinstance(model, FSDPModule)
        model.compute(batch(0)).sum().backward()
        expected = sum(gathered(batch(0).sum(0))) / dist.get_world_size()
        torch.testing.assert_close(whole(model.weight.grad), expected.expand(30, 40))
        assert state.report.steps == 1
