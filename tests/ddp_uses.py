"""Scenarios of what training loops do around the hook: clip, accumulate, freeze, compile."""

import copy
import gc
import os
import shutil

import torch
import torch.distributed as dist
from gcompress.plugins import ddp
from torch.nn.parallel import DistributedDataParallel

from tests.ddp_tools import make_model, same_on_all_ranks, scenario

POLICY = "topk:sparsity=0.9; name=2.* -> quantize:bits=4"


def trained(parallel, model=None, accumulate=1, clip=None):
    """Train six batches with a DDP, called as `model`; returns (the weights, the exchange, norms before clipping)."""
    model = parallel if model is None else model
    state = ddp.register(model, POLICY)
    optimizer, norms = torch.optim.SGD(parallel.parameters(), lr=0.1), []
    for number in range(1, 7):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
        last = number % accumulate == 0
        parallel.require_backward_grad_sync = last  # what no_sync() sets
        (model(x).square().mean() / accumulate).backward()
        if last:
            norms.append(torch.nn.utils.clip_grad_norm_(parallel.parameters(), clip or 1e9))
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().view(-1) for p in parallel.parameters()]), state.exchange, norms


@scenario
def batches_that_are_summed_before_are_one_large_batch():
    """Accumulating under `no_sync` exchanges once, what a batch of all of them would give."""
    weights, exchange, _ = trained(DistributedDataParallel(make_model()), accumulate=3)
    model = DistributedDataParallel(make_model())
    state, optimizer = ddp.register(model, POLICY), torch.optim.SGD(model.parameters(), lr=0.1)
    for first in (1, 4):
        generators = [torch.Generator().manual_seed(10 * (first + n) + dist.get_rank()) for n in range(3)]
        optimizer.zero_grad()
        model(torch.cat([torch.randn(8, 40, generator=each) for each in generators])).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights, torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert exchange.report == state.exchange.report and exchange.steps == 2


@scenario
def norms_that_are_clipped_are_of_the_mean():
    """Every rank finds the same norm."""
    free, _, norms = trained(DistributedDataParallel(make_model()))
    clipped, _, its_norms = trained(DistributedDataParallel(make_model()), clip=float(norms[0]) / 2)
    assert its_norms[0] == norms[0] and not torch.equal(free, clipped)
    assert same_on_all_ranks(torch.stack(its_norms)) and same_on_all_ranks(clipped)


@scenario
def every_form_of_ddp_trains_alike_to_the_bit():
    """Where parameters lie together, all of them in a bucket or few. Static graphs cannot begin in `no_sync`."""
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]  # where sums have one order
    for accumulate, ways in (
        (2, [{"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"bucket_cap_mb": 0.02}]),
        (1, [{"static_graph": True}, {"static_graph": True, "gradient_as_bucket_view": True}]),
    ):
        expected, _, _ = trained(DistributedDataParallel(make_model(), process_group=pair), None, accumulate, 0.05)
        for options in ways:
            parallel = DistributedDataParallel(make_model(), process_group=pair, **options)
            assert torch.equal(trained(parallel, None, accumulate, 0.05)[0], expected), options


@scenario
def frozen_layers_stay_and_are_not_sent():
    models, figures = [make_model(), make_model()], []
    models[1][0].requires_grad_(False)
    kept = copy.deepcopy(models[1][0].state_dict())
    for model in models:
        _, exchange, _ = trained(DistributedDataParallel(model))
        figures.append(exchange.report.fp32_bytes)
        assert ("0.weight" in exchange.plan.entries) == (model is models[0])
    assert all(torch.equal(value, kept[name]) for name, value in models[1][0].state_dict().items())
    assert figures[0] - figures[1] == 6 * 4 * sum(p.numel() for p in models[0][0].parameters())


@scenario
def compiled_training_is_training():
    """To the bit where Dynamo calls the same kernels, to rounding where Inductor makes others."""
    expected, _, _ = trained(DistributedDataParallel(make_model()))
    parallel = DistributedDataParallel(make_model())
    weights, _, _ = trained(parallel, torch.compile(parallel, backend="eager"))
    assert torch.equal(weights, expected)


@scenario
def inductors_training_is_training():
    """Of two ranks, which is enough to compile."""
    pair = dist.new_group([0, 1])
    if dist.get_rank() > 1 or shutil.which("g++") is None:
        return
    expected, _, _ = trained(DistributedDataParallel(make_model(), process_group=pair))
    parallel = DistributedDataParallel(make_model(), process_group=pair)
    weights, _, _ = trained(parallel, torch.compile(parallel))
    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=1e-3)


@scenario
def process_groups_are_used_again_when_their_model_is_gone():
    """But not those in which a rank did not see the end of an operation."""

    def threads(models):
        for _ in range(models):
            trained(DistributedDataParallel(make_model()))
            gc.collect()
            dist.barrier()
        return len(os.listdir("/proc/self/task"))

    few = threads(2)
    assert threads(5) <= few
    engine = ddp.engine()
    lost = engine.allreduce("x", 0, torch.ones(1), "sum")
    kept = engine.allreduce("x", 1, torch.ones(1), "sum")
    assert float(kept.wait()) == dist.get_world_size()
    if dist.get_rank() != 1:
        lost.wait()
    groups = engine._lanes
    del engine
    other = ddp.engine()
    assert other._lanes is not groups
    assert float(other.allreduce("x", 0, torch.ones(1), "sum").wait()) == dist.get_world_size()
