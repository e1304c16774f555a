"""Scenarios of Hugging Face Accelerate."""

import contextlib

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

import gcompress
from tests.framework_tools import (
    CLIP,
    LR,
    POLICY,
    Batches,
    Net,
    loop,
    of_one,
    of_two,
    same_sums,
    shared_folder,
    warnings_of,
    weights_of,
)
from tests.processes import expect_error


def accelerator_of(*handlers, **options):
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # that of an earlier scenario, which may have had another precision
    return accelerate.Accelerator(cpu=True, kwargs_handlers=list(handlers), **options)


def compressed(accelerator, policy=POLICY, **options):
    import gcompress.plugins.accelerate

    return gcompress.plugins.accelerate.register(accelerator, policy, **options)


def prepared(accelerator, net=None):
    """(model, optimizer, batches) as accelerate makes them."""
    net = net or Net()
    batches = torch.utils.data.DataLoader(Batches(), batch_size=8)
    return accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR), batches)


def train(accelerator, model, optimizer, batches, epochs=1, clip=None, dtype=None):
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                    loss = model(**batch)["loss"]
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return weights_of(model)


@of_two
def accelerate_trains_like_a_loop():
    """Whether compression is asked for before `prepare` or after it."""
    from accelerate.utils import DistributedDataParallelKwargs

    expected, state = loop()
    for after in (False, True):
        accelerator = accelerator_of(DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=1))
        compression = None if after else compressed(accelerator)
        model, optimizer, batches = prepared(accelerator)
        compression = compression or compressed(accelerator)
        assert torch.equal(train(accelerator, model, optimizer, batches, 2), expected)
        assert compression.report == state.exchange.report
        assert ddp.exchange(compression) is compression.state.exchange
        assert model.find_unused_parameters and model.bucket_bytes_cap == 1 << 20


@of_two
def accelerate_accumulates_clips_and_casts_like_a_loop():
    for options, clip, alike in (
        ({"gradient_accumulation_steps": 3}, CLIP, {"accumulate": 3, "clip": CLIP}),
        ({"mixed_precision": "bf16"}, None, {"dtype": torch.bfloat16}),
    ):
        accelerator = accelerator_of(**options)
        compressed(accelerator)
        assert torch.equal(train(accelerator, *prepared(accelerator), 2, clip), loop(**alike)[0]), options


@of_two
def accelerate_has_its_scaler_found():
    """It has float16 on devices alone: its scaler is put where it has one there, and the loop casts."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2) for _ in range(2)]
    accelerator = accelerator_of()
    accelerator.scaler = scalers[0]
    compression = compressed(accelerator)
    weights = train(accelerator, *prepared(accelerator), 12, dtype=torch.float16)
    expected, state = loop(epochs=12, dtype=torch.float16, scaler=scalers[1])
    assert torch.equal(weights, expected)
    assert compression.state.exchange.steps == state.exchange.steps and 0 < state.exchange.steps < 36


@of_two
def accelerate_without_a_compressor_is_accelerate():
    weights = []
    for policy in ("none", None):
        accelerator = accelerator_of()
        if policy:
            compressed(accelerator, policy)
        weights.append(train(accelerator, *prepared(accelerator), 2))
    assert torch.equal(*weights)


def saved_after_an_epoch(folder, policy=POLICY):
    """Train an epoch and save; returns the states of all ranks."""
    accelerator = accelerator_of()
    compression = compressed(accelerator, policy)
    train(accelerator, *prepared(accelerator))
    accelerator.save_state(folder)
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, compression.state.state_dict())
    dist.barrier()
    return states


@of_two
def accelerate_goes_on_from_its_folder_to_the_bit():
    with shared_folder() as folder:
        saved_after_an_epoch(folder)
        accelerator = accelerator_of()
        compression = compressed(accelerator)
        training = prepared(accelerator)
        accelerator.load_state(folder)
        assert torch.equal(train(accelerator, *training), loop()[0])
        assert compression.state.exchange.steps == compression.report.steps == 6


@of_two
def accelerate_goes_on_from_another_number_of_ranks():
    """A third rank's file is made up; what all three were owed is there."""
    with shared_folder() as folder:
        states = saved_after_an_epoch(folder)
        others = [{**state, "world_size": 3} for state in states]
        others.append({**others[1], "rank": 2, "owner_feedback": {}})
        dist.barrier()
        if dist.get_rank() == 0:
            for path in folder.glob("gcompress-rank-*"):
                path.unlink()
            for state in others:
                torch.save(state, folder / f"gcompress-rank-{state['rank']}-of-3.pt")
        dist.barrier()
        accelerator = accelerator_of()
        compression = compressed(accelerator)
        training = prepared(accelerator)
        accelerator.load_state(folder)
        same_sums(compression.state.full_state_dict(), others, ranks=2)
        train(accelerator, *training)
        assert compression.state.exchange.steps == 6
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "gcompress-rank-1-of-3.pt").unlink()
        dist.barrier()
        expect_error(gcompress.ConfigError, "no gcompress-rank-1-of-3.pt", lambda: accelerator.load_state(folder))


@of_two
def accelerate_warns_of_a_folder_without_memory():
    with shared_folder() as folder:
        accelerator = accelerator_of()
        train(accelerator, *prepared(accelerator))
        accelerator.save_state(folder)
        dist.barrier()
        accelerator = accelerator_of()
        compressed(accelerator)
        prepared(accelerator)
        with warnings_of("gcompress.plugins.accelerate.handler") as warned:
            accelerator.load_state(folder)
        assert len(warned) == 1 and "no memory of model 0" in warned[0]


@of_two
def accelerate_gives_every_model_a_memory_of_its_own():
    """One is prepared before compression is asked for, one is frozen, and one comes later."""
    with shared_folder() as folder:
        runs = []
        for run in range(2):
            accelerator = accelerator_of()
            nets = [Net(), Net().requires_grad_(False), Net()]
            optimizers = [torch.optim.SGD(nets[n].parameters(), lr=LR * (1 + n)) for n in (0, 2)]
            first = accelerator.prepare(nets[0])
            compression = compressed(accelerator)
            frozen = accelerator.prepare_model(nets[1], evaluation_mode=True)
            last = accelerator.prepare(nets[2])
            if run:
                accelerator.load_state(folder)
            for batch in list(torch.utils.data.DataLoader(Batches(), batch_size=8))[dist.get_rank() :: 2] * 2:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = first(**batch)["loss"] + last(**batch)["loss"] + frozen(**batch)["loss"]
                accelerator.backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
                if not run and compression.states[0].exchange.steps == 3:
                    accelerator.save_state(folder)
                    dist.barrier()
            runs.append(torch.cat([weights_of(net) for net in nets]))
            names = sorted(path.name for path in folder.glob("gcompress*"))
            assert names == [f"gcompress{n}-rank-{r}-of-2.pt" for n in ("-2", "") for r in (0, 1)], names
            assert [state.exchange.steps for state in compression.states] == [6 + 3 * run] * 2
            expect_error(gcompress.ConfigError, "2 are prepared", lambda: compression.report)  # noqa: B023
            assert not torch.equal(weights_of(nets[0]), weights_of(nets[2]))


@of_two
def accelerate_refuses_what_would_not_be_compressed():
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType

    hooked = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    expect_error(gcompress.ConfigError, "comm_hook=", lambda: compressed(accelerator_of(hooked)))
    accelerator = accelerator_of()
    compressed(accelerator)
    expect_error(gcompress.ConfigError, "already", lambda: compressed(accelerator))
    accelerator = accelerator_of()
    accelerator.state.distributed_type = DistributedType.FSDP
    expect_error(gcompress.ConfigError, "distributed_type FSDP", lambda: compressed(accelerator))


@of_one
def accelerate_with_one_process_says_that_nothing_is_sent():
    with warnings_of("gcompress.plugins.accelerate.handler") as warned:
        accelerator = accelerator_of()
        compression = compressed(accelerator)
        weights = train(accelerator, *prepared(accelerator))
    assert len(warned) == 1 and "nothing to exchange" in warned[0] and compression.states == []
    accelerator = accelerator_of()
    assert torch.equal(train(accelerator, *prepared(accelerator)), weights)
