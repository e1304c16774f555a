"""What an exchange must give, computed in one process from all ranks' gradients at once.

Written from the definition, with compressors alone: no exchange, feedback or engine.
"""

import zlib

import torch


class Simulation:
    """The means of successive steps and what each rank still owes.

    Args:
        plan: a gcompress Plan: who owns which piece.
        feedback: whether what is lost is remembered.
    """

    def __init__(self, plan, feedback, average=True):
        self.plan, self.feedback, self.average, self.step = plan, feedback, average, 0
        self.residuals, self.owner_residuals = {}, {}

    def means(self, gradients):
        """{name: mean} of [{name: gradient} of each rank]."""
        expected = {name: self.mean_of(name, [rank[name] for rank in gradients]) for name in gradients[0]}
        self.step += 1
        return expected

    def mean_of(self, name, gradients):
        entry = self.plan.entries[name]
        corrected = [
            gradient.detach().reshape(-1).float() + self.residuals.get((name, rank), 0.0)
            for rank, gradient in enumerate(gradients)
        ]
        if entry.exchange == "twophase":
            decoded = [
                torch.cat([self.code(entry, c[p.start : p.stop], name, rank, p.start) for p in entry.pieces])
                for rank, c in enumerate(corrected)
            ]
        else:
            seeds = [()] * len(gradients) if entry.exchange == "summed" else [(r,) for r in range(len(gradients))]
            decoded = [self.code(entry, c, name, *seed) for c, seed in zip(corrected, seeds, strict=True)]
        if self.feedback:
            for rank, (c, d) in enumerate(zip(corrected, decoded, strict=True)):
                self.residuals[name, rank] = c - d
        mean = decoded[0].clone()
        for d in decoded[1:]:
            mean += d
        if self.average:
            mean *= 1.0 / len(gradients)
        if entry.exchange == "twophase":
            mean = torch.cat([self.again(entry, name, mean[p.start : p.stop], p) for p in entry.pieces])
        return mean.view(gradients[0].shape)

    def again(self, entry, name, mean, piece):
        corrected = mean + self.owner_residuals.get((name, piece), 0.0)
        decoded = self.code(entry, corrected, name, "mean", piece.start)
        if self.feedback:
            self.owner_residuals[name, piece] = corrected - decoded
        return decoded

    def code(self, entry, values, name, *what):
        seed = zlib.crc32("/".join(map(str, (name, self.step, *what))).encode())
        return entry.compressor.decompress(*entry.compressor.compress(values, seed=seed))
