"""FSDP2 with a compressed reduce-scatter of gradients and an all-gather of weights' differences.

    torchrun --nproc-per-node 2 examples/frameworks/fsdp2.py

Two ranks (or more) share a model's weights, gradients and optimizer state (`fully_shard`), and learn what another
network with random weights answers. Gradients travel with 2 bits for one entry in ten, and what that loses is added to
the next ones; weights travel as their changes since the last step, in 4 bits. On one machine that saves bytes, not
time. Takes some seconds on a CPU; set OMP_NUM_THREADS=1 where ranks share few cores.
"""

import torch
import torch.distributed as dist
from gcompress.plugins import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS, SHOWN = 120, 30


def network(width):
    layers = [torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 8))


def main():
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same teacher and the same first weights on all ranks
    teacher, model = network(64).requires_grad_(False), network(256)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = fsdp.apply(model, "mask:sparsity=0.9,bits=2", mesh, weights="quantize:bits=4")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(1 + rank)  # other data on each rank
    total = torch.zeros(())
    for step in range(1, STEPS + 1):
        inputs = torch.randn(64, 64)
        loss = torch.nn.functional.cross_entropy(model(inputs), teacher(inputs).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if step % SHOWN == 0:
            dist.all_reduce(total)
            if rank == 0:
                print(f"steps {step - SHOWN + 1} to {step}: loss {total / SHOWN / dist.get_world_size():.3f}")
            total.zero_()
    if rank == 0:
        gradients, weights = state.report, state.weights_report
        print(f"gradients: {gradients.sent_bytes:,} bytes, as float32 {gradients.fp32_bytes:,}")
        print(f"weights: {weights.sent_bytes:,} bytes, as float32 {weights.fp32_bytes:,}")
        print(f"{STEPS} steps: gradients {gradients.ratio:.1f} and weights {weights.ratio:.1f} times fewer bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
