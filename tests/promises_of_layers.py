"""What every engine promises of layers that have no gradient: left out, used in turns, frozen, or without a batch."""

import torch

import gcompress
from gcompress import Policy
from tests.promises import assert_nothing_is_lost, batch, make_model, promise, refused, residuals_of_the_mean, weights


class Two(torch.nn.Module):
    """Two layers side by side, of which a pass may leave the second out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(40, 120, bias=False) for _ in range(2))
        self.both = True

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1) if self.both else self.a(x)


@promise()
def what_is_added_to_where_a_rank_has_nothing_to_add_arrives_once(new):
    """Three passes without a zero_grad between; in the later ones a rank leaves a layer out."""
    tried = [Policy("topk:sparsity=0.9", exchange=exchange) for exchange in ("allgather", "twophase")]
    if new.trainer.engine in ("horovod", "ddp"):  # with seeds that all ranks must share
        tried.append(Policy("randomk:sparsity=0.75", exchange="summed", error_feedback=True))
    for policy in tried:
        with new(Two(), policy, unused=True) as trainer:
            model, alone = trainer.model, Two()
            before = weights(trainer)
            model.zero_grad()
            for number in range(3):
                model.both = alone.both = number == 0 or trainer.rank != 1
                alone(batch(number, trainer.rank)).square().mean().backward()
                trainer.loss(batch(number, trainer.rank)).backward()
                trainer.synchronize()
            trainer.step()
            assert all(trainer.same(p) for p in model.parameters())
            if not trainer.remembers:
                continue
            assert_nothing_is_lost(trainer, before, {name: p.grad for name, p in alone.named_parameters()})


@promise("horovod", "ddp", "mpi")
def a_result_of_nothing_is_not_taken_for_one_thrown_away(new):
    """Nothing reaches the threshold: all of two passes stays in the residual, also if others look."""
    with new(make_model(), Policy("threshold:threshold=1e9")) as trainer:
        alone = make_model()
        trainer.optimizer.zero_grad()
        for number in range(2):
            alone(batch(number, trainer.rank)).square().mean().backward()
            trainer.loss(batch(number, trainer.rank)).backward()
            trainer.synchronize()
        output = trainer.model(batch(7, trainer.rank)).square().mean()
        torch.autograd.grad(output, list(trainer.model.parameters()))
        trainer.step()
        residuals = residuals_of_the_mean(trainer)
        for name, p in trainer.model.named_parameters():
            if p.numel() >= 1024:
                given = trainer.mean(alone.get_parameter(name).grad).view(-1)
                torch.testing.assert_close(residuals[name], given, atol=1e-6, rtol=1e-4)


@promise("horovod", "mpi", "byteps")
def a_rank_without_a_batch_keeps_up_under_a_scaler(new):
    """Its loss has no graph, so it computes no gradient that would carry the scale."""
    with new(make_model(), Policy("topk:sparsity=0.9")) as trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2)
        for step in range(6):
            trainer.optimizer.zero_grad()
            if step in (0, 3) and trainer.rank == 1:
                scaler.scale(torch.zeros(()))
                probe = trainer.model(batch(step, 1)).sum()
                torch.autograd.grad(probe, list(trainer.model.parameters()))  # of something else, without the scaler
            else:
                scaler.scale(trainer.loss(batch(step, trainer.rank))).backward()
            trainer.synchronize()
            scaler.unscale_(trainer.optimizer)
            trainer.step(scaler)
            scaler.update()
            assert all(trainer.same(p) for p in trainer.model.parameters()), step


@promise("ddp")
def a_rank_that_has_joined_keeps_its_residual(new):
    """Uneven batches in `model.join()`: the residual of a rank that is done is not sent again in every step."""
    with new(make_model(), Policy("topk:sparsity=0.9")) as trainer:
        before, given = weights(trainer), {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
        alone = make_model()
        with trainer.parallel.join():
            for step in range(2 + 2 * trainer.rank):
                alone.load_state_dict(trainer.model.state_dict())
                alone.zero_grad()
                alone(batch(step, trainer.rank)).square().mean().backward()
                for name, p in alone.named_parameters():
                    given[name] += p.grad
                trainer.optimizer.zero_grad()
                trainer.loss(batch(step, trainer.rank)).backward()
                trainer.step()
        with torch.no_grad():  # of the rank that was last, which all have got
            for p in trainer.model.parameters():
                p.copy_(trainer.gather(p.detach())[-1])
        assert_nothing_is_lost(trainer, before, given)


class Turns(torch.nn.Module):
    """Two layers of which each step uses one, on all ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 120) for _ in range(2))
        self.turn = 0

    def forward(self, x):
        return self.layers[self.turn](x)


@promise("horovod", "ddp", "mpi")
def layers_used_in_turns_lose_nothing(new):
    """The residual of a parameter that nobody uses waits until somebody does."""
    for exchange in ("allgather", "twophase"):
        with new(Turns(), Policy("topk:sparsity=0.9", exchange=exchange), unused=True) as trainer:
            given = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
            start = weights(trainer)
            for step in range(8):
                trainer.model.turn = step % 2
                trainer.model.zero_grad(set_to_none=exchange == "allgather")
                loss = trainer.loss(batch(step, trainer.rank))
                loss.backward()
                own = trainer.model.layers[step % 2]
                copies = [p.detach().clone().requires_grad_() for p in own.parameters()]
                x = batch(step, trainer.rank)
                torch.nn.functional.linear(x, *copies).square().mean().backward()
                for (name, _), copy in zip(own.named_parameters(f"layers.{step % 2}"), copies, strict=True):
                    given[name] += copy.grad
                trainer.synchronize()
                trainer.step()
            residuals = assert_nothing_is_lost(trainer, start, given)
            assert all(value.any() or value.numel() < 1024 for value in residuals.values())


@promise()
def a_frozen_layer_stands_still_and_goes_on_later(new):
    def make_optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)

    for exchange in ("allgather", "twophase"):
        policy = Policy("topk:sparsity=0.9", exchange=exchange)
        with new(make_model(), policy, make_optimizer, unused=True) as trainer:
            frozen = trainer.model[2]
            before = None
            for step in range(9):
                if step == 3:
                    frozen.requires_grad_(False)
                    before = [p.detach().clone() for p in frozen.parameters()]
                if step == 6:
                    assert all(map(torch.equal, before, frozen.parameters())), "it moved"
                    frozen.requires_grad_(True)
                trainer.model.zero_grad(set_to_none=step % 2 == 0 or 3 <= step < 6)
                trainer.loss(batch(step, trainer.rank)).backward()
                trainer.synchronize()
                trainer.step()
            assert not any(map(torch.equal, before, frozen.parameters()))
            assert all(trainer.same(p) for p in trainer.model.parameters())


@promise("horovod", "mpi")
def a_layer_unfrozen_for_the_optimizer_later_is_exchanged(new):
    """Frozen when the optimizer was made; unfrozen, and given to it, in mid-training."""
    for late in (False, True):  # not among its parameters at first, or there from the beginning
        model = make_model()
        model[0].requires_grad_(False)

        def make_optimizer(parameters, late=late, model=model):
            others = [p for p in parameters if all(p is not q for q in model[0].parameters())]
            return torch.optim.SGD(others if late else parameters, lr=0.1)

        with new(model, Policy("topk:sparsity=0.9", exchange="twophase"), make_optimizer) as trainer:
            before = weights(trainer)
            for step in range(7):
                if step == 2:
                    model[0].requires_grad_(True)
                    if late:
                        trainer.optimizer.add_param_group({"params": list(model[0].parameters())})
                trainer.optimizer.zero_grad()
                trainer.loss(batch(step, trainer.rank)).backward()
                trainer.synchronize()
                trainer.step()
            assert all(trainer.same(p) for p in model.parameters()), "the ranks drift apart"
            assert not torch.equal(before["0.weight"], model[0].weight)
            assert any("0.weight" in name for name in trainer.memory()), "it is not compressed"
            if late:
                stranger = {"params": [torch.nn.Parameter(torch.zeros(2000))]}
                with refused(gcompress.ConfigError, "add_param_group"):
                    trainer.optimizer.add_param_group(stranger)
                    trainer.loss(batch(9, trainer.rank)).backward()
                    trainer.synchronize()
