"""What every compressor is: a frozen value with an encoder, a decoder, a size and a spec."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch

from .. import native
from ..errors import ConfigError, PayloadError

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Context(NamedTuple):
    """What the decoder must know besides the bytes: agreed between peers, never sent."""

    shape: torch.Size
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Compressor:
    """A compressor without memory: equal values make equal bytes.

    A subclass is a frozen dataclass that sets `name`, implements `nbytes` and the four
    methods `_encode_reference`, `_decode_reference`, `_encode_native`, `_decode_native`,
    and is listed in `gcompress/compressors/__init__.py`. All arithmetic is float32: other
    floating-point types are converted on the way in and out.

    Traits, by which exchanges and feedback choose: `unbiased` (the expected decoded value
    is the input), `summable` (payloads add up without decoding), `fixed_size` (`nbytes` is
    exact, not a bound).
    """

    name: ClassVar[str]
    # Fields that a spec always shows; others are shown when they are not at their default.
    shown: ClassVar[tuple] = ()
    summable: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True

    @property
    def unbiased(self):
        """Whether the expected decoded value is the input, so that no error feedback is needed."""
        return False

    def nbytes(self, numel):
        """The exact payload size in bytes for `numel` entries."""
        raise NotImplementedError(f"{type(self).__name__}.nbytes")

    def compress(self, tensor, *, seed=0):
        """Encode a tensor.

        Args:
            tensor: float16, bfloat16, float32 or float64, any shape, any strides.
            seed: integer for compressors that round at random; the same seed, the same bytes.

        Returns:
            (payload, ctx): a 1-D uint8 tensor of `nbytes(tensor.numel())` bytes on the
            tensor's device, and what `decompress` needs besides.
        """
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOAT_TYPES or tensor.is_sparse:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ConfigError(f"tensor: got {got}, expected a dense float16, bfloat16, float32 or float64 tensor")
        values = tensor.detach().reshape(-1).to(torch.float32).contiguous()
        payload = torch.empty(self.nbytes(values.numel()), dtype=torch.uint8, device=values.device)
        if values.numel() > 0:
            kernels = native.kernels(values)
            if kernels is None:
                payload.copy_(self._encode_reference(values, seed & 0xFFFFFFFF))
            else:
                self._encode_native(kernels, values, payload, seed & 0xFFFFFFFF)
        return payload, Context(tensor.shape, tensor.dtype)

    def decompress(self, payload, ctx):
        """Decode a payload to a new tensor of ctx.shape and ctx.dtype; PayloadError on bytes that do not fit."""
        values = torch.empty(ctx.shape.numel(), dtype=torch.float32, device=payload.device)
        self.decode_into(payload, values)
        return values.to(ctx.dtype).view(ctx.shape)

    def decode_into(self, payload, out, add=False):
        """Decode into, or add to, a contiguous 1-D float32 tensor on the payload's device."""
        if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous() or out.device != payload.device:
            raise ConfigError(
                f"out: got {out.dtype} of shape {tuple(out.shape)} on {out.device}, expected a contiguous 1-D float32 "
                f"tensor on the payload's device, {payload.device}"
            )
        expected = self.nbytes(out.numel())
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != expected:
            raise PayloadError(
                f"payload: got {tuple(payload.shape)} of {payload.dtype}, expected {expected} bytes (uint8) "
                f"for {out.numel()} entries of {self}"
            )
        if out.numel() == 0:
            return
        kernels = native.kernels(out)
        if kernels is None:
            values = self._decode_reference(payload, out.numel())
            out.add_(values) if add else out.copy_(values)
        elif self._decode_native(kernels, payload.contiguous(), out, add):
            raise PayloadError(f"payload: its index does not mark what {self} keeps of {out.numel()} entries")

    def check(self, payload, numel):
        """PayloadError if a payload from a stranger holds a scale that no encoder writes.

        `decode_into` is safe on any bytes and does not look; whoever takes payloads from
        peers he does not trust calls this first. NaN scales are written, for inputs that
        are not finite.
        """

    def _encode_reference(self, values, seed):
        raise NotImplementedError(f"{type(self).__name__}._encode_reference")

    def _decode_reference(self, payload, numel):
        raise NotImplementedError(f"{type(self).__name__}._decode_reference")

    def _encode_native(self, kernels, values, payload, seed):
        raise NotImplementedError(f"{type(self).__name__}._encode_native")

    def _decode_native(self, kernels, payload, out, add):
        raise NotImplementedError(f"{type(self).__name__}._decode_native")

    def to_dict(self):
        """The configuration as a JSON-able dict: {"name": …, argument: value, …}; `from_dict` reads it."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @property
    def spec(self):
        """The configuration as a short string, "name:argument=value,…"; `from_spec` reads it."""
        arguments = [
            f"{field.name}={_spec_value(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name in self.shown or getattr(self, field.name) != field.default
        ]
        return f"{self.name}:{','.join(arguments)}" if arguments else self.name

    def __str__(self):
        return self.spec


def _spec_value(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def kept_count(numel, sparsity):
    """Entries that a sparse compressor keeps: max(1, round(numel (1 - sparsity))), none of none."""
    return max(1, round(numel * (1 - sparsity))) if numel else 0


def check_scales(what, scales, nan=False):
    """PayloadError unless float32 scales are finite and not negative, or NaN where that stands for a poisoned input."""
    wrong = scales[(scales < 0) | scales.isinf() | (scales.isnan() & (not nan))]
    if wrong.numel():
        raise PayloadError(f"payload: {what} {float(wrong[0]):g}, expected finite ones of 0 or above")


def check_integer(argument, value, low, high=None):
    """ConfigError unless value is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ConfigError(f"{argument}: got {value!r}, expected {expected}")


def check_sparsity(value):
    """ConfigError unless value is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"sparsity: got {value!r}, expected the fraction set to zero, 0 <= sparsity < 1")


def check_choice(argument, value, choices):
    """ConfigError unless value is one of choices."""
    if value not in choices:
        raise ConfigError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def selection_workspace(numel, k, device):
    """Scratch memory for the C++ selection: room for the candidates that a sampled bound lets through."""
    return torch.empty(min(numel, 2 * k) + 16384, dtype=torch.int32, device=device)
