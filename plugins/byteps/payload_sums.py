"""The other way into BytePS: payloads that add up, which its servers sum as they are."""

import zlib

import byteps.torch as bps

from gcompress.errors import ConfigError
from gcompress.exchange.summed import sum_over_ranks
from gcompress.feedback import EstimateFeedback, new_memory
from gcompress.memory import Memory
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

    def begin(self, name: str, absent: bool, step: int) -> None:
        """Say what `compress` is given next, whether nobody computed it here, and how many steps were applied."""
        self._name, self._absent, self._step = name, absent, step
        if self._feedback:
            self._feedback.of_rank(bps.rank())

    def settle(self, names: set[str], applied: bool) -> None:
        """The last results of these names were applied, or not."""
        for memory in (self._feedback, self._memories):
            if memory is not None:
                memory.apply(names) if applied else memory.discard(names)

    def compress(self, tensor):
        name = self._name
        compressor = self.policy.compressor_for(name, tensor.numel())
        if compressor is None:
            return tensor, None
        rounds = sum_over_ranks(
            name,
            tensor,
            compressor,
            self._feedback if self.policy.feedback_for(compressor) and not self._absent else None,
            self._memories,
            seed=zlib.crc32(f"{name}/{self._step}".encode()),
            world_size=bps.size(),
        )
        _, payload, op = next(rounds)
        if op != "sum":
            raise ConfigError(f"compression: {compressor} needs the ranks' {op}, which BytePS has not")
        return payload.contiguous(), (rounds, compressor, tensor, name)

    def decompress(self, averaged, ctx):
        if ctx is None:
            return averaged
        rounds, compressor, tensor, name = ctx
        try:
            rounds.send(averaged * bps.size())
        except StopIteration as end:
            mean = end.value.mul_(1.0 / bps.size())
            if isinstance(self._feedback, EstimateFeedback) and self.policy.feedback_for(compressor):
                self._feedback.deliver(name, mean)
            return mean.to(tensor.dtype).view(tensor.shape)
        raise ConfigError(f"compression: {compressor} needs several sums, of which BytePS's interface has one")
