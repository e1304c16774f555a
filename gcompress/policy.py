"""Which compressor for which tensor, and by which exchange."""

import dataclasses

from .compressors import Compressor, from_spec
from .compressors.base import check_choice, check_integer
from .errors import ConfigError

EXCHANGES = ("auto", "allgather", "twophase", "summed")


@dataclasses.dataclass(frozen=True)
class Policy:
    """One compressor for every tensor that is large enough to be worth it.

    Args:
        compressor: a Compressor, its spec or its dict.
        min_numel: tensors with fewer entries (biases, norms) are sent uncompressed.
        error_feedback: True, False, or None: on unless the compressor is unbiased.
        exchange: how ranks come to the mean (see gcompress/exchange.py): "allgather", "twophase",
            "summed" (for `summable` compressors), or "auto", by traits, size and number of ranks.
        bucket_bytes: float32 bytes of gradients that travel together in a two-phase exchange, where
            the engine does not form buckets itself.
    """

    compressor: Compressor
    min_numel: int = 1024
    error_feedback: bool | None = None
    exchange: str = "auto"
    bucket_bytes: int = 8 << 20

    def __post_init__(self):
        object.__setattr__(self, "compressor", from_spec(self.compressor))
        check_integer("min_numel", self.min_numel, 0)
        check_choice("error_feedback", self.error_feedback, (None, True, False))
        check_choice("exchange", self.exchange, EXCHANGES)
        check_integer("bucket_bytes", self.bucket_bytes, 1)
        if self.exchange == "summed" and not self.compressor.summable:
            raise ConfigError(f"exchange: got 'summed', expected another one: payloads of {self.compressor} do not add")

    def compressor_for(self, name, numel):
        """The compressor for the gradient of parameter `name`, or None to send it as it is."""
        return self.compressor if numel >= max(1, self.min_numel) else None

    @property
    def uses_feedback(self):
        """Whether what is lost is remembered."""
        return not self.compressor.unbiased if self.error_feedback is None else self.error_feedback

    def to_dict(self):
        """The configuration as a JSON-able dict; `as_policy` reads it."""
        return {
            "compressor": self.compressor.to_dict(),
            "min_numel": self.min_numel,
            "error_feedback": self.error_feedback,
            "exchange": self.exchange,
            "bucket_bytes": self.bucket_bytes,
        }

    def __str__(self):
        feedback = "with" if self.uses_feedback else "without"
        return f"{self.compressor} {feedback} error feedback, from {self.min_numel} entries"


def as_policy(value):
    """A Policy from one, its dict, a compressor, a compressor's dict or a spec string."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, dict) and "compressor" in value:
        try:
            return Policy(**value)
        except TypeError as error:
            raise ConfigError(f"policy: {error}") from None
    return Policy(value)
