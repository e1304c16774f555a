"""Error feedback: what a compressor dropped is added to the next gradient.

Memory of Seide et al. (2014) and Stich et al. (arXiv 1809.07599), analysed by Karimireddy
et al. (arXiv 1901.09847): with p = gradient + residual, send C(p) and keep p - D(C(p)).
With it every contraction, however biased, converges at the rate of SGD.
"""

import torch

from .compressors import Context
from .errors import ConfigError


class ErrorFeedback:
    """One rank's residuals, a 1-D float32 tensor per parameter name.

    A gradient with a non-finite entry is sent as it is, added to the residual, so that
    every rank sees a non-finite result; the residual stays what it was before that step.
    """

    def __init__(self):
        self._residuals = {}

    def compress(self, name, gradient, compressor, *, seed=0):
        """Encode gradient plus the residual of `name`, and remember what was lost.

        Args:
            name: the parameter's name, the same every step.
            gradient: tensor as for `Compressor.compress`, of one shape every step.
            compressor: any Compressor; it may change between steps.
            seed: see `Compressor.compress`.

        Returns:
            (payload, ctx) as `Compressor.compress` does.
        """
        values = gradient.detach().reshape(-1).to(torch.float32)
        residual = self._residuals.get(name)
        if residual is None:
            corrected = values.clone()
        elif residual.numel() == values.numel():
            corrected = values + residual
        else:
            raise ConfigError(f"gradient {name!r}: got {values.numel()} entries, expected {residual.numel()} as before")
        payload, _ = compressor.compress(corrected.view(gradient.shape), seed=seed)
        decoded = torch.empty_like(corrected)
        compressor.decode_into(payload, decoded)
        corrected.sub_(decoded)
        if bool(torch.isfinite(torch.linalg.vector_norm(corrected, float("inf")))):
            self._residuals[name] = corrected
        return payload, Context(gradient.shape, gradient.dtype)

    def residual(self, name):
        """The residual of `name` (1-D float32, not a copy), or None before its first step."""
        return self._residuals.get(name)

    def state_dict(self):
        """{name: residual}; the residuals are this rank's own and must not be broadcast."""
        return dict(self._residuals)

    def load_state_dict(self, state):
        """Replace all residuals by copies of those of `state_dict()`."""
        for name, residual in state.items():
            if not isinstance(residual, torch.Tensor) or residual.dim() != 1 or residual.dtype != torch.float32:
                raise ConfigError(f"residual {name!r}: expected a 1-D float32 tensor, got {type(residual).__name__}")
        self._residuals = {name: residual.clone() for name, residual in state.items()}
