"""What the scenarios of DistributedDataParallel share."""

import json
import time
import traceback

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


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


def run_scenarios(scenarios, out):
    """Run {name: function} on every rank; rank 0 writes {name: "ok" or the errors} to a file."""
    results, started = {}, time.monotonic()
    alone = not dist.is_initialized()
    for name, function in scenarios.items():
        failure = None
        try:
            function()
        except Exception:
            failure = f"rank {0 if alone else dist.get_rank()}:\n{traceback.format_exc()}"
        failures = [failure] if alone else [None] * dist.get_world_size()
        if not alone:
            dist.all_gather_object(failures, failure)
        results[name] = "\n".join(filter(None, failures)) or "ok"
        print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)
    if alone or dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
