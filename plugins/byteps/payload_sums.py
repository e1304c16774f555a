"""The other way into BytePS: payloads that add up, which its servers sum as they are."""

import zlib

import byteps.torch as bps
import torch

from gcompress.errors import ConfigError
from gcompress.feedback import new_memory
from gcompress.memory import Memory
from gcompress.packing import to_type
from gcompress.policy import as_policy


class Compression:
    """For BytePS's Python interface: payloads of a `summable` compressor, summed by the servers as they are.

    Args:
        policy: what `as_policy` takes; its compressors must be summable in one sum (RandomK).

    Feedback, momentum correction and seeds are as in the other engines' summed exchange.
    """

    def __init__(self, policy):
        self.policy = as_policy(policy)
        for compressor in self.policy._compressors():
            if not compressor.summable:
                raise ConfigError(f"compression: got {compressor}, expected one whose payloads add up, such as randomk")
        if self.policy.warmup_steps:
            raise ConfigError("warmup_steps: BytePS keeps a tensor's payload at one size, expected 0")
        self._feedback, self._memories = new_memory(self.policy, at_once=False), Memory()

    def begin(self, name, absent, step):
        """Say what `compress` is given next, whether nobody computed it here, and how many steps were applied."""
        self._name, self._absent, self._step = name, absent, step

    def settle(self, names, applied):
        """The last results of these names were applied, or not."""
        for memory in (self._feedback, self._memories):
            if memory is not None:
                memory.apply(names) if applied else memory.discard(names)

    def compress(self, tensor):
        name = self._name
        compressor = self.policy.compressor_for(name, tensor.numel())
        if compressor is None:
            return tensor, None
        feedback = self._feedback if self.policy.feedback_for(compressor) and not self._absent else None
        corrected = (
            feedback.corrected(name, tensor) if feedback else to_type(tensor.detach().reshape(-1), torch.float32)
        )
        memory = dict(self._memories.get(name, {}))
        rounds = compressor.sum_rounds(
            corrected,
            shape=tensor.shape,
            seed=zlib.crc32(f"{name}/{self._step}".encode()),
            world_size=bps.size(),
            memory=memory,
        )
        payload, operation = next(rounds)
        if operation != "sum":
            raise ConfigError(f"compression: {compressor} needs the ranks' {operation}, which BytePS has not")
        return payload.contiguous(), (rounds, name, compressor, feedback, corrected, memory, tensor)

    def decompress(self, averaged, ctx):
        if ctx is None:
            return averaged
        rounds, name, compressor, feedback, corrected, memory, tensor = ctx
        try:
            rounds.send(averaged * bps.size())
        except StopIteration as end:
            total, own = end.value
        else:
            raise ConfigError(f"compression: {compressor} needs several sums, of which BytePS's interface has one")
        if feedback:
            feedback.keep(name, corrected, own, sparse=compressor.sparse)
        if bool(torch.isfinite(total).all()):
            self._memories.put(name, memory)
        return total.mul_(1.0 / bps.size()).to(tensor.dtype).view(tensor.shape)
