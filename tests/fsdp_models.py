"""Models, meshes and steps of the scenarios of fsdp_ranks.py and fsdp_memory.py."""

import contextlib
import functools

import torch
import torch.distributed as dist
from gcompress.plugins import fsdp
from gcompress.plugins.ddp.process_group import ProcessGroupEngine
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.promises import collect, equal  # noqa: F401
from tests.scenarios import Scenarios

# Lanes of a mesh are made once: each takes longer than the steps of a scenario.
fsdp.sharded.ProcessGroupEngine = functools.cache(ProcessGroupEngine)

SCENARIOS = scenario = Scenarios()
LEARNING_RATE = 0.5


@functools.cache
def mesh_of(*sizes):
    names = ("replicate", "shard")[-len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def meshes():
    """(mesh for `apply`, mesh for `fully_shard`) of FSDP2 and HSDP."""
    one, two = mesh_of(dist.get_world_size()), mesh_of(2, dist.get_world_size() // 2)
    return [(one, one), (two, two["shard"])]


def make_model():
    """Of shards that are uneven, and of some that are empty."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 61), torch.nn.Tanh(), torch.nn.Linear(61, 50), torch.nn.Linear(50, 3, bias=False)]
    return torch.nn.Sequential(*layers)


def sharded(mesh, model=None, **options):
    model = model or make_model()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def applied(meshes, policy, model=None, *, weights=None, scaler=None, **options):
    """(sharded model, ShardedState, optimizer)."""
    model = sharded(meshes[1], model, **options)
    state = fsdp.apply(model, policy, meshes[0], weights=weights, scaler=scaler)
    return model, state, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def batch(step, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(1000 * step + rank))


def train(model, optimizer, steps=4, first=0, between=lambda step: None):
    for step in range(first, first + steps):
        between(step)
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return weights_of(model)


def weights_of(model):
    return {name: local(p).detach().clone() for name, p in model.named_parameters()}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return tensor.full_tensor().detach()


def memory_of(state):
    found = {}
    for kind in ("feedback", "owner_feedback", "memories"):
        collect(kind, state.exchange.state_dict()[kind], found)
    return found


def gathered(thing):
    """An object of each rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


@contextlib.contextmanager
def refused(kind, text):
    """Every rank must get such an error."""
    try:
        yield
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError(f"expected {kind.__name__}")
