#!/usr/bin/env python3
"""Hugging Face Accelerate with compressed gradients: one line more than without (see `compress`).

    torchrun --nproc-per-node 2 examples/frameworks/accelerate_training.py

Trains a small network on synthetic data on the CPU, in bfloat16, with accumulated and clipped gradients; saves with
`save_state` half-way and goes on from there with `load_state`. Prints the loss and what was sent;
docs/FRAMEWORKS.md has everything else.
"""

import tempfile

import gcompress.plugins.accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
compression = gcompress.plugins.accelerate.register(accelerator, "mask:sparsity=0.95,bits=2")

torch.manual_seed(0)
x = torch.randn(2048, 64)
data = torch.utils.data.TensorDataset(x, (x[:, :8] * x[:, 8:16]).argmax(dim=1))
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
model, optimizer, batches = accelerator.prepare(
    model,
    torch.optim.SGD(model.parameters(), lr=0.5),
    torch.utils.data.DataLoader(data, batch_size=32, shuffle=True),
)


def train(epochs):
    for epoch in epochs:
        for batch, target in batches:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)


train(range(6))
(folder,) = broadcast_object_list([tempfile.mkdtemp()])
accelerator.save_state(folder)
accelerator.wait_for_everyone()
accelerator.load_state(folder)  # as after a restart
train(range(6, 12))
report = compression.report
accelerator.print(
    f"sent {report.sent_bytes:,} bytes, uncompressed {report.fp32_bytes:,}: {report.ratio:.1f} times fewer"
)
accelerator.end_training()
