#!/usr/bin/env python3
"""DistributedDataParallel with compressed gradients: one line more than without (see `register`).

    torchrun --nproc-per-node 2 examples/frameworks/ddp.py

Trains a small network on synthetic data on the CPU, saves a checkpoint with each rank's memory half-way, and goes on
from it. Prints the loss and, at the end, what was sent; docs/FRAMEWORKS.md has everything else.
"""

import tempfile

import gcompress.plugins.ddp
import torch
import torch.distributed as dist

from gcompress.exchange.rank_files import read_rank_file, write_rank_file

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(rank)
x = torch.randn(1024, 64, generator=generator)
labels = (x[:, :8] * x[:, 8:16]).argmax(dim=1)


def build():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    state = gcompress.plugins.ddp.register(model, "mask:sparsity=0.95,bits=2")
    return model, state, torch.optim.SGD(model.parameters(), lr=0.5)


def train(model, optimizer, epochs):
    for epoch in epochs:
        for batch, target in zip(x.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)


model, state, optimizer = build()
train(model, optimizer, range(5))
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
torch.save([model.state_dict(), optimizer.state_dict()], f"{folder[0]}/{rank}.pt")  # the same on all ranks
write_rank_file(folder[0], state.state_dict())

model, state, optimizer = build()  # as after a restart
weights, momenta = torch.load(f"{folder[0]}/{rank}.pt", weights_only=True)
model.load_state_dict(weights)
optimizer.load_state_dict(momenta)
state.load_state_dict(read_rank_file(folder[0], rank, ranks))
train(model, optimizer, range(5, 10))
if rank == 0:
    report = state.exchange.report
    print(f"sent {report.sent_bytes:,} bytes, uncompressed {report.fp32_bytes:,}: {report.ratio:.1f} times fewer")
dist.destroy_process_group()
