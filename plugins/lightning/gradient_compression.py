"""A callback of Lightning's Trainer."""

import importlib
import io
import logging

import torch
import torch.distributed as dist
from gcompress.plugins.ddp.hook import GradientState, compress
from gcompress.plugins.ddp.unwrap import parallel_of

from gcompress.errors import ConfigError
from gcompress.exchange.rank_files import merged_or_own
from gcompress.exchange.report import Report
from gcompress.policy import as_policy

log = logging.getLogger(__name__)


def _callback_classes():
    """`Callback` of each package that is there: a Trainer knows those of its own package alone."""
    found, errors = [], []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ImportError as error:
            errors.append(f"{name}: {error}")
    if not found:
        raise ImportError(f"gcompress.plugins.lightning needs Lightning: pip install lightning ({'; '.join(errors)})")
    return found


class GradientCompression(*_callback_classes()):  # type: ignore[misc]
    """Compress the gradients of a Trainer whose strategy is DDP; with one device a warning says that nothing is sent.

    Checkpoints have what all ranks remember together, as large for any number of ranks. A run that resumes keeps
    the sum of residuals, but is not the same to the bit; `exact_resume=True` is for that.

    Args:
        compression: what `gcompress.plugins.ddp.register` takes, the same on all ranks.
        scaler: see `gcompress.plugins.ddp.register`; the Trainer's own is found by itself.
        log: whether rank 0's bytes go to the Trainer's loggers.
        every_n_steps: how often; None: as often as the Trainer logs.
        exact_resume: checkpoints have the memory of each rank: as many times the gradient's size as there are ranks,
            gathered on rank 0. As many ranks go on from it to the bit, and any other number as without it.

    Raises:
        ConfigError: of `fit`: the strategy is another one, or has a communication hook.

    Attributes:
        state: the GradientState, from the beginning of `fit` on; None with one device.
    """

    def __init__(
        self,
        compression,
        *,
        scaler=None,
        log: bool = True,
        every_n_steps: int | None = None,
        exact_resume: bool = False,
    ):
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps: got {every_n_steps}, expected at least 1, or None")
        self.state: GradientState | None = None
        self._policy, self._scaler = as_policy(compression), scaler
        self._log, self._every, self._exact = log, every_n_steps, exact_resume
        self._module = None  # whose gradients `state` exchanged
        self._saved = None  # a checkpoint's, until there is a model
        self._steps_logged = 0

    @property
    def report(self) -> Report:
        """The bytes of this rank; ConfigError before `fit`, and with one device."""
        return self._gcompress.report

    @property
    def _gcompress(self):  # where `gcompress.plugins.ddp.exchange(callback)` looks
        if self.state is None:
            raise ConfigError("callback: nothing is exchanged, expected a Trainer that fits, or has, on several ranks")
        return self.state.exchange

    def on_fit_start(self, trainer, pl_module) -> None:
        saved, self._saved = self._saved, None
        if trainer.world_size == 1:
            self.state = None
            log.warning("Lightning trains on one device: there is nothing to exchange, and nothing is compressed")
            return
        try:
            parallel = parallel_of(trainer.strategy.model)
        except ConfigError as error:
            strategy = type(trainer.strategy).__name__
            raise ConfigError(f"strategy: got {strategy}, expected DDPStrategy: {error}") from error
        if getattr(parallel, "_comm_hooks", None):
            raise ConfigError("strategy: it has a ddp_comm_hook, expected none beside the callback GradientCompression")
        if saved is None and self.state is not None and self._module is pl_module:  # `fit` goes on
            saved = self.state.state_dict()
        self.state, self._module = GradientState(self._policy, scaler=self._scaler), pl_module
        self.state.bind(parallel)
        parallel.register_comm_hook(self.state, compress)
        if saved is not None:
            if "ranks" in saved:
                engine = self.state.exchange.engine
                saved = merged_or_own(saved["ranks"], engine.rank(), engine.world_size())
            self.state.load_state_dict(saved)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.state is None or not self._log or not trainer.is_global_zero:
            return
        steps = self.report.steps
        if steps != self._steps_logged and steps % (self._every or trainer.log_every_n_steps or 1) == 0:
            self._steps_logged = steps
            for logger in trainer.loggers:
                logger.log_metrics(self.report.scalars(), step=trainer.global_step)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        if self.state_key not in checkpoint.get("callbacks", {}):
            log.warning("the checkpoint has no memory of compression: this run begins without what was left over there")

    def state_dict(self) -> dict:
        """What Lightning writes to its one file; it calls this on all ranks."""
        if self.state is None:
            return {}
        return _states_of_all(self.state) if self._exact else self.state.full_state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self._saved = state_dict


def _states_of_all(state):
    """{"ranks": each rank's own state} on rank 0, whose file it is; no states on the others."""
    group, file = state.exchange.engine.group, io.BytesIO()
    torch.save(state.state_dict(), file)
    first = dist.get_rank(group) == 0
    gathered = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(file.getvalue(), gathered, dst=dist.get_global_rank(group, 0), group=group)
    files = map(io.BytesIO, gathered or [])
    return {"ranks": [torch.load(each, map_location="cpu", weights_only=True) for each in files]}
