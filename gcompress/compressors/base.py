"""What every compressor is: a frozen value with an encoder, a decoder, a size and a spec."""

import dataclasses
import math
import sys
from typing import ClassVar, NamedTuple

import torch

from .. import backends, packing
from ..errors import ConfigError, PayloadError

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_INTEGER = 2**63 - 1  # what a kernel takes
LARGEST_DEPTH = 8  # of compressors in compressors
LONGEST_SPEC = 1000  # characters
LONGEST_SHOWN = 100  # characters of a value in an error


class Context(NamedTuple):
    """What the decoder must know besides the bytes: agreed between peers, never sent."""

    shape: torch.Size
    dtype: torch.dtype


class Section(NamedTuple):
    """A part of a payload whose bytes are alike, for wrappers that code it once more.

    nbytes: its size. stride: byte i is like byte i + stride. floats: whether it is float32 values.
    """

    nbytes: int
    stride: int = 1
    floats: bool = False


@dataclasses.dataclass(frozen=True)
class Compressor:
    """A compressor without memory: equal values make equal bytes.

    A subclass is a frozen dataclass that sets `name`, implements `nbytes` and the four
    methods `_encode_reference`, `_decode_reference`, `_encode_native`, `_decode_native`,
    and is listed in `gcompress/compressors/__init__.py`. All arithmetic is float32: other
    floating-point types are converted on the way in and out. A finite tensor decodes to a finite
    one: what would be larger than the largest number becomes that.

    Traits, by which exchanges and feedback choose: `unbiased` (the expected decoded value
    is the input), `summable` (an all-reduce can sum what it sends: it implements `sum_rounds`
    and `summed_nbytes` as well), `fixed_size` (`nbytes` is exact, not a bound), `sparse`
    (what decodes to zero was not sent), `exact` (and what does not is exact).

    A payload of variable size tells its own by how it begins: `payload_nbytes` reads it.
    """

    name: ClassVar[str]
    # Fields that a spec always shows; others are shown when they are not at their default.
    shown: ClassVar[tuple] = ()
    # Fields that hold other compressors, in the order in which a spec has them.
    parts: ClassVar[tuple] = ()
    # Whether `_encode_*` get the entries in their shape; otherwise as a vector.
    uses_shape: ClassVar[bool] = False
    summable: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = True
    sparse: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    @property
    def unbiased(self):
        """Whether the expected decoded value is the input, so that no error feedback is needed."""
        return False

    @property
    def depth(self):
        """Compressors inside one another, this one included: 1 without parts."""
        return 1 + max((getattr(self, part).depth for part in self.parts), default=0)

    def nbytes(self, numel):
        """The payload size in bytes for `numel` entries: exact, or if not `fixed_size` the largest possible."""
        raise NotImplementedError(f"{type(self).__name__}.nbytes")

    def payload_nbytes(self, start, numel):
        """The size in bytes of a payload for `numel` entries.

        Args:
            start: uint8 tensor that begins with the payload; more may follow.
            numel: entries encoded.

        Returns:
            Its size, at most `nbytes(numel)`; PayloadError if no payload begins so.
        """
        return self.nbytes(numel)

    def sections(self, numel):
        """The payload's Sections, in order; for compressors of `fixed_size`."""
        return [Section(self.nbytes(numel))]

    def compress(self, tensor, *, seed=0):
        """Encode a tensor.

        Args:
            tensor: float16, bfloat16, float32 or float64, any shape, any strides.
            seed: integer for compressors that round at random; the same seed, the same bytes.

        Returns:
            (payload, ctx): a 1-D uint8 tensor of `nbytes(tensor.numel())` bytes (at most so
            many if not `fixed_size`) on the tensor's device, and what `decompress` needs besides.
        """
        if sys._getframe(1).f_globals.get("__name__") == "horovod.torch.optimizer":  # else it would sum payloads
            raise ConfigError(
                f"compression: Horovod has {self}, expected `import gcompress.plugins.horovod` before that"
            )
        values = self._values_of(tensor)
        ctx = Context(tensor.shape, tensor.dtype)
        if values.numel() == 0:
            return torch.empty(0, dtype=torch.uint8, device=values.device), ctx
        kernels = backends.kernels(values, self.name)
        if kernels is None:
            return self._encode_reference(values, seed & 0xFFFFFFFF), ctx
        payload = torch.empty(self.nbytes(values.numel()), dtype=torch.uint8, device=values.device)
        size = self._encode_native(kernels, values, payload, seed & 0xFFFFFFFF)
        # A slice would keep the memory of the largest possible payload.
        return (payload if self.fixed_size else payload[:size].clone()), ctx

    def compress_remembering(self, tensor, owed, *, seed=0):
        """Encode tensor + owed, and find what the payload loses of it, where a backend's kernels do that.

        Args:
            tensor, seed: see `compress`.
            owed: the residual, 1-D float32 on the tensor's device, or None if there is none yet.

        Returns:
            (payload, the new residual), or None where no backend does. If tensor + owed is not finite the
            new residual is the old one, found out without waiting for the device.
        """
        kernels = backends.kernels(tensor, self.name)
        if not hasattr(kernels, "remembering") or tensor.numel() == 0:
            return None
        values = self._values_of(tensor).view(-1)
        fresh, poisoned = torch.empty_like(values), torch.zeros(1, dtype=torch.int32, device=values.device)
        before = 0 if owed is None else owed.data_ptr()
        remembering = kernels.remembering(before, fresh.data_ptr(), poisoned.data_ptr())
        if self.name in kernels.remembers:
            payload = torch.empty(self.nbytes(values.numel()), dtype=torch.uint8, device=values.device)
            self._encode_native(remembering, values, payload, seed & 0xFFFFFFFF)
        else:
            corrected = values if owed is None else values + owed
            payload, _ = self.compress(corrected.view(tensor.shape), seed=seed)
            sent = torch.empty_like(values)
            self.decode_into(payload, sent)
            remembering.keep_left(values.data_ptr(), values.numel(), sent.data_ptr())
        kernels.feedback_restore(before, values.numel(), poisoned.data_ptr(), fresh.data_ptr())
        return payload, fresh

    def _values_of(self, tensor):
        """The entries as contiguous float32; ConfigError if they are not floats of a dense tensor."""
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOAT_TYPES or tensor.is_sparse:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ConfigError(f"tensor: got {got}, expected a dense float16, bfloat16, float32 or float64 tensor")
        values = packing.to_type(tensor.detach(), torch.float32).contiguous()
        if values.numel() == 1:  # of any strides, which a view as bytes would not take
            values = values.clone(memory_format=torch.contiguous_format)
        return values if self.uses_shape else values.view(-1)

    def decompress(self, payload, ctx):
        """Decode a payload to a new tensor of ctx.shape and ctx.dtype; PayloadError on bytes that do not fit.

        Finite numbers beyond the range of ctx.dtype become its largest of their sign.
        """
        values = torch.empty(ctx.shape.numel(), dtype=torch.float32, device=payload.device)
        self.decode_into(payload, values)
        return packing.to_type(values, ctx.dtype).view(ctx.shape)

    def decode_into(self, payload, out, add=False):
        """Decode into, or add to, a contiguous 1-D float32 tensor on the payload's device."""
        if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous() or out.device != payload.device:
            raise ConfigError(
                f"out: got {out.dtype} of shape {tuple(out.shape)} on {out.device}, expected a contiguous 1-D float32 "
                f"tensor on the payload's device, {payload.device}"
            )
        if payload.dtype != torch.uint8 or payload.dim() != 1:
            raise PayloadError(f"payload: got {tuple(payload.shape)} of {payload.dtype}, expected 1-D uint8 of {self}")
        expected = self.payload_nbytes(payload, out.numel()) if out.numel() else 0
        if payload.numel() != expected:
            raise PayloadError(
                f"payload: got {payload.numel()} bytes, expected {expected} for {out.numel()} entries of {self}"
            )
        if out.numel() == 0:
            return
        kernels = backends.kernels(out, self.name)
        if kernels is None:
            values = self._decode_reference(payload, out.numel())
            out.add_(values) if add else out.copy_(values)
        elif self._decode_native(kernels, payload.contiguous(), out, add):
            raise PayloadError(f"payload: its index does not mark what {self} keeps of {out.numel()} entries")

    def sum_rounds(self, values, *, shape, seed, world_size, memory):
        """The sum over ranks by an all-reduce of payloads that add up; for `summable` compressors.

        A generator: it yields (tensor, "sum" or "max") for each all-reduce and is sent the
        result, a new tensor. Ranks yield tensors of the same sizes and types, so every
        decision about them must depend on what all ranks share.

        Args:
            values: this rank's gradient (plus residual), contiguous 1-D float32; to be left alone.
            shape: the gradient's torch.Size.
            seed: 32 bits, the same on all ranks, another one each step.
            world_size: the number of ranks.
            memory: a dict of this parameter's own, empty at first, that lives between steps and is
                saved with the residuals. Replace its tensors, do not change them in place: after a
                step whose sum is not finite the earlier ones are put back.

        Returns:
            (total, own): the decoded sum over ranks, the same on each, and what of it this rank
            contributed, so that values - own is what it still owes; new 1-D float32 tensors.
            If any rank's values are not finite, so is some entry of the total, on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__}.sum_rounds")

    def summed_nbytes(self, shape, world_size):
        """The bytes of all tensors that `sum_rounds` yields for a gradient of this torch.Size."""
        raise NotImplementedError(f"{type(self).__name__}.summed_nbytes")

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
        """Fill `payload`, of `nbytes` bytes; returns the bytes used if not `fixed_size`."""
        raise NotImplementedError(f"{type(self).__name__}._encode_native")

    def _decode_native(self, kernels, payload, out, add):
        raise NotImplementedError(f"{type(self).__name__}._decode_native")

    def _read_parts(self):
        """Let parts be given as specs or dicts; ConfigError if they are too deep or many. For `__post_init__`."""
        from . import from_spec

        for part in self.parts:
            found = from_spec(getattr(self, part))
            if found.depth >= LARGEST_DEPTH:
                raise ConfigError(
                    f"{part}: got compressors {found.depth} deep, expected at most {LARGEST_DEPTH - 1} in {self.name!r}"
                )
            object.__setattr__(self, part, found)
        if len(self.spec) > LONGEST_SPEC:
            raise ConfigError(
                f"{self.name}: got parts whose spec has {len(self.spec)} characters, more than {LONGEST_SPEC}"
            )

    def to_dict(self):
        """The configuration as a JSON-able dict: {"name": …, argument: value, …}; `from_dict` reads it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name, **fields, **{part: fields[part].to_dict() for part in self.parts}}

    @property
    def spec(self):
        """The configuration as a short string, "name:(part),argument=value,…"; `from_spec` reads it."""
        arguments = [f"({getattr(self, part).spec})" for part in self.parts]
        arguments += [
            f"{field.name}={_spec_value(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name not in self.parts and (field.name in self.shown or getattr(self, field.name) != field.default)
        ]
        return f"{self.name}:{','.join(arguments)}" if arguments else self.name

    def __str__(self):
        return self.spec


def _spec_value(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def code_section(numel, bits):
    """The Section of a bit stream of numel codes."""
    return Section((numel * bits + 7) // 8, bits // math.gcd(bits, 8))


def kept_count(numel, sparsity):
    """Entries that a sparse compressor keeps: max(1, round(numel (1 - sparsity))), none of none."""
    return max(1, round(numel * (1 - sparsity))) if numel else 0


def bucket_of(numel, bucket, multiple):
    """Entries that share a scale: `bucket`, but of a smaller tensor (0: of any) all, rounded up to a `multiple`."""
    whole = max(1, -(-numel // multiple)) * multiple
    return min(bucket, whole) if bucket else whole


def read_u32(start):
    """The little-endian number that a payload begins with; PayloadError if it is shorter."""
    if start.numel() < 4:
        raise PayloadError(f"payload: got {start.numel()} bytes, expected at least 4")
    return int.from_bytes(bytes(start[:4].tolist()), "little")


def u32_bytes(number, device):
    """`number` as four little-endian bytes, a uint8 tensor."""
    return torch.tensor(list(number.to_bytes(4, "little")), dtype=torch.uint8, device=device)


def check_scales(what, payload, count, nan=False):
    """PayloadError unless a payload begins with `count` float32 scales that are finite and not negative.

    nan: whether they may be NaN too, which stands for a poisoned input.
    """
    if payload.numel() < 4 * count:
        raise PayloadError(f"payload: got {payload.numel()} bytes, expected at least {4 * count}")
    scales = packing.bytes_to_float(payload[: 4 * count])
    wrong = scales[(scales < 0) | scales.isinf() | (scales.isnan() & (not nan))]
    if wrong.numel():
        raise PayloadError(f"payload: {what} {float(wrong[0]):g}, expected finite ones of 0 or above")


def shown(value):
    """How an error shows a value: its repr, of which a long one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of so many digits, nor lists that deep
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}… ({len(text)} characters)"


def is_number(value):
    """Whether value is an int or float, NaN and infinity included, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(argument, value, low, high=None):
    """ConfigError unless value is an int in [low, high]; without `high` it must fit 64 bits."""
    largest = LARGEST_INTEGER if high is None else high
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= largest:
        expected = f"an integer from {low} to {largest}"
        if high is None:
            expected = f"an integer of at least {low}" + (", below 2^63" if is_number(value) and value >= low else "")
        raise ConfigError(f"{argument}: got {shown(value)}, expected {expected}")


def check_number(argument, value, low, high):
    """ConfigError unless value is a number in [low, high]."""
    if not is_number(value) or not low <= value <= high:
        raise ConfigError(f"{argument}: got {shown(value)}, expected a number from {low} to {high}")


def check_sparsity(value):
    """ConfigError unless value is a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"sparsity: got {shown(value)}, expected the fraction set to zero, 0 <= sparsity < 1")


def check_bucket(value, multiple):
    """ConfigError unless value is a multiple of `multiple`, or 0."""
    check_integer("bucket", value, 0)
    if value % multiple:
        raise ConfigError(f"bucket: got {value!r}, expected a multiple of {multiple}, or 0 for the whole tensor")


def check_power_of_two(argument, value, low, high):
    """ConfigError unless value is a power of two from `low` to `high`, which are such."""
    if type(value) is not int or not low <= value <= high or value & (value - 1):
        raise ConfigError(f"{argument}: got {shown(value)}, expected a power of two from {low} to {high}")


def check_choice(argument, value, choices):
    """ConfigError unless value is one of choices, of the same type: 1 is not True, nor 32.0 32."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{argument}: got {shown(value)}, expected one of {', '.join(map(repr, choices))}")


def selection_workspace(numel, k, device):
    """Scratch memory for the C++ selection: room for the candidates that a sampled bound lets through."""
    return torch.empty(min(numel, 2 * k) + 16384, dtype=torch.int32, device=device)
