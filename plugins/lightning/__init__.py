"""gcompress for Lightning, as `lightning` or as `pytorch_lightning`.

    trainer = lightning.Trainer(strategy="ddp", callbacks=[GradientCompression("mask:sparsity=0.99,bits=2")])
    trainer.fit(model, batches)

after `from gcompress.plugins.lightning import GradientCompression`. On CUDA, Lightning's own way works too, but has
no part in checkpoints and logs:

    DDPStrategy(ddp_comm_state=GradientState("mask:sparsity=0.99,bits=2"), ddp_comm_hook=gcompress.plugins.ddp.compress)

Off CUDA, Lightning ignores these arguments without a word. Fabric needs no plugin:
`gcompress.plugins.ddp.register(fabric.setup_module(model), "mask:sparsity=0.99,bits=2")`.
"""

from .gradient_compression import GradientCompression

__all__ = ["GradientCompression"]
