"""Error feedback: what a compressor dropped is added to the next gradient.

Memory of Seide et al. (2014) and Stich et al. (arXiv 1809.07599), analysed by Karimireddy
et al. (arXiv 1901.09847): with p = gradient + residual, send C(p) and keep p - D(C(p)).
With it every contraction, however biased, converges at the rate of SGD.

A very sparse compressor sends an entry once in hundreds of steps. It also needs what Deep Gradient
Compression has (Lin et al., arXiv 1712.01887): momentum correction, momentum factor masking and
clipping (`MomentumCorrection`), and a warm-up (`eased`).

Between outer steps (gcompress/outer/) a residual is H steps old, or older. There it decays, as in
SparseLoCo (Sarfi et al., arXiv 2508.15706): `ErrorFeedback(decay=0.95)`. `EstimateFeedback` is another
kind of memory, that of EF21 (Richtárik et al., arXiv 2106.05203).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import backends
from .compressors import Compressor, Context
from .errors import ConfigError
from .memory import Scratch, check_same
from .packing import to_type
from .residual_types import PackedMemory, made_memory

WARM_UP_STAGES = 4


class Slice(NamedTuple):
    """Some entries of a gradient, which are encoded together."""

    start: int  # of the flat gradient
    stop: int
    shape: torch.Size
    seed: int  # see `Compressor.compress`

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The part of a 1-D tensor, in its shape."""
        return flat[self.start : self.stop].view(self.shape)


class Lost(NamedTuple):
    """What payloads lose of a gradient."""

    residual: torch.Tensor
    poisoned: torch.Tensor  # of one entry, not 0 if an entry of the residual is not finite
    restored: bool  # whether the residual is the old one then (minus zeros if there was none): nobody waited for a GPU


def whole(gradient: torch.Tensor, seed: int) -> Slice:
    """All of a gradient."""
    return Slice(0, gradient.numel(), gradient.shape, seed)


def flat_values(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's entries as contiguous 1-D float32; not a copy where they are that already."""
    if gradient.dtype == torch.float32 and gradient.is_contiguous():  # with few calls, since most tensors are small
        if gradient.requires_grad:
            gradient = gradient.detach()
        return gradient if gradient.dim() == 1 else gradient.view(-1)
    return to_type(gradient.detach().reshape(-1), torch.float32).contiguous()


class ErrorFeedback:
    """One rank's residuals, a 1-D tensor per parameter name.

    A gradient with a non-finite entry is sent as it is, added to the residual, so that
    every rank sees a non-finite result; the residual stays what it was before that step.

    Args:
        at_once: whether a residual changes as soon as it is kept. Otherwise it is proposed, until
            `apply` or `discard` (see gcompress/memory.py).
        decay: what is left of a residual when the next gradient comes, 0 < decay <= 1. The residual is kept as
            it will be added: multiplied by `decay`.
        residual: how all that is remembered is kept between steps, see residual_types.py.
    """

    kinds: tuple[str, ...] = ("residual",)  # of tensors that it remembers for a parameter
    together: bool = True  # whether `opened` and `closed` are all that an encoder needs

    def __init__(self, at_once=True, decay=1.0, residual="float32"):
        unpacked = Scratch()
        self.memories = {kind: made_memory(residual, at_once, unpacked) for kind in self.kinds}
        self.decay = decay
        self._residuals, self._scratch = self.memories["residual"], Scratch()
        self.together = self.together and self._residuals.in_place

    def of_rank(self, rank: object) -> None:
        """Say whose memory this is: memories that round at random do so by different numbers."""
        for memory in self.memories.values():
            memory.salt = rank

    def compress(
        self, name: str, gradient: torch.Tensor, compressor: Compressor, *, seed: int = 0
    ) -> tuple[torch.Tensor, Context]:
        """Encode gradient plus the residual of `name`, and remember what was lost.

        Args:
            name: the parameter's name, the same every step.
            gradient: tensor as for `Compressor.compress`, of one shape every step.
            compressor: any Compressor; it may change between steps.
            seed: see `Compressor.compress`.

        Returns:
            (payload, ctx) as `Compressor.compress` does.
        """
        (payload,) = self.compress_parts(name, gradient, compressor, [whole(gradient, seed)])
        return payload, Context(gradient.shape, gradient.dtype)

    def compress_parts(
        self, name: str, gradient: torch.Tensor, compressor: Compressor, parts: list[Slice]
    ) -> list[torch.Tensor]:
        """Encode a gradient plus the residual of `name` part by part, and remember what all parts lost.

        Args:
            parts: in order; together they are the gradient.

        Returns the parts' payloads.
        """
        values = self._input(name, flat_values(gradient))
        residual, fresh = self.opened(name, values)
        payloads, lost = _compress_keeping(compressor, values, residual, fresh, parts, self._scratch)
        self._keep(name, lost, lambda: _decoded(compressor, payloads, parts, self._scratch), compressor.sparse)
        return payloads

    def opened(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(The residual to add to values, 1-D float32, or None; where the new one is to be written) until `closed`."""
        return self._residuals.opened(name, values)

    @property
    def packed(self) -> PackedMemory | None:
        """The residuals where an encoder, and packing before and after it, are all that is needed."""
        plain = type(self) is ErrorFeedback and self.decay == 1.0
        return self._residuals if plain and isinstance(self._residuals, PackedMemory) else None

    def closed(self, name: str, fresh: torch.Tensor, poisoned: bool) -> None:
        """Propose what was written as the residual, unless it is not finite."""
        if poisoned:
            self._residuals.give_back(name, fresh)
            return
        self._residuals.put(name, fresh if self.decay == 1.0 else fresh.mul_(self.decay))

    def corrected(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient plus the residual of `name`: a 1-D float32 tensor for `keep`."""
        values = self._input(name, flat_values(gradient))
        residual, fresh = self._residuals.get(name), self._residuals.spare(name, values)
        if residual is None:
            return fresh.copy_(values)
        check_same(name, residual.numel(), values)
        return torch.add(values, residual.to(values.device), out=fresh)

    def preview(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """What `corrected` would return now, in a new tensor; nothing changes."""
        values = self._preview_input(name, flat_values(gradient))
        residual = self._residuals.get(name)
        if residual is None:
            return values.clone()
        check_same(name, residual.numel(), values)
        return values + residual.to(values.device)

    def _preview_input(self, name, values):
        """What `_input` would return now; nothing changes."""
        return values

    def _input(self, name, values):
        """What is added to the residual for a gradient of these 1-D float32 values."""
        return values

    def keep(self, name: str, corrected: torch.Tensor, sent: torch.Tensor, *, sparse: bool = False) -> None:
        """Store corrected - sent as the residual; if it is not finite, the old one stays.

        corrected: what `corrected` returned; changed in place. sparse: whether zeros of `sent` mean entries that were
        not sent.
        """
        corrected.sub_(sent)
        poisoned = _not_finite(corrected)
        if corrected.is_cuda:  # which is not asked, since the answer would have to be waited for
            residual = self._residuals.get(name)
            before = torch.full_like(corrected, -0.0) if residual is None else residual.to(corrected.device)
            torch.where(poisoned, before, corrected, out=corrected)
        self._keep(name, Lost(corrected, poisoned, corrected.is_cuda), lambda: sent, sparse)

    def _keep(self, name, lost, sent, sparse):
        """Propose what was lost as the residual.

        Args:
            lost: a Lost, in a tensor of `Memory.spare`.
            sent: a function that returns what was sent, 1-D float32.
            sparse: see `keep`.
        """
        if not lost.restored:
            self.closed(name, lost.residual, bool(lost.poisoned))
            return
        if self.decay != 1.0:  # an old residual, which has decayed before, must not do so again
            lost.residual.mul_(torch.where(lost.poisoned.bool(), 1.0, self.decay))
        self._residuals.put(name, lost.residual, lost.poisoned)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add what was not delivered after all (1-D float32) to the residual that was kept last."""
        self._residuals.add(name, values if self.decay == 1.0 else values * self.decay)

    def residual(self, name: str) -> torch.Tensor | None:
        """The residual of `name` (1-D float32, valid until the next step), or None before its first one."""
        return self._residuals.value(name)

    def apply(self, names: Iterable[str] | None = None) -> None:
        """The step was applied: what was proposed for these names (default: all) is the memory."""
        for memory in self.memories.values():
            memory.apply(names)

    def discard(self, names: Iterable[str] | None = None) -> None:
        """The step was not applied: the memory of these names (default: all) is what it was before."""
        for memory in self.memories.values():
            memory.discard(names)

    def carry_on(self, name: str) -> None:
        """The next gradient of `name` contains the last result: go on from what is proposed."""
        for memory in self.memories.values():
            memory.carry_on(name)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {name: 1-D float32 tensor}} of all that is remembered; not copies where it is kept so."""
        return {kind: memory.values() for kind, memory in self.memories.items()}

    def copies(self) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {name: tensor}} of all that is remembered, as it is kept, copied: later steps write to the tensors."""
        return {kind: memory.saved() for kind, memory in self.memories.items()}

    def load_tensors(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Replace all memory by these tensors, as `checked` returns them, which must be nobody else's."""
        for kind, memory in self.memories.items():
            memory.load(tensors[kind])

    def vectors_of(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {name: 1-D float32 tensor}} of what `checked` returned."""
        return {kind: memory.vectors_of(tensors[kind]) for kind, memory in self.memories.items()}

    def load_vectors(self, vectors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Replace all memory by these 1-D float32 tensors, which must be nobody else's."""
        for kind, memory in self.memories.items():
            memory.load_vectors(vectors[kind])

    def checked(self, state: dict, sizes: dict[str, int] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of the tensors of a `state_dict()`, as `load_tensors` takes them; ConfigError if it is none.

        sizes: see `checked_copies`.
        """
        if len(self.kinds) == 1:
            return {"residual": self._residuals.checked("residual", state, sizes)}
        if not isinstance(state, dict) or set(state) != set(self.kinds):
            got = ", ".join(map(repr, state)) if isinstance(state, dict) else type(state).__name__
            raise ConfigError(f"feedback: got {got}, expected {' and '.join(self.kinds)}")
        return {kind: memory.checked(kind, state[kind], sizes) for kind, memory in self.memories.items()}

    def state_dict(self) -> dict:
        """{name: residual as it is kept}, or {kind: {name: tensor}} where several `kinds` are remembered.

        Copies; they are this rank's own and must not be broadcast.
        """
        return self.copies()["residual"] if len(self.kinds) == 1 else self.copies()

    def load_state_dict(self, state: dict) -> None:
        """Replace all residuals by copies of those of `state_dict()`; ConfigError, and no change, if it is none."""
        self.load_tensors(self.checked(state))


class NoFeedback:
    """What ErrorFeedback does, without memory."""

    @staticmethod
    def compress(
        name: str, gradient: torch.Tensor, compressor: Compressor, *, seed: int = 0
    ) -> tuple[torch.Tensor, Context]:
        """(payload, ctx) of the gradient alone."""
        return compressor.compress(gradient, seed=seed)

    @staticmethod
    def compress_parts(
        name: str, gradient: torch.Tensor, compressor: Compressor, parts: list[Slice]
    ) -> list[torch.Tensor]:
        """The payloads of the gradient's parts alone."""
        values = flat_values(gradient)
        return [compressor.compress(part.of(values), seed=part.seed)[0] for part in parts]

    @staticmethod
    def corrected(name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient, 1-D float32, contiguous; not a copy where it is that already."""
        return flat_values(gradient)

    preview = corrected


class MomentumCorrection(ErrorFeedback):
    """Error feedback of a velocity instead of the gradient: the momentum of SGD, taken before compression.

    With a residual, plain momentum acts on what arrives late and all at once. So every rank
    keeps u = momentum u + gradient per parameter, adds u to the residual and sends of that; an
    entry that was sent by a sparse compressor starts again from u = 0 (momentum factor masking).
    The optimizer's own momentum must then be 0: see `gcompress.parameter_groups`.

    Args:
        momentum: factor of the velocity, 0 <= momentum < 1.
        clip: the L2 norm to which this rank's gradient of one parameter is scaled down before
            it is added, or None. Of a limit for the mean over N ranks each takes 1 / sqrt(N).
        at_once, decay, residual: see `ErrorFeedback`.
    """

    kinds = ("residual", "velocity")
    together = False  # the velocity follows what was sent

    def __init__(self, momentum=0.9, clip=None, at_once=True, decay=1.0, residual="float32"):
        super().__init__(at_once, decay, residual)
        self.momentum, self.clip = momentum, clip
        self._velocities = self.memories["velocity"]
        self._moving = {}  # velocities of gradients that were not kept yet

    def _input(self, name, values):
        """The velocity."""
        before, velocity = self._velocity_before(name, values), self._velocities.spare(name, values)
        self._moving[name] = self._moved(values, before, velocity)
        return velocity

    def _preview_input(self, name, values):
        return self._moved(values, self._velocity_before(name, values), torch.empty_like(values))

    def _moved(self, values, before, velocity):
        """Write the velocity after `before` (or None) for a gradient of these values, and return it."""
        velocity.copy_(values)
        if self.clip is not None:
            norm = torch.linalg.vector_norm(values).double()
            velocity.mul_(torch.where((self.clip < norm) & norm.isfinite(), self.clip / norm, 1.0).float())
        return velocity if before is None else velocity.add_(before, alpha=self.momentum)

    def _velocity_before(self, name, values):
        before = self._velocities.get(name)
        return before.to(values.device) if before is not None and before.numel() == values.numel() else None

    def _keep(self, name, lost, sent, sparse):
        super()._keep(name, lost, sent, sparse)
        velocity = self._moving.pop(name)
        if not lost.restored and bool(lost.poisoned):
            self._velocities.give_back(name, velocity)
            return
        if sparse:
            velocity.masked_fill_(sent() != 0, 0.0)
        if lost.restored:
            before = self._velocity_before(name, velocity)
            before = torch.zeros_like(velocity) if before is None else before
            torch.where(lost.poisoned.bool(), before, velocity, out=velocity)
        self._velocities.put(name, velocity, lost.poisoned if lost.restored else None)

    def velocity(self, name: str) -> torch.Tensor | None:
        """The velocity of `name` (1-D float32, valid until the next step), or None before its first one."""
        return self._velocities.value(name)


class EstimateFeedback(ErrorFeedback):
    """The memory of EF21: every rank sends how its gradient differs from the estimate that all know of it.

    With the estimate h of a rank's gradient g, send C(g - h) and add what that decodes to, to h. All ranks
    add the mean over ranks of it to what was delivered before; so what is delivered is the mean of the estimates.
    Nothing waits to be sent: a gradient that shrinks is followed at once, where a residual would bring the old one
    late. The compressor must be a contraction. A rank without a gradient sends nothing new, so that its estimate counts
    on; where no rank has one, the last mean is delivered again.

    The residual is -h here, so that a gradient plus the residual is what a payload is made of.
    """

    kinds = ("residual", "delivered")
    together = False  # the estimate moves by what was sent

    def __init__(self, at_once=True, residual="float32"):
        super().__init__(at_once, residual=residual)
        self._delivered = self.memories["delivered"]

    def _keep(self, name, lost, sent, sparse):
        before, fresh = self._residuals.get(name), lost.residual
        if not lost.restored and bool(lost.poisoned):
            self._residuals.give_back(name, fresh)
            return
        before = torch.zeros_like(fresh) if before is None else before.to(fresh.device)
        torch.sub(before, sent(), out=fresh)
        if lost.restored:
            torch.where(lost.poisoned.bool(), before, fresh, out=fresh)
        self._residuals.put(name, fresh)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Nothing: what a gradient's type could not hold of what was delivered is still in memory."""

    def deliver(self, name: str, mean: torch.Tensor) -> None:
        """Make of the ranks' mean (or sum) of what was sent, 1-D float32, that of their estimates, in place."""
        before = self._delivered.get(name)
        before = torch.zeros_like(mean) if before is None else before.to(mean.device)
        fresh = self._delivered.spare(name, mean)
        self._delivered.put(name, torch.where(_not_finite(mean.add_(before)), before, mean, out=fresh))


def _compress_keeping(compressor, values, residual, fresh, parts, scratch):
    """Encode values + residual by parts, and write what the payloads lose of it to `fresh`.

    Args:
        values: contiguous 1-D float32.
        residual: like values, or None.
        fresh: like values.
        scratch: a Scratch.

    Returns (payloads, Lost).
    """
    kernels = backends.kernels(values, compressor) if values.numel() else None
    on_device = kernels is not None and kernels.on_device
    names = compressor.device_kernels if on_device and compressor.device_kernels else compressor.kernels
    flag = torch.zeros(1, dtype=torch.int32, device=values.device)
    before, after, payloads = 0 if residual is None else residual.data_ptr(), fresh.data_ptr(), []
    if kernels is not None and kernels.keeps_residual_with(names):
        for part in parts:
            offset = 4 * part.start
            remembering = kernels.remembering(before and before + offset, after + offset, flag.data_ptr())
            source = part.of(values) if compressor.uses_shape else values[part.start : part.stop]
            payloads.append(compressor.encode_with(remembering, source, part.seed))
    else:
        torch.add(values, residual, out=fresh) if residual is not None else fresh.copy_(values)
        payloads = [compressor.compress(part.of(fresh), seed=part.seed)[0] for part in parts]
        sent = _decoded(compressor, payloads, parts, scratch)
        if not on_device:
            return payloads, Lost(fresh.sub_(sent), _not_finite(fresh), False)
        remembering = kernels.remembering(before, after, flag.data_ptr())
        remembering.keep_residual(values.data_ptr(), values.numel(), sent.data_ptr())
    if on_device:
        kernels.feedback_restore(before, values.numel(), flag.data_ptr(), after)
    return payloads, Lost(fresh, flag, on_device)


def _decoded(compressor, payloads, parts, scratch):
    """What the payloads of all parts decode to, 1-D float32, in a Scratch."""
    decoded = scratch.floats(parts[-1].stop, payloads[0].device)
    for payload, part in zip(payloads, parts, strict=True):
        compressor.decode_into(payload, decoded[part.start : part.stop])
    return decoded


def _not_finite(values):
    """A tensor without dimensions: whether an entry is not finite."""
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    return torch.logical_not(low.isfinite() & high.isfinite())


def new_memory(policy, at_once=True):
    """The empty memory that a Policy asks for, or None; at_once: see `ErrorFeedback`."""
    if not policy.uses_feedback:
        return None
    if policy.error_feedback == "ef21":
        return EstimateFeedback(at_once, policy.residual)
    if policy.momentum or policy.clip:
        return MomentumCorrection(policy.momentum, policy.clip, at_once, policy.decay, policy.residual)
    return ErrorFeedback(at_once, policy.decay, policy.residual)


def second_memory(policy, at_once=False):
    """The empty memory of who encodes the ranks' mean again: the owner of a piece, or a server."""
    return ErrorFeedback(at_once, policy.decay, policy.residual) if policy else ErrorFeedback(at_once)


def eased(compressor: Compressor, step: int, warmup_steps: int) -> Compressor:
    """The compressor to use in one step of a warm-up.

    In four equal stages the fraction kept falls from d^(1/5) to d^(4/5), where d is that of
    `compressor` (for sparsity .999: .75, .937, .984, .996), in it and in its parts.

    Args:
        compressor: what is used from step `warmup_steps` on.
        step: 0 is the first.
        warmup_steps: length of the warm-up.

    >>> from gcompress import TopK
    >>> [round(eased(TopK(sparsity=0.999), step, 4).sparsity, 3) for step in range(5)]
    [0.749, 0.937, 0.984, 0.996, 0.999]
    """
    if step >= warmup_steps:
        return compressor
    changes = {part: eased(getattr(compressor, part), step, warmup_steps) for part in compressor.parts}
    if hasattr(compressor, "sparsity"):
        stage = WARM_UP_STAGES * step // warmup_steps
        changes["sparsity"] = 1 - (1 - compressor.sparsity) ** ((stage + 1) / (WARM_UP_STAGES + 1))
    return dataclasses.replace(compressor, **changes)
