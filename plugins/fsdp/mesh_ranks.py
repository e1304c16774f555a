"""The ranks of a DeviceMesh of one or two dimensions: those that hold shards, and their replicas."""

import json

import torch.distributed as dist
from gcompress.plugins.ddp.process_group_ranks import ProcessGroupRanks
from torch.distributed.device_mesh import DeviceMesh

from gcompress.errors import ConfigError


class MeshRanks:
    """All ranks of a mesh, able to show each other a text (`Ranks` of gcompress/exchange/engine.py).

    Args:
        mesh: of one dimension, over which the model is sharded; or of two, the outer one over replicas.
    """

    def __init__(self, mesh: DeviceMesh):
        if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
            got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
            raise ConfigError(
                f"mesh: got {got}, expected a DeviceMesh of one dimension (shards) or two (replicas, shards)"
            )
        self.numbers = mesh.mesh.flatten().tolist()  # of the ranks, in this order
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        self.shards, self.replicas = groups[-1], groups[0] if mesh.ndim == 2 else None

    def rank(self):
        return self.numbers.index(dist.get_rank())

    def world_size(self):
        return len(self.numbers)

    def gather_texts(self, text: str) -> list[str]:
        """See `Ranks`: first within the replica, then over replicas."""
        texts = ProcessGroupRanks(self.shards).gather_texts(text)
        if self.replicas is None:
            return texts
        rows = ProcessGroupRanks(self.replicas).gather_texts(json.dumps(texts))
        return [each for row in rows for each in json.loads(row)]
