"""What an exchange must give, computed in one process from all ranks' gradients at once.

Written from the definition, with compressors and each rank's memory: no exchange, no engine.
"""

import zlib

import torch

from gcompress.feedback import new_memory


class Simulation:
    """The means of successive steps.

    Args:
        plan: a gcompress Plan: who owns which piece.
        average: whether the ranks' mean or their sum is wanted.
    """

    def __init__(self, plan, average=True):
        self.plan, self.policy, self.average, self.step = plan, plan.policy, average, 0
        self.memories = [new_memory(plan.policy) for _ in range(plan.world_size)]
        self.residuals = {}  # (name, piece): its owner's residual

    def means(self, gradients):
        """{name: mean} of [{name: gradient} of each rank]."""
        expected = {name: self.mean_of(name, [rank[name] for rank in gradients]) for name in gradients[0]}
        self.end_step()
        return expected

    def end_step(self):
        self.step += 1

    def mean_of(self, name, gradients):
        entry = self.plan.entries[name]
        compressor = self.policy.compressor_for(name, entry.numel, step=self.step)
        remembers = self.policy.feedback_for(compressor)
        mean = torch.zeros(entry.numel)
        for rank, gradient in enumerate(gradients):
            values = self.memories[rank].corrected(name, gradient) if remembers else gradient.reshape(-1).float()
            if entry.exchange == "twophase":
                parts = [
                    self.code(compressor, values[p.start : p.stop].view(entry.shape_of(p)), name, rank, p.start)
                    for p in entry.pieces
                ]
                decoded = torch.cat([part.view(-1) for part in parts])
            else:
                seed = () if entry.exchange == "summed" else (rank,)
                decoded = self.code(compressor, values.view(gradient.shape), name, *seed).view(-1)
            if remembers:
                self.memories[rank].keep(name, values, decoded, sparse=compressor.sparse)
            mean = decoded.clone() if rank == 0 else mean + decoded
        mean *= self.factor(len(gradients))
        if entry.exchange == "twophase":
            parts = [self.again(compressor, remembers, name, mean[p.start : p.stop], p, entry) for p in entry.pieces]
            mean = torch.cat([part.view(-1) for part in parts])
        return mean.view(gradients[0].shape)

    def factor(self, ranks):
        """What makes the result of the sum over ranks."""
        return 1.0 / ranks if self.average else 1.0

    def again(self, compressor, remembers, name, mean, piece, entry):
        corrected = (mean + self.residuals.get((name, piece), 0.0)).view(entry.shape_of(piece))
        decoded = self.code(compressor, corrected, name, "mean", piece.start)
        if remembers:
            self.residuals[name, piece] = (corrected - decoded).view(-1)
        return decoded

    def place(self, name):
        """What else enters the seeds of a parameter."""
        return ()

    def code(self, compressor, values, name, *what):
        seed = zlib.crc32("/".join(map(str, (name, self.step, *what, *self.place(name)))).encode())
        return compressor.decompress(*compressor.compress(values, seed=seed))


class NodeSimulation:
    """The means of successive steps of an exchange by nodes.

    Args:
        plan: a gcompress NodePlan.
        average: see `Simulation`.
    """

    def __init__(self, plan, average=True):
        self.plan, self.local_size = plan, plan.topology.local_size
        self.of_local = [OfPeers(peers, average, self.local_size) for peers in plan.of_local]

    def means(self, gradients):
        """{name: mean} of [{name: gradient} of each rank]."""
        return {name: self.mean_of(name, [rank[name] for rank in gradients]) for name in gradients[0]}

    def mean_of(self, name, gradients):
        flat, size = [gradient.reshape(-1).float() for gradient in gradients], self.local_size
        nodes = [sum(flat[first + 1 : first + size], flat[first]) * (1.0 / size) for first in range(0, len(flat), size)]
        mean = torch.full_like(flat[0], float("nan"))
        for piece in self.plan.entries[name].pieces:
            peers = self.of_local[piece.owner]
            shape = peers.plan.entries[name].shape
            part = peers.mean_of(name, [node[piece.start : piece.stop].view(shape) for node in nodes])
            mean[piece.start : piece.stop] = part.reshape(-1)
        return mean.view(gradients[0].shape)

    def end_step(self):
        for peers in self.of_local:
            peers.step += 1


class OfPeers(Simulation):
    """The means of one local rank's shares."""

    def __init__(self, plan, average, local_size):
        super().__init__(plan, average)
        self.local_size = local_size

    def factor(self, ranks):
        return 1.0 / ranks if self.average else float(self.local_size)

    def place(self, name):
        return (f"from {self.plan.offsets[name]}",)
