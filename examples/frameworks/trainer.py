#!/usr/bin/env python3
"""The Trainer of Hugging Face Transformers with compressed gradients: one line more than without (see `compress`).

    torchrun --nproc-per-node 2 examples/frameworks/trainer.py

Trains a tiny GPT-2 from scratch on the CPU, on sequences that repeat; half of the way, then the rest from the
checkpoint. Prints the loss and what was sent; docs/FRAMEWORKS.md has everything else.
"""

import tempfile

import gcompress.plugins.transformers
import torch
import torch.distributed as dist
import transformers

generator = torch.Generator().manual_seed(0)
rows = torch.randint(32, (512, 4), generator=generator).repeat(1, 4)  # four tokens, four times: to be learnt
data = [{"input_ids": row, "labels": row} for row in rows]
config = transformers.GPT2Config(
    vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
)


def build(folder, epochs):
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=16,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments, train_dataset=data)
    return trainer, gcompress.plugins.transformers.register(trainer, "mask:sparsity=0.95,bits=2")


dist.init_process_group("gloo")
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
trainer, compression = build(folder[0], epochs=3)
trainer.train()
trainer, compression = build(folder[0], epochs=6)  # as after a restart
trainer.train(resume_from_checkpoint=True)
if trainer.is_world_process_zero():
    losses, report = [line["loss"] for line in trainer.state.log_history if "loss" in line], compression.report
    print(f"loss {losses[-1]:.2f}, at first {losses[0]:.2f}")
    print(f"sent {report.sent_bytes:,} bytes, uncompressed {report.fp32_bytes:,}: {report.ratio:.1f} times fewer")
dist.destroy_process_group()
