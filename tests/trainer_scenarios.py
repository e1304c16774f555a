"""Scenarios of the Trainer of Hugging Face Transformers."""

import shutil

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


def trainer_of(folder, net=None, data=None, **options):
    import transformers
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # that of an earlier scenario, which may have had another precision
    settings = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        **options,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(net or Net(), arguments, train_dataset=data or Batches())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def compressed(trainer, policy=POLICY, **options):
    import gcompress.plugins.transformers

    return gcompress.plugins.transformers.register(trainer, policy, **options)


def trained(folder, policy=POLICY, resume=None, **options):
    """(the weights, what `compress` returned)."""
    trainer = trainer_of(folder, **options)
    compression = compressed(trainer, policy) if policy else None
    trainer.train(resume)
    return weights_of(trainer.model), compression


@of_two
def trainer_trains_like_a_loop():
    with shared_folder() as folder:
        expected, state = loop()
        weights, compression = trained(folder)
        assert torch.equal(weights, expected) and compression.report == state.exchange.report
        assert ddp.exchange(compression) is compression.state.exchange


@of_two
def trainer_accumulates_clips_and_casts_like_a_loop():
    with shared_folder() as folder:
        for options, alike in (
            ({"gradient_accumulation_steps": 3, "max_grad_norm": CLIP}, {"accumulate": 3, "clip": CLIP}),
            ({"bf16": True}, {"dtype": torch.bfloat16}),
        ):
            assert torch.equal(trained(folder, **options)[0], loop(**alike)[0]), options


@of_two
def trainer_without_a_compressor_is_the_trainer():
    with shared_folder() as folder:
        assert torch.equal(trained(folder, "none")[0], trained(folder, None)[0])


@of_two
def trainer_goes_on_from_its_checkpoints_to_the_bit():
    """From the last one, and from one of another folder."""
    with shared_folder() as folder:
        weights, first = trained(folder, save_strategy="epoch")
        expected, _ = loop()
        assert torch.equal(weights, expected)
        names = sorted(path.name for path in (folder / "checkpoint-3").glob("gcompress*"))
        assert names == ["gcompress-rank-0-of-2.pt", "gcompress-rank-1-of-2.pt"]
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "checkpoint-6")
            shutil.copytree(folder / "checkpoint-3", folder / "elsewhere" / "kept")
        dist.barrier()
        for path in (True, str(folder / "elsewhere" / "kept")):
            resumed, compression = trained(folder, resume=path)
            assert torch.equal(resumed, expected), path
            assert compression.state.exchange.steps == compression.report.steps == 6
            assert compression.report == first.report


@of_two
def trainer_says_that_a_checkpoint_has_no_memory():
    with shared_folder() as folder:
        trained(folder, save_strategy="epoch")
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "checkpoint-3" / "gcompress-rank-1-of-2.pt").unlink()
            for path in (folder / "checkpoint-6").glob("gcompress*"):
                path.unlink()
        dist.barrier()
        with warnings_of("gcompress.plugins.transformers.trainer_callback") as warned:
            trained(folder, resume=str(folder / "checkpoint-6"), num_train_epochs=3)
        assert len(warned) == 1 and "resumes at step 6" in warned[0] and "no memory" in warned[0], warned
        if dist.get_rank() == 1:
            from gcompress.exchange.rank_files import read_rank_file

            expect_error(
                gcompress.ConfigError, "no gcompress-rank-1-of-2", lambda: read_rank_file(folder / "checkpoint-3", 1, 2)
            )


@of_two
def trainer_saves_no_memory_with_the_model_alone():
    with shared_folder() as folder:
        trained(folder, save_strategy="epoch", save_only_model=True)
        dist.barrier()
        assert (folder / "checkpoint-3").is_dir() and not list(folder.rglob("gcompress*"))


@of_two
def trainer_goes_on_when_it_is_called_again():
    """The same DistributedDataParallel is used again, with its hook and memory."""
    with shared_folder() as folder:
        trainer = trainer_of(folder, num_train_epochs=1)
        compression = compressed(trainer)
        trainer.train()
        state = compression.state
        trainer.train()
        assert compression.state is state and state.exchange.steps == 6
        assert torch.equal(weights_of(trainer.model), loop()[0])
        own = [None, None]
        dist.all_gather_object(own, state.state_dict())
        same_sums(state.full_state_dict(), own)


@of_two
def trainer_logs_bytes():
    import transformers

    class Shown(transformers.TrainerCallback):
        def __init__(self):
            self.lines = []

        def on_log(self, args, state, control, logs=None, **others):
            self.lines.append(dict(logs))

    with shared_folder() as folder:
        for log_bytes in (True, False):
            trainer, shown = trainer_of(folder, logging_strategy="steps", logging_steps=2), Shown()
            trainer.add_callback(shown)
            compression = compressed(trainer, log_bytes=log_bytes)
            trainer.train()
            for lines in (shown.lines, trainer.state.log_history):
                ours = [line for line in lines if "gcompress/ratio" in line]
                last = [compression.report.last_step_bytes] * log_bytes
                assert [line["gcompress/sent_bytes"] for line in ours][2:] == last
                assert all(line["gcompress/ratio"] > 2 and "loss" in line for line in ours)
                assert len(ours) == 3 * log_bytes


@of_two
def trainer_trains_a_language_model():
    """With its own loss, dropout, tied embeddings and activation checkpointing."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (48, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    with shared_folder() as folder:
        for options in ({}, {"activation_checkpointing": True}):
            torch.manual_seed(0)
            model = transformers.GPT2LMHeadModel(config)
            before = weights_of(model)
            trainer = trainer_of(folder, model, data, **options)
            compression = compressed(trainer, "topk:sparsity=0.9")
            trainer.train()
            weights = [torch.empty_like(before) for _ in range(2)]
            dist.all_gather(weights, weights_of(model))
            assert torch.equal(*weights) and not torch.equal(weights[0], before)
            assert compression.report.steps == 6 and compression.report.ratio > 4


@of_two
def trainer_refuses_what_would_not_be_compressed():
    with shared_folder() as folder:
        trainer = trainer_of(folder)
        compressed(trainer)
        expect_error(gcompress.ConfigError, "already", lambda: compressed(trainer))
        trainer = trainer_of(folder)
        trainer.is_deepspeed_enabled = True
        expect_error(gcompress.ConfigError, "DeepSpeed", lambda: compressed(trainer))


@of_one
def trainer_with_one_process_says_that_nothing_is_sent():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with warnings_of("gcompress.plugins.transformers.trainer_callback") as warned:
            weights, compression = trained(folder, save_strategy="epoch", logging_strategy="epoch")
        assert len(warned) == 1 and "nothing to exchange" in warned[0] and compression.state is None
        assert torch.equal(weights, trained(folder, None)[0])
        expect_error(gcompress.ConfigError, "nothing is exchanged", lambda: compression.report)
