"""Scenarios of Lightning's Trainer and of Fabric."""

import importlib
import importlib.util
import types

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

import gcompress
from tests.framework_tools import (
    CLIP,
    LR,
    POLICY,
    Net,
    batches_of_rank,
    layers,
    loop,
    of_one,
    of_two,
    same_sums,
    shared_folder,
    warnings_of,
    weights_of,
)
from tests.processes import expect_error

NAMES = ("lightning.pytorch", "pytorch_lightning")


class ListLogger:
    """Lightning's logger of a list; made late, since it derives from Lightning's."""

    def __new__(cls, package):
        module = importlib.import_module(f"{package}.loggers.logger")

        class Logger(module.DummyLogger):
            def __init__(self):
                super().__init__()
                self.lines = []

            def log_metrics(self, metrics, step=None):
                self.lines.append((step, metrics))

        return Logger()


def module_of(package):
    pl = importlib.import_module(package)

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = layers()

        def training_step(self, batch, number):
            return torch.nn.functional.mse_loss(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    return Lit()


def here():
    """Lightning's plug-in for a process that nobody launched: left to find out, it loads an MPI that may be missing."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    return LightningEnvironment()


def fit(callbacks, package=NAMES[0], epochs=2, ckpt_path=None, devices=2, strategy="ddp", logger=False, **options):
    """Train; returns (the weights, the Trainer, its module)."""
    pl = importlib.import_module(package)
    module = options.pop("module", None) or module_of(package)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=logger,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = torch.utils.data.DataLoader(batches_of_rank(), batch_size=None)
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    return weights_of(module), trainer, module


def compressed(policy=POLICY, **options):
    from gcompress.plugins.lightning import GradientCompression

    return GradientCompression(policy, **options)


@of_two
def lightning_trains_like_a_loop():
    expected, state = loop()
    for package in NAMES:
        if importlib.util.find_spec(package.split(".")[0]):
            callback = compressed()
            weights, _, _ = fit([callback], package)
            assert torch.equal(weights, expected), package
            assert callback.report == state.exchange.report and ddp.exchange(callback) is callback.state.exchange


@of_two
def lightning_accumulates_clips_and_casts_like_a_loop():
    expected, _ = loop(accumulate=3, clip=CLIP)
    assert not torch.equal(expected, loop(accumulate=3)[0])
    assert torch.equal(fit([compressed()], accumulate_grad_batches=3, gradient_clip_val=CLIP)[0], expected)
    assert torch.equal(fit([compressed()], precision="bf16-mixed")[0], loop(dtype=torch.bfloat16)[0])


@of_two
def lightning_has_its_scaler_found():
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)  # whose first steps overflow
    callback = compressed()
    weights, _, _ = fit([callback], epochs=12, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert scaler.get_scale() < 2.0**40 and 0 < callback.state.exchange.steps < 36
    plain = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    expected, state = loop(epochs=12, dtype=torch.float16, scaler=plain)
    assert torch.equal(weights, expected) and callback.state.exchange.steps == state.exchange.steps


@of_two
def lightning_without_a_compressor_is_lightning():
    assert torch.equal(fit([compressed("none")])[0], fit([])[0])


@of_two
def lightning_goes_on_from_its_file():
    """To the bit if asked for; otherwise from the sums of residuals, with what that changes."""
    expected, _ = loop()
    first, _, _ = fit([], epochs=1)
    for exact in (False, True):
        with shared_folder() as folder:
            path = folder / "lightning.ckpt"
            callback = compressed(exact_resume=exact)
            _, trainer, _ = fit([callback], epochs=1)
            trainer.save_checkpoint(path)
            own = [None, None]
            dist.all_gather_object(own, callback.state.state_dict())
            resumed = compressed(exact_resume=exact)
            weights, _, _ = fit([resumed], ckpt_path=path)
            assert resumed.state.exchange.steps == 6 and resumed.report.steps == 6
            assert torch.equal(weights, expected) == exact
            difference = float((weights - expected).norm() / (expected - first).norm())
            assert difference < 0.5, difference
            saved = torch.load(path, weights_only=True)["callbacks"]["GradientCompression"]
            same_sums(gcompress.merge_states(saved["ranks"]) if exact else saved, own)
            with warnings_of("gcompress.plugins.lightning.gradient_compression") as warned:
                fit([], epochs=1)[1].save_checkpoint(folder / "plain.ckpt")
                fit([compressed()], ckpt_path=folder / "plain.ckpt")
            assert len(warned) == 1 and "no memory" in warned[0]


@of_two
def lightning_keeps_the_memory_when_fit_is_called_again():
    expected, _ = loop()
    callback = compressed()
    _, trainer, module = fit([callback], epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, torch.utils.data.DataLoader(batches_of_rank(), batch_size=None))
    assert torch.equal(weights_of(module), expected) and callback.report.steps == 6


@of_two
def lightning_logs_bytes():
    found = []
    for options in ({}, {"every_n_steps": 3}, {"log": False}):
        logger = ListLogger(NAMES[0])
        fit([compressed(**options)], logger=logger, log_every_n_steps=2)
        found.append({step: line["gcompress/ratio"] for step, line in logger.lines if "gcompress/ratio" in line})
    expected = [[2, 4, 6], [3, 6], []] if dist.get_rank() == 0 else [[], [], []]
    assert list(map(list, found)) == expected, found
    assert all(ratio > 2 for ratios in found for ratio in ratios.values())


@of_two
def lightning_takes_a_state_before_there_is_a_model():
    """Its own way, which it uses on CUDA alone: here its function is called."""
    from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(ddp_comm_state=ddp.GradientState(POLICY), ddp_comm_hook=ddp.compress)
    parallel = torch.nn.parallel.DistributedDataParallel(Net())
    _register_ddp_comm_hook(parallel, strategy._ddp_comm_state, strategy._ddp_comm_hook, strategy._ddp_comm_wrapper)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LR)
    for batch in batches_of_rank() * 2:
        optimizer.zero_grad()
        parallel(**batch)["loss"].backward()
        optimizer.step()
    assert torch.equal(weights_of(parallel.module), loop()[0])
    _register_ddp_comm_hook(torch.nn.parallel.DistributedDataParallel(Net()))  # without a hook it does nothing


@of_two
def lightning_strategies_that_are_not_ddp_are_refused():
    from torch.distributed.fsdp import fully_shard

    strategy = types.SimpleNamespace(model=fully_shard(layers()))
    trainer = types.SimpleNamespace(strategy=strategy, world_size=2)
    expect_error(gcompress.ConfigError, "DDPStrategy", lambda: compressed().on_fit_start(trainer, None))
    strategy.model = torch.nn.parallel.DistributedDataParallel(Net())
    ddp.register(strategy.model, "topk")
    expect_error(gcompress.ConfigError, "ddp_comm_hook", lambda: compressed().on_fit_start(trainer, None))
    expect_error(gcompress.ConfigError, "every_n_steps: got 0", lambda: compressed(every_n_steps=0))


@of_two
def fabric_trains_like_a_loop():
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=LR))
    state = ddp.register(model, POLICY)
    batches = batches_of_rank() * 2
    for number, batch in enumerate(batches, 1):
        last = number % 3 == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model(**batch)["loss"] / 3)
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
    expected, its_state = loop(accumulate=3, clip=CLIP)
    assert torch.equal(weights_of(net), expected) and state.exchange.report == its_state.exchange.report


@of_one
def lightning_on_one_device_says_that_nothing_is_sent():
    for strategy in ("auto", "ddp"):
        callbacks = [compressed(exact_resume=True)]
        with warnings_of("gcompress.plugins.lightning.gradient_compression") as warned:
            weights, _, _ = fit(callbacks, devices=1, strategy=strategy, plugins=here())
        assert len(warned) == 1 and "nothing to exchange" in warned[0]
        assert torch.equal(weights, fit([], devices=1, strategy="auto", plugins=here())[0])
        assert callbacks[0].state_dict() == {}
        expect_error(gcompress.ConfigError, "nothing is exchanged", lambda: callbacks[0].report)  # noqa: B023
    dist.destroy_process_group()  # which the strategy "ddp" has made
