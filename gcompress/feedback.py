"""Error feedback: what a compressor dropped is added to the next gradient.

Memory of Seide et al. (2014) and Stich et al. (arXiv 1809.07599), analysed by Karimireddy
et al. (arXiv 1901.09847): with p = gradient + residual, send C(p) and keep p - D(C(p)).
With it every contraction, however biased, converges at the rate of SGD.

Very sparse compressors send an entry once in hundreds of steps; what they need besides is
that of Deep Gradient Compression (Lin et al., arXiv 1712.01887): momentum correction, momentum
factor masking and clipping (`MomentumCorrection`), and a warm-up (`eased`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from . import backends
from .compressors import Compressor, Context
from .errors import ConfigError
from .memory import Memory, checked_copies
from .packing import to_type

WARM_UP_STAGES = 4


class ErrorFeedback:
    """One rank's residuals, a 1-D float32 tensor per parameter name.

    A gradient with a non-finite entry is sent as it is, added to the residual, so that
    every rank sees a non-finite result; the residual stays what it was before that step.

    Args:
        at_once: whether a residual changes as soon as it is kept. Otherwise it is proposed, until
            `apply` or `discard` (see gcompress/memory.py).
    """

    kinds: tuple[str, ...] = ("residual",)  # of tensors that it remembers for a parameter
    fuses = True  # whether an encoder may keep the residual, as the kernels of the GPU do

    def __init__(self, at_once=True):
        self.memories = {kind: Memory(at_once) for kind in self.kinds}
        self._residuals = self.memories["residual"]

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
        if self.fuses:
            residual = self._residual_for(name, gradient)
            kernels = backends.kernels(gradient, compressor)
            if kernels is not None and kernels.on_device and gradient.numel() > 0:
                payload, residual = _compress_on_device(kernels, compressor, gradient, residual, seed)
                self._residuals.put(name, residual)
                return payload, Context(gradient.shape, gradient.dtype)
        corrected = self.corrected(name, gradient)
        payload, _ = compressor.compress(corrected.view(gradient.shape), seed=seed)
        decoded = torch.empty_like(corrected)
        compressor.decode_into(payload, decoded)
        self.keep(name, corrected, decoded, sparse=compressor.sparse)
        return payload, Context(gradient.shape, gradient.dtype)

    def corrected(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient plus the residual of `name`: a new 1-D float32 tensor."""
        values = to_type(gradient.detach().reshape(-1), torch.float32)
        residual = self._residual_for(name, gradient)
        return values.clone() if residual is None else values + residual

    def _residual_for(self, name, gradient):
        residual = self._residuals.get(name)
        if residual is not None and residual.numel() != gradient.numel():
            raise ConfigError(
                f"gradient {name!r}: got {gradient.numel()} entries, expected {residual.numel()} as before"
            )
        return residual if residual is None else residual.to(gradient.device)  # one that was loaded may lie elsewhere

    def keep(self, name: str, corrected: torch.Tensor, sent: torch.Tensor, *, sparse: bool = False) -> bool:
        """Store corrected - sent as the residual. If it is not finite, keep the old one and return False.

        corrected: changed in place. sparse: whether zeros of `sent` mean entries that were not sent.
        """
        corrected.sub_(sent)
        finite = bool(torch.isfinite(torch.linalg.vector_norm(corrected, float("inf"))))
        if finite:
            self._residuals.put(name, corrected)
        return finite

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add what was not delivered after all (1-D float32) to the residual that was kept last."""
        self._residuals.add(name, values)

    def residual(self, name: str) -> torch.Tensor | None:
        """The residual of `name` (1-D float32, not a copy), or None before its first step."""
        return self._residuals.values().get(name)

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
        """{kind: {name: tensor}} of all that is remembered; not copies."""
        return {kind: memory.values() for kind, memory in self.memories.items()}

    def load_tensors(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Replace all memory by these tensors."""
        for kind, memory in self.memories.items():
            memory.load(tensors[kind])

    def checked(self, state: dict, sizes: dict[str, int] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of the tensors of a `state_dict()`, as `load_tensors` takes them; ConfigError if it is none.

        sizes: see `checked_copies`.
        """
        return {"residual": checked_copies("residual", state, sizes)}

    def state_dict(self) -> dict:
        """{name: residual}; the residuals are this rank's own and must not be broadcast."""
        return self._residuals.values()

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
    def corrected(name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient, 1-D float32, contiguous; not a copy where it is that already."""
        return to_type(gradient.detach().reshape(-1), torch.float32).contiguous()


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
    """

    kinds = ("residual", "velocity")
    fuses = False

    def __init__(self, momentum=0.9, clip=None, at_once=True):
        super().__init__(at_once)
        self.momentum, self.clip = momentum, clip
        self._velocities = self.memories["velocity"]
        self._moving = {}  # velocities of gradients between `corrected` and `keep`

    def corrected(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Velocity plus the residual of `name`: a new 1-D float32 tensor."""
        velocity = to_type(gradient.detach().reshape(-1), torch.float32)
        if self.clip is not None:
            norm = float(torch.linalg.vector_norm(velocity))
            if self.clip < norm < float("inf"):
                velocity = velocity * (self.clip / norm)
        before = self._velocities.get(name)
        if before is not None and before.numel() == velocity.numel():
            velocity = torch.add(velocity, before, alpha=self.momentum)
        self._moving[name] = velocity
        return super().corrected(name, velocity)

    def keep(self, name: str, corrected: torch.Tensor, sent: torch.Tensor, *, sparse: bool = False) -> bool:
        velocity = self._moving.pop(name)
        finite = super().keep(name, corrected, sent)
        if finite:
            self._velocities.put(name, torch.where(sent == 0, velocity, 0.0) if sparse else velocity.clone())
        return finite

    def velocity(self, name: str) -> torch.Tensor | None:
        """The velocity of `name` (1-D float32, not a copy), or None before its first step."""
        return self._velocities.values().get(name)

    def checked(self, state: dict, sizes: dict[str, int] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        if not isinstance(state, dict) or set(state) != set(self.kinds):
            got = ", ".join(map(repr, state)) if isinstance(state, dict) else type(state).__name__
            raise ConfigError(f"feedback: got {got}, expected residual and velocity")
        return {kind: checked_copies(kind, state[kind], sizes) for kind in self.kinds}

    def state_dict(self) -> dict:
        """{"residual": {name: tensor}, "velocity": {name: tensor}}, this rank's own."""
        return self.tensors()


def _compress_on_device(kernels, compressor, gradient, residual, seed):
    """Encode gradient + residual and find what the payload loses of it, without waiting for the device.

    Args:
        kernels: a DeviceKernels with those of the compressor.
        residual: 1-D float32 on the gradient's device, or None if there is none yet.

    Returns:
        (payload, the new residual). If gradient + residual is not finite, the new residual is the old one.
    """
    values = compressor.values_of(gradient).view(-1)
    fresh, poisoned = torch.empty_like(values), torch.zeros(1, dtype=torch.int32, device=values.device)
    before = 0 if residual is None else residual.data_ptr()
    remembering = kernels.remembering(before, fresh.data_ptr(), poisoned.data_ptr())
    if kernels.keeps_residual_with(compressor.device_kernels or compressor.kernels):
        payload = compressor.encode_with(remembering, values, seed)
    else:
        corrected = values if residual is None else values + residual
        payload, _ = compressor.compress(corrected.view(gradient.shape), seed=seed)
        sent = torch.empty_like(values)
        compressor.decode_into(payload, sent)
        remembering.keep_residual(values.data_ptr(), values.numel(), sent.data_ptr())
    kernels.feedback_restore(before, values.numel(), poisoned.data_ptr(), fresh.data_ptr())
    return payload, fresh


def new_memory(policy, at_once=True):
    """The empty memory that a Policy asks for, or None; at_once: see `ErrorFeedback`."""
    if not policy.uses_feedback:
        return None
    if policy.momentum or policy.clip:
        return MomentumCorrection(policy.momentum, policy.clip, at_once)
    return ErrorFeedback(at_once)


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
