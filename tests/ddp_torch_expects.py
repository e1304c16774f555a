"""What torch's own tests expect of a communication hook, of ours.

They are mirrored here, none is run as it is: those that are installed (torch.testing._internal.distributed) want CUDA
devices, and those of Gloo are in torch's repository alone. Of distributed_test.py:

    test_ddp_comm_hook_logging                          the_hook_is_named_in_the_logging_data
    test_ddp_hook_parity_allreduce, …_process_group     without_a_compressor_it_is_the_all_reduce
    test_accumulate_gradients_no_sync_allreduce_hook    gradients_that_wait_are_summed_as_without_ddp
    test_ddp_hook_with_optimizer_parity_sgd             optimizers_that_step_in_the_backward_pass
    test_ddp_hook_pickling_powerSGD                     hook_and_state_are_saved_and_loaded
    test_ddp_uneven_inputs (with a hook)                ranks_that_have_no_more_batches_join
    test_ddp_python_error_logged                        an_error_in_the_hook_reaches_every_caller
Of test_c10d_gloo.py, test_c10d_common.py and test_c10d_nccl.py:
    test_ddp_comm_hook_future_passing_cpu               futures_have_the_buckets_type_place_and_order
    test_ddp_invalid_comm_hook_init, …_return_type      torch_checks_the_hooks_annotations
    test_ddp_comm_hook_register_just_once               a_second_hook_is_refused
    test_ddp_comm_hook_sparse_gradients                 a_sparse_gradient_is_that_of_the_whole_batch
    test_ddp_checkpointing_*                            activations_may_be_computed_again
    test_fp16_compress_wrapper_*, test_bf16_…           torchs_casts_around_it_are_those_around_the_all_reduce
"""

import copy
import functools
import inspect
import io

import torch
import torch.distributed as dist
from gcompress.plugins import ddp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gcompress
from tests.ddp_tools import backward, make_model, same_on_all_ranks, scenario, wrapped
from tests.processes import expect_error


@functools.cache
def pairs():
    """The group of two that this rank is in: a sum of two is the same in any order."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return groups[dist.get_rank() // 2]


def parallel_of_two(model=None, **options):
    return DistributedDataParallel(model or make_model(), process_group=pairs(), bucket_cap_mb=0.04, **options)


def gradients_of(model, steps=2):
    """Gradients of steps that do not change weights, one behind the other."""
    found = []
    for step in range(steps):
        backward(model, step, dist.get_rank())
        found += [p.grad.clone().view(-1) for p in model.parameters()]
    return torch.cat(found)


@scenario
def the_hook_is_named_in_the_logging_data():
    model = DistributedDataParallel(make_model())
    assert not model._get_ddp_logging_data().get("comm_hook")
    ddp.register(model, "topk")
    for step in range(2):
        assert model._get_ddp_logging_data()["comm_hook"] == "compress"
        backward(model, step, dist.get_rank())


@scenario
def without_a_compressor_it_is_the_all_reduce():
    """To the bit among two ranks, to rounding among four."""
    expected = gradients_of(parallel_of_two())
    by_torch, by_us = parallel_of_two(), parallel_of_two()
    by_torch.register_comm_hook(pairs(), default_hooks.allreduce_hook)
    ddp.register(by_us, "none")
    assert torch.equal(gradients_of(by_torch), expected) and torch.equal(gradients_of(by_us), expected)
    of_all, (of_all_by_us, _) = DistributedDataParallel(make_model()), wrapped(make_model(), "none")
    torch.testing.assert_close(gradients_of(of_all_by_us), gradients_of(of_all), atol=1e-8, rtol=1e-5)


@scenario
def gradients_that_wait_are_summed_as_without_ddp():
    """Also in an evaluation between them, which leaves nothing."""
    model, state = wrapped(make_model(), "none", gradient_as_bucket_view=True)
    alone = make_model()
    for number in range(6):
        x = torch.randn(4 * 8, 40, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            model(x)
        alone(x).square().mean().backward()
        own = x.chunk(4)[dist.get_rank()]
        if number % 2 == 0:
            with model.no_sync():
                model(own).square().mean().backward()
        else:
            model(own).square().mean().backward()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4)
            model.zero_grad()
            alone.zero_grad()
    assert state.exchange.report.steps == 3


@scenario
def optimizers_that_step_in_the_backward_pass():
    """torch's functional optimizers, which step a bucket's parameters as soon as its future is done."""
    from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
        _hook_then_optimizer,
        _OptimizerHookState,
    )
    from torch.distributed.optim.functional_sgd import _FunctionalSGD

    weights = []
    for overlapped in (False, True):
        model, state = DistributedDataParallel(make_model(), bucket_cap_mb=0.04), ddp.GradientState("topk:sparsity=0.9")
        if overlapped:
            step_in = _FunctionalSGD(list(model.parameters()), lr=0.1, _allow_empty_param_list=True)
            holder = _OptimizerHookState.__new__(_OptimizerHookState)
            holder.functional_optimizer, holder.params_to_optimize = step_in, None
            hook = _hook_then_optimizer(ddp.compress, holder)
        optimizer = None if overlapped else torch.optim.SGD(model.parameters(), lr=0.1)
        model.register_comm_hook(state, hook if overlapped else ddp.compress)
        for step in range(4):
            backward(model, step, dist.get_rank())
            if optimizer:
                optimizer.step()
        assert state.exchange.report.steps == 4
        weights.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


@scenario
def hook_and_state_are_saved_and_loaded():
    """A state that was loaded is a copy, whose memory a new one takes over: it goes on to the bit."""
    model = parallel_of_two()
    state = ddp.register(model, "topk:sparsity=0.9")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        backward(model, step, dist.get_rank())
        optimizer.step()
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "comm_hook": ddp.compress, "comm_hook_state": state}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert saved["comm_hook"] is ddp.compress
    other = parallel_of_two()
    other.load_state_dict(saved["weights"])
    anew = ddp.GradientState("topk:sparsity=0.9")
    anew.load_state_dict(saved["comm_hook_state"].state_dict())
    other.register_comm_hook(anew, saved["comm_hook"])
    its_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in (3, 4):
        for each, stepping in ((model, optimizer), (other, its_optimizer)):
            backward(each, step, dist.get_rank())
            stepping.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@scenario
def ranks_that_have_no_more_batches_join():
    for policy in ("none", "topk:sparsity=0.9"):
        model, state = wrapped(make_model(), policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join(divide_by_initial_world_size=True):
            for step in range(2 + dist.get_rank()):
                backward(model, step, dist.get_rank())
                optimizer.step()
        assert all(same_on_all_ranks(p.detach()) for p in model.parameters()), policy
        assert state.exchange.report.steps == 5


@scenario
def an_error_in_the_hook_reaches_every_caller():
    """As its own kind, with its text, from `backward`; what the ranks exchange afterwards is in order."""
    model, state = wrapped(make_model(), "topk:sparsity=0.9", gradient_as_bucket_view=True)
    start = state.exchange.start_bucket

    def failing(*arguments, **keywords):
        raise gcompress.ExchangeError("on purpose")

    state.exchange.start_bucket = failing
    expect_error(gcompress.ExchangeError, "on purpose", lambda: backward(model, 0, dist.get_rank()))
    state.exchange.start_bucket = start
    again, _ = wrapped(copy.deepcopy(model.module), "topk:sparsity=0.9")
    backward(again, 1, dist.get_rank())
    assert all(same_on_all_ranks(p.grad) for p in again.parameters())


@scenario
def futures_have_the_buckets_type_place_and_order():
    """One for each bucket, in order; every parameter in one bucket a step, before torch rebuilds them and after."""
    for dtype in (torch.float32, torch.bfloat16):
        model = DistributedDataParallel(make_model().to(dtype), bucket_cap_mb=0.01)
        state, steps = ddp.GradientState("topk:sparsity=0.9"), []

        def looking(state, bucket):
            future = ddp.compress(state, bucket)
            steps[-1].append((bucket.index(), bucket.is_last(), bucket.parameters(), bucket.buffer(), future))  # noqa: B023
            return future

        model.register_comm_hook(state, looking)
        for _ in range(3):
            steps.append([])
            model(torch.ones(8, 40, dtype=dtype)).square().mean().backward()
            for index, (number, last, _, buffer, future) in enumerate(steps[-1]):
                assert number == index and last == (index == len(steps[-1]) - 1)
                assert isinstance(future, torch.futures.Future) and future.done()
                value = future.value()
                assert value.dtype == dtype and value.device == buffer.device and value.data_ptr() == buffer.data_ptr()
            held = [p for *_, parameters, _, _ in steps[-1] for p in parameters]
            assert len(held) == len(set(held)) == len(list(model.parameters()))
        before, after = ([[id(p) for p in parameters] for _, _, parameters, _, _ in step] for step in steps[:2])
        assert len(after) > 1 and before != after, "torch was to rebuild its buckets"


@scenario
def torch_checks_the_hooks_annotations():
    signature = inspect.signature(ddp.compress)
    assert signature.parameters["bucket"].annotation is dist.GradBucket
    assert signature.return_annotation == torch.futures.Future[torch.Tensor]


@scenario
def a_second_hook_is_refused():
    for first in (ddp.compress, default_hooks.allreduce_hook):
        model = DistributedDataParallel(make_model())
        model.register_comm_hook(ddp.GradientState("topk") if first is ddp.compress else None, first)
        second = functools.partial(model.register_comm_hook, ddp.GradientState("topk"), ddp.compress)
        expect_error(RuntimeError, "only be called once", second)


@scenario
def a_sparse_gradient_is_that_of_the_whole_batch():
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.EmbeddingBag(40, 16, sparse=True)

        def forward(self, x):
            return torch.nn.functional.softmax(self.table(x), dim=1)

    torch.manual_seed(1337)
    alone = Bag()
    for view in (False, True):
        model, _ = wrapped(copy.deepcopy(alone), "none", gradient_as_bucket_view=view)
        x = torch.arange(4 * 2 * 3).view(8, 3)
        weights = torch.linspace(0, 1, 16)  # a loss that a softmax does not make constant
        alone.zero_grad()
        (alone(x) * weights).mean().backward()
        (model(x.chunk(4)[dist.get_rank()]) * weights).mean().backward()
        assert model.module.table.weight.grad.is_sparse
        torch.testing.assert_close(model.module.table.weight.grad.to_dense(), alone.table.weight.grad.to_dense())


class Recomputing(torch.nn.Module):
    """Computes activations of its middle again in the backward pass, once or twice."""

    def __init__(self, reentrant, passes):
        super().__init__()
        self.layers, self.reentrant, self.passes = make_model(), reentrant, passes

    def forward(self, x):
        first, activation, second, third = self.layers
        x = first(x)
        for _ in range(self.passes):
            x = checkpoint(torch.nn.Sequential(activation, second), x, use_reentrant=self.reentrant)
            x = torch.nn.functional.pad(x, (0, 250)) if self.passes > 1 else x
        return third(x[:, :50])


@scenario
def activations_may_be_computed_again():
    """Every way that torch's DDP has for it gives what it gives without the hook, and one memory."""
    ways = [
        (False, 1, {}),
        (True, 1, {}),
        (False, 1, {"find_unused_parameters": True}),
        (True, 1, {"static_graph": True}),
        (False, 2, {}),
        (True, 2, {"static_graph": True}),
    ]
    for reentrant, passes, options in ways:
        plain = parallel_of_two(Recomputing(reentrant, passes), **options)
        ours = parallel_of_two(Recomputing(reentrant, passes), **options)
        ddp.register(ours, "none")
        assert torch.equal(gradients_of(ours), gradients_of(plain)), (reentrant, passes, options)
        residuals = []
        for model in (Recomputing(reentrant, passes), Recomputing(False, passes)):
            model, state = wrapped(model, "topk:sparsity=0.9", **(options if model.reentrant == reentrant else {}))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                backward(model, step, dist.get_rank())
                optimizer.step()
            assert state.exchange.steps == 3
            residuals.append(state.state_dict()["feedback"]["layers.0.weight"])
        torch.testing.assert_close(*residuals, atol=1e-6, rtol=1e-4)


@scenario
def torchs_casts_around_it_are_those_around_the_all_reduce():
    """To the rounding of that type: torch divides before it adds."""
    for wrapper, digits in ((default_hooks.fp16_compress_wrapper, 1e-3), (default_hooks.bf16_compress_wrapper, 8e-3)):
        by_torch, by_us = parallel_of_two(), parallel_of_two()
        by_torch.register_comm_hook(pairs(), wrapper(default_hooks.allreduce_hook))
        by_us.register_comm_hook(ddp.GradientState("none"), wrapper(ddp.compress))
        exact = gradients_of(parallel_of_two())
        for cast in (gradients_of(by_us), gradients_of(by_torch)):
            assert 0 < float((cast - exact).abs().max() / exact.abs().max()) < digits, wrapper
