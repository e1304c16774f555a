"""The mean (or sum) over ranks of compressed gradients, for any engine.

An engine brings two things: `allgather(name, payload)`, which starts a named all-gather of
equal-sized uint8 tensors and returns a function that waits for the ranks' payloads in rank
order, one after the other, in one tensor; and the ranks' number and this rank's own.
"""

import zlib

import torch

from .errors import ConfigError, PayloadError
from .feedback import ErrorFeedback
from .policy import as_policy
from .report import Report


class GradientExchange:
    """One rank's side of exchanging a model's gradients: policy, memory, report.

    Args:
        policy: what `gcompress.as_policy` takes, or None when nothing is compressed and
            the exchange only counts.
        engine: see the module; may be None when policy is.
    """

    def __init__(self, policy, engine=None):
        self.policy = None if policy is None else as_policy(policy)
        self.engine = engine
        self.report = Report()
        self._feedback = ErrorFeedback() if self.policy and self.policy.uses_feedback else None

    def compressor_for(self, name, numel):
        """The compressor that `start` would use, or None where the engine's own all-reduce is to be used."""
        return self.policy.compressor_for(name, numel) if self.policy else None

    def start(self, name, gradient, *, average=True):
        """Encode a gradient and start its all-gather.

        Returns a function that waits and returns the mean (or sum) over ranks of what each
        rank encoded, with the gradient's shape and type: added in float32 in rank order, so
        it has the same bits on every rank.
        """
        compressor = self.compressor_for(name, gradient.numel())
        world_size = self.engine.world_size()
        seed = zlib.crc32(f"{name}/{self.report.steps}/{self.engine.rank()}".encode())
        if self._feedback:
            payload, ctx = self._feedback.compress(name, gradient, compressor, seed=seed)
        else:
            payload, ctx = compressor.compress(gradient, seed=seed)
        self.report.add_all_gather(gradient.numel(), payload.numel(), world_size)
        wait = self.engine.allgather(name, payload)

        def finish():
            total = decode_sum(compressor, wait(), ctx.shape.numel(), world_size, name)
            if average:
                total.mul_(1.0 / world_size)
            return total.to(ctx.dtype).view(ctx.shape)

        return finish

    def end_step(self):
        """To be called once after all gradients of a step."""
        self.report.end_step()

    def state_dict(self):
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        return {
            "policy": self.policy.to_dict() if self.policy else None,
            "report": self.report.as_dict(),
            "feedback": self._feedback.state_dict() if self._feedback else {},
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()`; ConfigError if it was another policy's."""
        policy = self.policy.to_dict() if self.policy else None
        if state["policy"] != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        self.report.load(state["report"])
        if self._feedback:
            self._feedback.load_state_dict(state["feedback"])


def decode_sum(compressor, gathered, numel, world_size, name):
    """The float32 sum, in rank order, of world_size equal-sized payloads that lie one after the other."""
    size = compressor.nbytes(numel)
    if gathered.numel() != world_size * size:
        raise PayloadError(
            f"gradient {name!r}: got {gathered.numel()} bytes from {world_size} ranks, expected {world_size} x {size} "
            f"for {numel} entries of {compressor}: do all ranks have the same model?"
        )
    total = torch.empty(numel, dtype=torch.float32, device=gathered.device)
    for rank in range(world_size):
        try:
            compressor.decode_into(gathered[rank * size : (rank + 1) * size], total, add=rank > 0)
        except PayloadError as error:
            raise PayloadError(f"gradient {name!r} from rank {rank}: {error}") from None
    return total
