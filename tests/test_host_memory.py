"""Residuals that lie on the host while gradients are on a GPU, by an emulated one."""

import math

import pytest
import torch

from gcompress import as_policy
from gcompress.feedback import new_memory
from tests.nested import same
from tests.test_memory import SHAPES, gradients
from tests.test_residual_types import with_type


class DelayedCopies:
    """Copies to and from a device that is none: they are made when somebody waits, and what came too early is NaN."""

    def __init__(self):
        self.host, self.under_way, self.ahead = [], [], 0

    def is_here(self, tensor):
        return any(tensor is each for each in self.host)

    def room(self, like):
        self.host.append(torch.empty(like.shape))
        return self.host[-1]

    def begin(self, host, like):
        copy = torch.full_like(host, math.nan)
        self.under_way.append((copy, host))
        self.ahead += 1
        return copy

    def come(self, tensor):
        while any(target is tensor for target, _ in self.under_way):  # in their order, as on a stream
            target, source = self.under_way.pop(0)
            target.copy_(source)

    def leave(self, tensor, host):
        host.fill_(math.nan)
        self.under_way.append((host, tensor))

    def wait(self):
        while self.under_way:
            target, source = self.under_way.pop(0)
            target.copy_(source)


@pytest.mark.parametrize("policy", ["topk:sparsity=0.9", "topk:sparsity=0.9; momentum=0.9", "eden:bits=1"])
def test_host_memory_is_float32_whatever_is_under_way(policy):
    """By a device that is emulated: what a stream does later than it was told."""
    chosen = with_type(policy, "cpu")
    expected, memory, copies = new_memory(as_policy(policy), False), new_memory(chosen, False), DelayedCopies()
    for each in memory.memories.values():
        each._copies = copies
    for step in range(8):
        for name, gradient in gradients(step, 0).items():
            if step == 3 and name == "c":
                gradient[3] = math.inf
            one, other = (each.compress(name, gradient, chosen.compressor, seed=step)[0] for each in (expected, memory))
            assert torch.equal(one, other), (step, name)
        if step == 6:  # to what is on its way
            for each in (expected, memory):
                each.add("c", torch.ones(21000))
        for each in (expected, memory):
            each.discard() if step in (2, 5) else each.apply()
        if step == 4:
            assert same(expected.state_dict(), memory.state_dict())
        if step == 5:
            memory.add("a", torch.ones(1200)), expected.add("a", torch.ones(1200))
            for each in (expected, memory):
                each.apply()
    assert copies.ahead and same(expected.state_dict(), memory.state_dict())
    assert len(copies.host) <= 3 * len(SHAPES) * len(memory.kinds)  # they are used again
