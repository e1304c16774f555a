"""The mean (or sum) over ranks of compressed gradients, for any engine (see schedule.py).

all-gather: every rank receives every other's payload, and decodes and adds them all.
summed: the engine's own all-reduce adds the payloads of a `summable` compressor.
"""

import zlib

import torch

from . import packing
from .compressors import Context
from .compressors.base import u32_bytes
from .errors import ConfigError, PayloadError
from .feedback import new_memory
from .policy import as_policy
from .report import Report
from .schedule import Schedule


class GradientExchange:
    """One rank's side of exchanging a model's gradients: policy, memory, report.

    Args:
        policy: what `gcompress.as_policy` takes, or None when nothing is compressed and
            the exchange only counts.
        engine: see schedule.py; may be None when policy is.
    """

    def __init__(self, policy, engine=None):
        self.policy = None if policy is None else as_policy(policy)
        self.engine = engine
        self.report = Report()
        self._feedback = new_memory(self.policy) if self.policy else None
        self._memories = {}  # what summable compressors remember, by parameter
        self._schedule = Schedule()

    def compressor_for(self, name, numel):
        """The compressor that `start` would use, or None where the engine's own all-reduce is to be used."""
        return self.policy.compressor_for(name, numel, step=self.report.steps) if self.policy else None

    def start(self, name, gradient, *, average=True):
        """Encode a gradient and start its exchange; move those under way.

        Returns a function that waits and returns the mean (or sum) over ranks of what each
        rank encoded, with the gradient's shape and type and the same bits on every rank.
        """
        compressor = self.compressor_for(name, gradient.numel())
        summed = self.policy.exchange != "allgather" and compressor.summable
        steps = (self._summed if summed else self._all_gather)(name, gradient, compressor)
        task = self._schedule.start(self.engine, name, steps)
        self._schedule.advance(self.engine)
        ctx = Context(gradient.shape, gradient.dtype)

        def finish():
            total = self._schedule.wait(self.engine, task)
            if average:
                total.mul_(1.0 / self.engine.world_size())
            return total.to(ctx.dtype).view(ctx.shape)

        return finish

    def _seed(self, *what):
        """32 bits that differ from step to step, and for what differs."""
        return zlib.crc32("/".join(map(str, (*what, self.report.steps))).encode())

    def _memory_for(self, compressor):
        return self._feedback if self.policy.feedback_for(compressor) else None

    def _all_gather(self, name, gradient, compressor):
        world_size, numel = self.engine.world_size(), gradient.numel()
        feedback = self._memory_for(compressor)
        coder = feedback.compress if feedback else _forget
        payload, _ = coder(name, gradient, compressor, seed=self._seed(name, self.engine.rank()))
        sizes = [payload.numel()] * world_size
        if not compressor.fixed_size:
            lengths = yield "allgather", u32_bytes(payload.numel(), payload.device), [4] * world_size
            sizes = packing.unpack_bits(lengths, world_size, 32).tolist()
            if max(sizes) > compressor.nbytes(numel):
                raise PayloadError(_unfit(compressor, max(sizes), numel, 1, name))
            self.report.add_all_gather(0, 4, world_size)
        self.report.add_all_gather(numel, payload.numel(), world_size)
        gathered = yield "allgather", payload, sizes
        return decode_sum(compressor, gathered, numel, world_size, name)

    def _summed(self, name, gradient, compressor):
        world_size = self.engine.world_size()
        feedback = self._memory_for(compressor)
        if feedback:
            corrected = feedback.corrected(name, gradient)
        else:
            corrected = gradient.detach().reshape(-1).to(torch.float32).contiguous()
        memory = self._memories.setdefault(name, {})
        before = dict(memory)
        rounds = compressor.sum_rounds(
            corrected, shape=gradient.shape, seed=self._seed(name), world_size=world_size, memory=memory
        )
        self.report.add_all_reduce(gradient.numel(), compressor.summed_nbytes(gradient.shape, world_size), world_size)
        result = None
        while True:
            try:
                tensor, op = rounds.send(result)
            except StopIteration as stop:
                total, own = stop.value
                break
            result = yield "allreduce", tensor, op
        if feedback:
            feedback.keep(name, corrected, own, sparse=compressor.sparse)
        if not bool(torch.isfinite(total).all()):
            self._memories[name] = before
        return total

    def advance(self):
        """Move the exchanges under way as far as they go without waiting; returns whether any moved."""
        return self._schedule.advance(self.engine)

    def end_step(self):
        """To be called once after all gradients of a step."""
        self.report.end_step()

    def state_dict(self):
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        return {
            "policy": self.policy.to_dict() if self.policy else None,
            "report": self.report.as_dict(),
            "feedback": self._feedback.state_dict() if self._feedback else {},
            "memories": {name: dict(memory) for name, memory in self._memories.items()},
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()`; ConfigError if it was another policy's."""
        policy = self.policy.to_dict() if self.policy else None
        if (as_policy(state["policy"]).to_dict() if state["policy"] else None) != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        self.report.load(state["report"])
        if self._feedback:
            self._feedback.load_state_dict(state["feedback"])
        self._memories = {name: dict(memory) for name, memory in state.get("memories", {}).items()}


def _forget(name, gradient, compressor, *, seed):
    """Like ErrorFeedback.compress, without memory."""
    return compressor.compress(gradient, seed=seed)


def decode_sum(compressor, gathered, numel, world_size, name):
    """The float32 sum, in rank order, of world_size payloads that lie one after the other."""
    if compressor.fixed_size and gathered.numel() != world_size * compressor.nbytes(numel):
        raise PayloadError(_unfit(compressor, gathered.numel(), numel, world_size, name))
    total = torch.empty(numel, dtype=torch.float32, device=gathered.device)
    start = 0
    for rank in range(world_size):
        try:
            size = compressor.payload_nbytes(gathered[start:], numel)
            compressor.decode_into(gathered[start : start + size], total, add=rank > 0)
        except PayloadError as error:
            raise PayloadError(f"gradient {name!r} from rank {rank}: {error}") from None
        start += size
    if start != gathered.numel():
        raise PayloadError(_unfit(compressor, gathered.numel(), numel, world_size, name))
    return total


def _unfit(compressor, size, numel, world_size, name):
    most = "" if compressor.fixed_size else "at most "
    return (
        f"gradient {name!r}: got {size} bytes from {world_size} ranks, expected {most}{world_size} x "
        f"{compressor.nbytes(numel)} for {numel} entries of {compressor}: do all ranks have the same model?"
    )
