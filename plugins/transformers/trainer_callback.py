"""A callback of the Trainer that was given the Trainer.

Callbacks are not told which checkpoint training resumes from, and get the model without what is wrapped around it.
So this one is not for `Trainer(callbacks=[…])`: `register` takes the Trainer and adds it.
"""

import functools
import logging
import os

try:
    import transformers
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        f"gcompress.plugins.transformers needs Transformers: pip install transformers accelerate ({error})"
    ) from error

from gcompress.plugins.ddp.hook import GradientState
from gcompress.plugins.ddp.hook import register as register_parallel
from gcompress.plugins.ddp.unwrap import parallel_of

from gcompress.errors import ConfigError
from gcompress.exchange.rank_files import read_rank_file, write_rank_file
from gcompress.exchange.report import Report
from gcompress.policy import as_policy

log = logging.getLogger(__name__)


class TrainerCompression(transformers.TrainerCallback):
    """The compression of a Trainer's gradients; `register` makes it.

    Attributes:
        state: the GradientState, from the beginning of the first training on; None with one process.
    """

    def __init__(self, trainer: transformers.Trainer, compression, scaler=None, log_bytes: bool = True):
        self.state: GradientState | None = None
        self._trainer, self._policy, self._scaler = trainer, as_policy(compression), scaler
        self._log_bytes = log_bytes
        self._parallel = None
        self._resumed_from = None

    @property
    def report(self) -> Report:
        """The bytes of this rank; ConfigError before training begins, and with one process."""
        return self._gcompress.report

    @property
    def _gcompress(self):  # where `gcompress.plugins.ddp.exchange(compression)` looks
        if self.state is None:
            raise ConfigError("trainer: nothing is exchanged, expected one that trains on several ranks, or has")
        return self.state.exchange

    def resumes_from(self, checkpoint: str | bool | None) -> None:
        """The next training begins there: a path, True for the last one, or nothing."""
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed_from = checkpoint or None

    def on_train_begin(self, args, state, control, **others) -> None:
        wrapped = self._trainer.model_wrapped
        if args.world_size == 1:
            log.warning("the Trainer runs one process: there is nothing to exchange, and nothing is compressed")
            return
        parallel = parallel_of(wrapped)
        if parallel is not self._parallel:  # of a second call of `train` it is the first's
            self.state, self._parallel = register_parallel(parallel, self._policy, scaler=self._scaler), parallel
        if self._resumed_from is not None:
            engine = self.state.exchange.engine
            saved = read_rank_file(self._resumed_from, engine.rank(), engine.world_size())
            if saved is not None:
                self.state.load_state_dict(saved)
                return
        if state.global_step:
            log.warning(
                "training resumes at step %d from %s, which has no memory of compression: what was left over there is "
                "forgotten",
                state.global_step,
                self._resumed_from or "a checkpoint that train() was not told of",
            )

    def on_save(self, args, state, control, **others) -> None:
        if self.state is None or args.save_only_model:
            return
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if os.path.isdir(folder):
            write_rank_file(folder, self.state.state_dict())
        else:  # a search of hyperparameters has others
            log.warning("%s is not there: the memory of compression is not saved", folder)

    def on_log(self, args, state, control, logs=None, **others) -> None:
        if self.state is not None and self._log_bytes and logs is not None and "loss" in logs:
            scalars = self.report.scalars()
            logs.update(scalars)
            state.log_history[-1].update(scalars)


def register(trainer: transformers.Trainer, compression, *, scaler=None, log_bytes: bool = True) -> TrainerCompression:
    """Compress the gradients of a Trainer, in every `train()` from now on.

    Args:
        trainer: of a run with DistributedDataParallel (torchrun). With one process there is nothing to exchange: a
            warning says so.
        compression: what `gcompress.plugins.ddp.register` takes, the same on all ranks.
        scaler: see `gcompress.plugins.ddp.register`; the Trainer's own is found by itself.
        log_bytes: whether the Trainer's logs have the bytes of rank 0, where they have the loss.

    Raises:
        ConfigError: the Trainer does not train with DistributedDataParallel, or was given here before.
    """
    for attribute, kind in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        if getattr(trainer, attribute, False):
            raise ConfigError(f"trainer: got one that trains with {kind}, expected DistributedDataParallel")
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(each, TrainerCompression) for each in callbacks):
        raise ConfigError("trainer: its gradients are compressed already, expected one call for each Trainer")
    made = TrainerCompression(trainer, compression, scaler, log_bytes)
    callbacks.insert(0, made)  # loggers, which come later, are told what it adds to the logs
    trainer.train = _telling(trainer.train, made)
    return made


def _telling(train, compression):
    """`Trainer.train`, which first says where training resumes."""

    @functools.wraps(train)
    def telling(resume_from_checkpoint=None, *arguments, **keywords):
        compression.resumes_from(resume_from_checkpoint)
        return train(resume_from_checkpoint, *arguments, **keywords)

    return telling
