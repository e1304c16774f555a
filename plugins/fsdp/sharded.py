"""How a sharded model comes to compressed communication, and what its ranks remember."""

import io

import torch
import torch.distributed as dist
from gcompress.plugins.ddp.process_group import ProcessGroupEngine
from torch.distributed.device_mesh import DeviceMesh

from gcompress.errors import ConfigError
from gcompress.exchange.differences import WeightDifferences
from gcompress.exchange.engine import agree
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.reduce_scatter import ScatterExchange
from gcompress.exchange.report import Report
from gcompress.memory import Scratch
from gcompress.policy import as_policy, check_types

from .backward_pass import BackwardPass
from .mesh_ranks import MeshRanks
from .replicas import ReplicaMean
from .shards import DifferenceAllGather, PackedReduceScatter
from .torch_layout import ParameterGroup, parameter_groups_of


class ShardedState:
    """One rank's side of a sharded model: exchange, memory, report. See `apply`.

    Attributes:
        exchange: the GradientExchange (HSDP) or ScatterExchange (FSDP2): `.report` counts its bytes.
        weights_report: the Report of weights that travel as differences.
    """

    def __init__(self, model, compression, mesh, weights=None, scaler=None):
        self._ranks, self._groups = MeshRanks(mesh), list(parameter_groups_of(model))
        replicated = self._ranks.replicas is not None
        _check_groups(self._groups, self._ranks)
        if weights is not None and replicated:
            raise ConfigError(
                "weights: got a policy with a mesh of replicas, expected None: HSDP compresses their mean"
            )
        self.exchange = (GradientExchange if replicated else ScatterExchange)(compression, scaler=scaler)
        members = self._ranks.replicas or self._ranks.shards
        self.exchange.engine = ProcessGroupEngine(members, every_rank=True, device_type=mesh.device_type)
        weights = None if weights is None else as_policy(weights)
        self._agree_on(self.exchange.policy, weights)
        self._prepare(replicated)
        self._passes = BackwardPass(self.exchange, self._first, self._failed)
        self.weights_report, self._weights = Report(), {}
        self._attach(replicated, weights)
        self._gcompress, self._agreed = self.exchange, False  # where `gcompress.exchange(state)` looks

    def _agree_on(self, policy, weights):
        """All ranks of the mesh must have the same model and policies, before one refuses what another takes."""
        model = {name: list(p.shape) for group in self._groups for name, p in group.parameters().items()}
        texts = {"compression": policy.to_dict(), "weights": weights.to_dict() if weights else "none", "model": model}
        agree(self._ranks, texts, self._ranks.numbers)

    def _prepare(self, replicated):
        trained, parameters = {}, {}
        for group in self._groups:
            shapes = group.shard_shapes()
            for name, parameter in group.parameters().items():
                parameters[name] = parameter
                shape = shapes[name] if replicated else parameter.shape
                if parameter.requires_grad and shape.numel():
                    trained[name] = shape
        check_types(self.exchange.policy, {name: parameters[name] for name in trained})
        self.exchange.prepare(trained)
        self.exchange.watch(parameters)

    def _attach(self, replicated, weights):
        scratch, size = Scratch(), dist.get_world_size(self._ranks.shards)
        for group in self._groups:
            if replicated:
                group.module.set_all_reduce_hook(ReplicaMean(group, self.exchange, self._passes))
                continue
            group.module.set_custom_reduce_scatter(PackedReduceScatter(group, self.exchange, self._passes, scratch))
            if weights is not None:
                shapes = group.padded_shapes()
                known = WeightDifferences(weights, self.exchange.engine, shapes, self.weights_report)
                self._weights[next(iter(shapes))] = known
                group.module.set_custom_all_gather(DifferenceAllGather(known, size))

    def _first(self):
        if not self._agreed:
            agree(self._ranks, {"step": self.exchange.steps}, self._ranks.numbers)
            self._agreed = True

    def _failed(self):
        for group in self._groups:
            group.forget()

    @property
    def report(self) -> Report:
        """Counts the bytes of gradients."""
        return self.exchange.report

    def state_dict(self) -> dict:
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        weights = {name: known.state_dict() for name, known in self._weights.items()}
        return {**self.exchange.state_dict(), "place": self._place(), "weights": weights}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()` or `full_state_dict()`, on all ranks before the same step.

        Raises:
            ConfigError: it is another rank's, another mesh's, another policy's or another model's.
        """
        if isinstance(state, dict) and "sums" in state:
            saved = {}
        else:
            if not isinstance(state, dict) or state.get("place") != self._place():
                got = state.get("place") if isinstance(state, dict) else type(state).__name__
                raise ConfigError(f"state: got that of {got}, expected that of {self._place()}")
            saved = state.get("weights", {})
            if set(saved) != set(self._weights):
                raise ConfigError(f"state: got weights of {sorted(saved)}, expected those of {sorted(self._weights)}")
        for name, known in self._weights.items():
            known.check(saved.get(name, {}))
        self.exchange.load_state_dict(state)
        for name, known in self._weights.items():
            known.load_state_dict(saved.get(name, {}))
        self._agreed = False

    def full_state_dict(self) -> dict:
        """What all ranks remember together, for any number of ranks (HSDP: of replicas); all must call it.

        The same on all ranks with FSDP2; with HSDP on all that have the same shards. Weights are not in it: from it
        the first all-gather is one of full precision.
        """
        return self.exchange.full_state_dict()

    @property
    def checkpoint(self) -> "OwnCheckpoint":
        """This state for `torch.distributed.checkpoint`: save({"gcompress": state.checkpoint}, …)."""
        return OwnCheckpoint(self)

    def _place(self):
        """Whose the state is: a rank of the mesh, and which shard it has."""
        shards = self._ranks.shards
        found = {"rank": self._ranks.rank(), "ranks": self._ranks.world_size()}
        return {**found, "shard": dist.get_rank(shards), "shards": dist.get_world_size(shards)}


class OwnCheckpoint:
    """A ShardedState as torch.distributed.checkpoint saves it: every rank's own under a key of its own."""

    def __init__(self, state: ShardedState):
        self._state = state

    def state_dict(self) -> dict:
        """{key: bytes}: as one value, since its tensors may not be there yet on the rank that loads."""
        file = io.BytesIO()
        torch.save(self._state.state_dict(), file)
        return {self._key(): file.getvalue()}

    def load_state_dict(self, saved: dict) -> None:
        """See `ShardedState.load_state_dict`."""
        if self._key() not in saved:
            raise ConfigError(f"state: got {', '.join(saved) or 'nothing'}, expected {self._key()!r}")
        self._state.load_state_dict(torch.load(io.BytesIO(saved[self._key()]), weights_only=True))

    def _key(self):
        place = self._state._place()
        return f"rank {place['rank']} of {place['ranks']}"


def _check_groups(groups: list[ParameterGroup], ranks: MeshRanks) -> None:
    """ConfigError if a module is sharded in a way that the hooks cannot serve."""
    members = dist.get_process_group_ranks(ranks.shards)
    for group in groups:
        what = f"model: the {type(group.module).__name__} of {', '.join(group.parameters())}"
        if group.replicated_by_torch():
            raise ConfigError(
                f"{what} is replicated by torch, which all-reduces before its hook is called; expected it sharded over "
                'the inner dimension alone: fully_shard(module, mesh=mesh["shard"]), with '
                'mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))'
            )
        found = dist.get_process_group_ranks(group.shard_group)
        if found != members:
            raise ConfigError(
                f"mesh: {what} is sharded over ranks {found}, expected {members}, the mesh's last dimension"
            )
        if group.tensor_parallel():
            raise ConfigError(f"{what}: got tensor parallel parameters, expected plain ones: not supported")
        if group.hooks():
            raise ConfigError(f"{what} has {', '.join(group.hooks())} of its own already, expected none")
        others = [name for name, dimension in group.shard_dimensions().items() if dimension != 0]
        if others and ranks.replicas is None:
            raise ConfigError(f"{what}: {others[0]!r} is sharded along another dimension, expected the first")


def apply(
    model: torch.nn.Module, compression, mesh: DeviceMesh, *, weights: object = None, scaler=None
) -> ShardedState:
    """Compress the communication of a model that `fully_shard` has sharded; returns the ShardedState.

    With a mesh of two dimensions (HSDP) the mean over replicas, its outer dimension, is compressed; the model must be
    sharded over the inner one alone, `fully_shard(layer, mesh=mesh["shard"])`. With a mesh of one dimension (FSDP2) the
    reduce-scatter of gradients is, and the all-gather of weights if `weights` says how.

    Args:
        model: the root module; its weights are there (not on the meta device).
        compression: a compressor, its spec, or a `gcompress.Policy`, the same on all ranks.
        mesh: the DeviceMesh that the model is sharded over.
        weights: a policy for differences of weights; None: torch's own all-gather.
        scaler: the loss scale, see `gcompress.plugins.ddp.register`.

    Every rank of the job must call it, before the first step; ExchangeError within the process group's time-out if one
    does not.

    Raises:
        ConfigError: ranks differ, or the model is sharded in a way that torch has no hooks for.
    """
    return ShardedState(model, compression, mesh, weights, scaler)
