"""What the scenarios of DistributedDataParallel share."""

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

from tests.scenarios import Scenarios

SCENARIOS = scenario = Scenarios()


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 300), torch.nn.ReLU(), torch.nn.Linear(300, 50), torch.nn.Linear(50, 30, bias=False)]
    return torch.nn.Sequential(*layers)


def wrapped(model, compression, every_rank=False, **options):
    """A DistributedDataParallel of buckets of at most 40 kB, and its state."""
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.04, **options)
    return model, ddp.register(model, compression, every_rank=every_rank)


def backward(model, step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    model.zero_grad()
    model(torch.randn(8, 40, generator=generator)).square().mean().backward()


def same_on_all_ranks(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


def rank_and_gather():
    """This rank, and a function that gathers an object of each rank; of a process alone, too."""

    def gather(found):
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
        return every

    return (dist.get_rank(), gather) if dist.is_initialized() else (0, lambda found: [found])
