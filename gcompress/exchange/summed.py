"""Gradients whose payloads the engine itself adds up (a `summable` compressor): one rank's side of it."""

from collections.abc import Callable, Generator

import torch

from ..compressors import Compressor
from ..feedback import ErrorFeedback, NoFeedback
from ..memory import Memory


def sum_over_ranks(
    name: str,
    gradient: torch.Tensor,
    compressor: Compressor,
    feedback: ErrorFeedback | None,
    memories: Memory,
    *,
    seed: int,
    world_size: int,
    compared: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> Generator[tuple, torch.Tensor, torch.Tensor]:
    """Yield each sum that is to be formed as ("allreduce", tensor, op), and be sent its result.

    Args:
        name: the parameter's.
        gradient: of any shape.
        feedback: keeps what the payloads lose of it; None: nothing does.
        memories: what the compressor learns from step to step, a dict by parameter.
        seed: the same on all ranks.
        compared: is given what was encoded and what this rank contributed, 1-D float32, to look at.

    Returns:
        The ranks' sum of what each encoded, 1-D float32.
    """
    corrected = (feedback or NoFeedback).corrected(name, gradient)
    memory = dict(memories.get(name, {}))
    rounds = compressor.sum_rounds(corrected, shape=gradient.shape, seed=seed, world_size=world_size, memory=memory)
    try:
        tensor, op = next(rounds)
        while True:
            tensor, op = rounds.send((yield "allreduce", tensor, op))
    except StopIteration as stop:
        total, own = stop.value
    if compared:
        compared(corrected, own)
    if feedback:
        feedback.keep(name, corrected, own, sparse=compressor.sparse)
    # What is learned from gradients waits where no rank had one.
    if memory and bool(torch.isfinite(total).all()) and bool(total.any()):
        memories.put(name, memory)
    return total


def summed_together(steps: dict[str, Generator]) -> Generator[tuple, torch.Tensor, dict]:
    """Run what `sum_over_ranks` made for several gradients, by one sum for all that want the like at a time.

    Args:
        steps: {name: of one compressor's gradients}, in the same order on all ranks.

    Returns:
        {name: the ranks' sum}.
    """
    wanted: dict[str, tuple] = {}  # {name: ("allreduce", tensor, op)}
    totals: dict[str, torch.Tensor] = {}

    def go_on(name, summed):
        try:
            wanted[name] = steps[name].send(summed)
        except StopIteration as stop:
            totals[name] = stop.value

    for name in steps:
        go_on(name, None)
    while wanted:
        _, first, op = next(iter(wanted.values()))
        like = [name for name, (_, tensor, other) in wanted.items() if (tensor.dtype, other) == (first.dtype, op)]
        tensors = [wanted.pop(name)[1] for name in like]
        whole = tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
        summed = yield "allreduce", whole, op
        parts = summed.reshape(-1).split([tensor.numel() for tensor in tensors])
        for name, tensor, part in zip(like, tensors, parts, strict=True):
            go_on(name, part.view(tensor.shape))
    return totals
