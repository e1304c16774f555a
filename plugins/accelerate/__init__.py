"""gcompress for Hugging Face Accelerate.

    accelerator = accelerate.Accelerator()
    compression = gcompress.plugins.accelerate.register(accelerator, "mask:sparsity=0.99,bits=2")
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

Before `prepare` or after it, once for each Accelerator; options of `DistributedDataParallelKwargs` stay as they
are. Every model gets a memory of its own. `accelerator.save_state` and `load_state` save and load it, a file of each
rank (see gcompress/exchange/rank_files.py). `compression.report` counts bytes.
"""

from .handler import PreparedModels, register

__all__ = ["PreparedModels", "register"]
