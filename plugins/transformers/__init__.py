"""gcompress for the Trainer of Hugging Face Transformers.

    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    compression = gcompress.plugins.transformers.register(trainer, "mask:sparsity=0.99,bits=2")
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)

Checkpoints have a file of each rank's memory beside the model, which resuming reads; the Trainer's logs say how
many bytes were sent. `compression.report` counts them.
"""

from .trainer_callback import TrainerCompression, register

__all__ = ["TrainerCompression", "register"]
