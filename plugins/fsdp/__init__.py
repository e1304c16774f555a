"""gcompress for torch's FSDP2 (`fully_shard`) and HSDP, on Gloo or NCCL.

    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    state = gcompress.plugins.fsdp.apply(model, "mask:sparsity=0.99,bits=2", mesh)

With a mesh of two dimensions the mean over replicas is compressed, with one of one dimension the reduce-scatter.
`exchange(state)`, or `state.exchange`, counts bytes in `.report`; `state.state_dict()` is what this rank remembers.
docs/FSDP.md is the guide.
"""

from gcompress.exchange.results import exchange

from .sharded import OwnCheckpoint, ShardedState, apply

__all__ = ["OwnCheckpoint", "ShardedState", "apply", "exchange"]
