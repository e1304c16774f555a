"""What takes the place of an Accelerator's DistributedDataParallelKwargs, and its part of checkpoints."""

import logging
import weakref

import torch

try:
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
except ImportError as error:
    raise ImportError(f"gcompress.plugins.accelerate needs accelerate: pip install accelerate ({error})") from error

from gcompress.plugins.ddp.hook import GradientState
from gcompress.plugins.ddp.hook import register as register_parallel
from gcompress.plugins.ddp.unwrap import parallel_with

from gcompress.errors import ConfigError
from gcompress.exchange.rank_files import read_rank_file, write_rank_file
from gcompress.exchange.report import Report
from gcompress.policy import as_policy

log = logging.getLogger(__name__)


class PreparedModels:
    """The compression of the models that an Accelerator prepares; `register` makes it."""

    def __init__(self, accelerator: Accelerator, compression, scaler=None):
        self._accelerator, self._policy, self._scaler = accelerator, as_policy(compression), scaler
        self._states: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by the model in the DDP

    @property
    def states(self) -> list[GradientState]:
        """One for each model that is trained, in the order in which they were prepared."""
        return [state for _, state in self._numbered()]

    @property
    def state(self) -> GradientState:
        """That of the only model; ConfigError if there is none or there are several."""
        states = self.states
        if len(states) != 1:
            raise ConfigError(f"models: {len(states)} are prepared for training, expected one: look at `states`")
        return states[0]

    @property
    def report(self) -> Report:
        """The bytes of the only model; ConfigError if there is none or there are several."""
        return self.state.exchange.report

    @property
    def _gcompress(self):  # where `gcompress.plugins.ddp.exchange(compression)` looks
        return self.state.exchange

    def register(self, parallel: torch.nn.parallel.DistributedDataParallel) -> None:
        """Compress the gradients of a model that was prepared."""
        self._states[parallel.module] = register_parallel(parallel, self._policy, scaler=self._scaler)

    def register_prepared(self) -> None:
        """Compress the gradients of the models that were prepared already."""
        for model in self._accelerator._models:
            trained = [p for p in model.parameters() if p.requires_grad]
            if trained and model not in self._states:
                self.register(parallel_with(trained[0], None))

    def _numbered(self):
        """[(number of the model as accelerate counts its files, state)]."""
        models = enumerate(self._accelerator._models)
        inner = ((number, getattr(model, "module", model)) for number, model in models)
        return [(number, self._states[model]) for number, model in inner if model in self._states]

    def save(self, models: list, weights: list, folder: str) -> None:
        """A hook of `save_state`, which every process calls."""
        for number, state in self._numbered():
            write_rank_file(folder, state.state_dict(), _file_name(number))

    def load(self, models: list, folder: str) -> None:
        """A hook of `load_state`, which every process calls."""
        for number, state in self._numbered():
            engine = state.exchange.engine
            saved = read_rank_file(folder, engine.rank(), engine.world_size(), _file_name(number))
            if saved is None:
                log.warning("%s has no memory of model %d: what was left over is forgotten", folder, number)
            else:
                state.load_state_dict(saved)


class _Handler(DistributedDataParallelKwargs):
    """The user's options of DistributedDataParallel, and our hook on every model that is wrapped."""

    def __init__(self, compression, options):
        self.__dict__.update(vars(options))
        self._compression, self._options = compression, options

    def to_dict(self, *arguments, **keywords):
        return self._options.to_dict(*arguments, **keywords)

    def to_kwargs(self):
        return self._options.to_kwargs()

    def register_comm_hook(self, model):
        self._compression.register(model)


def register(accelerator: Accelerator, compression, *, scaler=None) -> PreparedModels:
    """Compress the gradients of every model that an Accelerator prepares, or has prepared.

    Args:
        accelerator: of a run with DistributedDataParallel. With one process there is nothing to exchange: a
            warning says so.
        compression: what `gcompress.plugins.ddp.register` takes, the same on all ranks.
        scaler: see `gcompress.plugins.ddp.register`; accelerate's own is found by itself.

    Raises:
        ConfigError: accelerate does not train with DistributedDataParallel, or its options have a comm_hook.
    """
    kind = accelerator.distributed_type.name
    parallelism = getattr(accelerator, "parallelism_config", None)
    if not (kind == "NO" or kind.startswith("MULTI_")) or getattr(parallelism, "tp_enabled", False):
        shown = (
            "a parallelism_config of tensor parallelism" if kind.startswith("MULTI_") else f"distributed_type {kind}"
        )
        raise ConfigError(f"accelerator: got {shown}, expected one that trains with DistributedDataParallel")
    options = accelerator.ddp_handler or DistributedDataParallelKwargs()
    if isinstance(options, _Handler):
        raise ConfigError("accelerator: its gradients are compressed already, expected one call for each Accelerator")
    for name in ("comm_hook", "comm_wrapper"):
        if getattr(options, name) != DDPCommunicationHookType.NO:
            raise ConfigError(
                f"accelerator: its DistributedDataParallelKwargs has {name}={getattr(options, name)}, expected none: "
                "a DistributedDataParallel has one hook, and this is it"
            )
    made = PreparedModels(accelerator, compression, scaler)
    if accelerator.num_processes == 1:
        log.warning("accelerate runs one process: there is nothing to exchange, and nothing is compressed")
        return made
    accelerator.ddp_handler = _Handler(made, options)
    accelerator.register_save_state_pre_hook(made.save)
    accelerator.register_load_state_pre_hook(made.load)
    made.register_prepared()
    return made


def _file_name(number):
    return f"gcompress-{number}" if number else "gcompress"
