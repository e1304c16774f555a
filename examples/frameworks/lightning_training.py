#!/usr/bin/env python3
"""Lightning's Trainer with compressed gradients: one callback more than without (see GradientCompression).

    torchrun --nproc-per-node 2 examples/frameworks/lightning_training.py

Trains a small network on synthetic data on the CPU; half of the way, then the rest from Lightning's checkpoint.
Prints the loss and what was sent; docs/FRAMEWORKS.md has everything else. (`python lightning_training.py` does the
same: Lightning starts the second process itself.)
"""

import tempfile

import lightning
import torch
from gcompress.plugins.lightning import GradientCompression


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))

    def training_step(self, batch, number):
        self.loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        return self.loss

    def on_train_epoch_end(self):
        self.print(f"epoch {self.current_epoch}: loss {self.loss.item():.3f}", flush=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(epochs, ckpt_path=None):
    lightning.seed_everything(0, verbose=False)
    compression = GradientCompression("mask:sparsity=0.95,bits=2", exact_resume=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=epochs,
        callbacks=[compression],
        default_root_dir=tempfile.gettempdir(),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    x = torch.randn(2048, 64)
    data = torch.utils.data.TensorDataset(x, (x[:, :8] * x[:, 8:16]).argmax(dim=1))
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=64, shuffle=True), ckpt_path=ckpt_path)
    return trainer, compression.report


trainer, _ = fit(5)
path = trainer.strategy.broadcast(f"{tempfile.mkdtemp()}/half.ckpt")
trainer.save_checkpoint(path)
trainer, report = fit(10, path)
if trainer.is_global_zero:
    print(f"sent {report.sent_bytes:,} bytes, uncompressed {report.fp32_bytes:,}: {report.ratio:.1f} times fewer")
