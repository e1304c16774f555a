"""The configuration that both sides must share. The handshake compares it before any tensor is sent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

from ..checks import check_choice, check_integer
from ..compressors import from_spec
from ..errors import ConfigError, PayloadError, RefusedError
from . import wire

LABEL_TYPES = ("uint8", "int16", "int32", "int64", "float32")
LARGEST_SAMPLE = 1 << 28  # entries of one sample's activation


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The configuration that client and server share.

    Args:
        up: spec of the compressor for activations; "none" sends them as float32.
        down: the same for gradients.
        shape: of one sample's activation, without the batch.
        labels: type in which the client sends labels to the server, one of LABEL_TYPES. With
            None the model is U-shaped: labels never leave the client.
        label_shape: of one sample's label.
        max_batch: the largest number of samples in a batch; bounds what a receiver allocates.
        delta_samples: how many samples' activations both sides remember; 0 for none. The client
            then sends only what changed since a sample's last visit (AQ-SGD). Each side holds 4
            bytes per entry and sample.
        delta_first: spec of the compressor for a sample's first activation, with delta_samples.
    """

    up: str
    down: str
    shape: tuple
    labels: str | None = "int64"
    label_shape: tuple = ()
    max_batch: int = 512
    delta_samples: int = 0
    delta_first: str = "quantize:bits=8"

    def __post_init__(self):
        for name in ("up", "down", "delta_first"):
            object.__setattr__(self, name, canonical_spec(name, getattr(self, name)))
        for name in ("shape", "label_shape"):
            object.__setattr__(self, name, _checked_shape(name, getattr(self, name)))
        if self.labels is not None:
            check_choice("labels", self.labels, LABEL_TYPES)
        check_integer("max_batch", self.max_batch, 1, 1 << 20)
        check_integer("delta_samples", self.delta_samples, 0, 1 << 40)
        if 0 < self.delta_samples < self.max_batch:
            raise ConfigError(f"delta_samples: got {self.delta_samples}, expected at least max_batch={self.max_batch}")
        if self.delta_samples and not getattr(from_spec_or_none(self.up), "signed", True):
            raise ConfigError(f"up: got {self.up}, but changes of activations have signs: use signed=true")

    @property
    def u_shaped(self) -> bool:
        return self.labels is None

    def to_dict(self) -> dict:
        """JSON-able; `from_message` reads it."""
        fields = dataclasses.asdict(self)
        return {**fields, "shape": list(self.shape), "label_shape": list(self.label_shape)}

    @classmethod
    def from_message(cls, message: dict) -> Agreement:
        """Read the agreement in a peer's handshake; PayloadError if it is malformed."""
        kinds = {"shape": [int], "label_shape": [int], "max_batch": int, "delta_samples": int}
        try:
            fields = {
                field.name: wire.take(message, field.name, kinds.get(field.name, str), default=_default(field))
                for field in dataclasses.fields(cls)
            }
            found = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            return cls(**found)  # type: ignore[arg-type]  # `take` has looked at every kind
        except ConfigError as error:
            raise PayloadError(f"agreement: {error}") from None

    @property
    def fingerprint(self) -> str:
        """A short digest of the configuration, for logs and the handshake."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def compare(self, theirs: Agreement, us: str, them: str) -> None:
        """Raise RefusedError if the peer's agreement differs; it names both values of each field that does."""
        ours, other = self.to_dict(), theirs.to_dict()
        different = [name for name in ours if ours[name] != other[name]]
        if different:
            what = "; ".join(f"{name}: the {us} has {ours[name]}, the {them} {other[name]}" for name in different)
            raise RefusedError(f"configurations differ in {what}")


def _default(field):
    return wire.REQUIRED if field.default is dataclasses.MISSING or field.name != "labels" else None


def _checked_shape(name, shape):
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    right = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if not right or math.prod(sizes) > LARGEST_SAMPLE:
        raise ConfigError(f"{name}: got {shape}, expected sizes of 1 or above, at most {LARGEST_SAMPLE} entries")
    return sizes


def from_spec_or_none(spec):
    """The compressor of a spec; None for "none"."""
    return None if spec == "none" else from_spec(spec)


def canonical_spec(name, spec):
    """The one spelling of a compressor's spec, "none" included."""
    if spec is None or spec == "none":
        return "none"
    try:
        return str(from_spec(spec))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
