"""HSDP: sharded within a replica, and a compressed mean over the replicas, between which the network is slow.

    torchrun --nproc-per-node 2 examples/frameworks/hsdp.py               2 replicas of 1 shard
    torchrun --nproc-per-node 4 examples/frameworks/hsdp.py               2 replicas of 2 shards

The model is sharded over the inner dimension of the mesh alone; `fsdp.apply` does the outer one. It learns what another
network with random weights answers. Takes some seconds on a CPU; set OMP_NUM_THREADS=1 where ranks share few cores.
"""

import torch
import torch.distributed as dist
from gcompress.plugins import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS, SHOWN, REPLICAS = 120, 30, 2


def network(width):
    layers = [torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 8))


def main():
    dist.init_process_group("gloo")
    rank, shards = dist.get_rank(), dist.get_world_size() // REPLICAS
    mesh = init_device_mesh("cpu", (REPLICAS, shards), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)  # the same teacher and the same first weights on all ranks
    teacher, model = network(64).requires_grad_(False), network(256)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    state = fsdp.apply(model, "mask:sparsity=0.99,bits=2", mesh)
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
        print(f"between replicas: {state.report.sent_bytes:,} bytes, as float32 {state.report.fp32_bytes:,}")
        print(f"{STEPS} steps: {state.report.ratio:.1f} times fewer bytes between replicas")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
