"""What every compressor is: a frozen value with an encoder, a decoder, a size and a spec."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from .. import backends, packing
from ..backends.cpu import MOST_MORE
from ..errors import ConfigError, PayloadError

if TYPE_CHECKING:
    from ..backends.cpu import BoundKernels, CpuKernels
    from ..backends.gpu.plans import DeviceKernels

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REGISTRY: dict[str, type[Compressor]] = {}  # name: class, of every method
LARGEST_DEPTH = 8  # of compressors in compressors
LONGEST_SPEC = 1000  # characters


class Context(NamedTuple):
    """What the decoder needs besides the bytes. Peers agree on it; it is never sent."""

    shape: torch.Size
    dtype: torch.dtype


# What `Compressor.sum_rounds` is: it yields (tensor, "sum" or "max"), is sent the result, and returns (total, own).
SumRounds = Generator[tuple[torch.Tensor, str], torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class Section(NamedTuple):
    """A part of a payload whose bytes are of one kind, for a compressor that codes them again.

    nbytes: its size. stride: byte i is of the same kind as byte i + stride. floats: whether it holds float32 values.
    """

    nbytes: int
    stride: int = 1
    floats: bool = False


@dataclasses.dataclass(frozen=True)
class Compressor:
    """A compressor without memory: equal values make equal bytes.

    A subclass is a frozen dataclass that sets `name`. It implements `nbytes`, `_encode_reference` and
    `_decode_reference`, and, if it names `kernels`, `_encode_native` and `_decode_native`. It is in the
    registry as soon as it is defined. tests/toy/toy.py is a small one.

    All arithmetic is float32; other floating-point types are converted on the way in and out. A finite
    tensor decodes to a finite one: a value beyond the largest float32 becomes the largest.

    Exchanges and feedback choose by traits:
        unbiased: the expected decoded value is the input.
        summable: an all-reduce can add what it sends. It implements `sum_rounds` and `summed_nbytes`, too.
        fixed_size: `nbytes` is exact, not a bound. If it is a bound, a payload's first bytes tell its size, and
            `payload_nbytes` reads them.
        sparse: an entry that decodes to zero was not sent.
        exact: sparse, and all other entries decode to what they were.
    """

    name: ClassVar[str]
    # Specs of this method: laws, golden bytes and benchmarks run on them. The first is what tables show.
    examples: ClassVar[tuple] = ()
    # The C++ kernels that `_encode_native` and `_decode_native` call; None: there is the reference alone.
    kernels: ClassVar[tuple | None] = None
    # The same on a GPU, where they differ.
    device_kernels: ClassVar[tuple | None] = None
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
    def unbiased(self) -> bool:
        """Whether the expected decoded value is the input, so that no error feedback is needed."""
        return False

    @property
    def depth(self) -> int:
        """Compressors inside one another, this one included: 1 without parts."""
        return 1 + max((getattr(self, part).depth for part in self.parts), default=0)

    def nbytes(self, numel: int) -> int:
        """The payload size in bytes for `numel` entries: exact, or if not `fixed_size` the largest possible."""
        raise NotImplementedError(f"{type(self).__name__}.nbytes")

    def payload_nbytes(self, start: torch.Tensor, numel: int) -> int:
        """The size in bytes of a payload for `numel` entries.

        Args:
            start: uint8 tensor that begins with the payload; more may follow.
            numel: entries encoded.

        Returns:
            Its size, at most `nbytes(numel)`; PayloadError if no payload begins with these bytes.
        """
        return self.nbytes(numel)

    def sections(self, numel: int) -> list[Section]:
        """The payload's Sections, in order; for compressors of `fixed_size`."""
        return [Section(self.nbytes(numel))]

    def compress(self, tensor: torch.Tensor, *, seed: int = 0) -> tuple[torch.Tensor, Context]:
        """Encode a tensor.

        Args:
            tensor: float16, bfloat16, float32 or float64, any shape, any strides.
            seed: integer for compressors that round at random; the same seed, the same bytes.

        Returns:
            (payload, ctx): a 1-D uint8 tensor of `nbytes(tensor.numel())` bytes (at most
            that many if not `fixed_size`) on the tensor's device, and the Context that `decompress` needs.
        """
        if sys._getframe(1).f_globals.get("__name__") == "horovod.torch.optimizer":  # else it would sum payloads
            raise ConfigError(
                f"compression: Horovod has {self}, expected `import gcompress.plugins.horovod` before that"
            )
        values = self.values_of(tensor)
        ctx = Context(tensor.shape, tensor.dtype)
        if values.numel() == 0:
            return torch.empty(0, dtype=torch.uint8, device=values.device), ctx
        kernels = backends.kernels(values, self)
        if kernels is None:
            return self._encode_reference(values, seed & 0xFFFFFFFF), ctx
        return self.encode_with(kernels, values, seed), ctx

    def encode_with(
        self, kernels: CpuKernels | BoundKernels | DeviceKernels, values: torch.Tensor, seed: int
    ) -> torch.Tensor:
        """The payload of a tensor's `values_of` by kernels that a backend has for this method."""
        payload = torch.empty(self.nbytes(values.numel()), dtype=torch.uint8, device=values.device)
        size = self._encode_native(kernels, values, payload, seed & 0xFFFFFFFF)
        # A slice would keep the memory of the largest possible payload.
        return payload if self.fixed_size else payload[:size].clone()

    def encode_into(self, values: torch.Tensor, payload: torch.Tensor, *, seed: int = 0) -> None:
        """Encode contiguous 1-D float32 to a uint8 tensor of `nbytes`; for a fixed size that depends on no shape."""
        if values.numel() == 0:
            return
        kernels = backends.kernels(values, self)
        if kernels is None:
            payload.copy_(self._encode_reference(values, seed & 0xFFFFFFFF))
        else:
            self._encode_native(kernels, values, payload, seed & 0xFFFFFFFF)

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The entries as contiguous float32; ConfigError if they are not floats of a dense tensor."""
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOAT_TYPES or tensor.is_sparse:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ConfigError(f"tensor: got {got}, expected a dense float16, bfloat16, float32 or float64 tensor")
        values = packing.to_type(tensor.detach(), torch.float32).contiguous()
        if values.numel() == 1:  # of any strides, which a view as bytes would not take
            values = values.clone(memory_format=torch.contiguous_format)
        return values if self.uses_shape else values.view(-1)

    def decompress(self, payload: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Decode a payload to a new tensor of ctx.shape and ctx.dtype; PayloadError on bytes that do not fit.

        Finite numbers beyond the range of ctx.dtype become its largest of their sign.
        """
        values = torch.empty(ctx.shape.numel(), dtype=torch.float32, device=payload.device)
        self.decode_into(payload, values)
        return packing.to_type(values, ctx.dtype).view(ctx.shape)

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """Decode into, or add to, a contiguous 1-D float32 tensor on the payload's device."""
        self._check_decodable(payload, out)
        if out.numel() == 0:
            return
        kernels = backends.kernels(out, self)
        if kernels is None:
            values = self._decode_reference(payload, out.numel())
            out.add_(values) if add else out.copy_(values)
        else:
            self._decode_by(kernels, payload.contiguous(), out, add)

    def _decode_by(self, kernels, payload, out, add):
        if self._decode_native(kernels, payload, out, add):
            raise PayloadError(f"payload: its index does not mark what {self} keeps of {out.numel()} entries")

    def _check_decodable(self, payload, out):
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

    def decode_sum(
        self, payloads: list[torch.Tensor], out: torch.Tensor, factor: float = 1.0, *, again: bool = False
    ) -> None:
        """Decode to `out` the sum of what payloads hold, added in order, times a float32 factor.

        Args:
            payloads: 1-D uint8 tensors, at least one, each as for `decode_into`.
            out: as for `decode_into`. Undefined after a PayloadError.
            again: whether `out` is read again at once, and had better stay in the cache.
        """
        kernels = backends.kernels(out, self) if out.numel() else None
        if kernels is None or not self.fixed_size or not kernels.adds_with(self.kernels or ()):
            for number, payload in enumerate(payloads):
                self.decode_into(payload, out, add=number > 0)
            if factor != 1.0:
                out.mul_(factor)
            return
        for first in range(0, len(payloads), MOST_MORE + 1):
            some = [payload.contiguous() for payload in payloads[first : first + MOST_MORE + 1]]
            for payload in some:
                self._check_decodable(payload, out)
            last = first + len(some) == len(payloads)
            others = [payload.data_ptr() for payload in some[1:]]
            adding = kernels.adding(others, factor if last else 1.0, again or not last)
            self._decode_by(adding, some[0], out, first > 0)

    def sum_rounds(
        self, values: torch.Tensor, *, shape: torch.Size, seed: int, world_size: int, memory: dict
    ) -> SumRounds:
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
            contributed, so that values - own is its residual; new 1-D float32 tensors.
            If any rank's values are not finite, so is some entry of the total, on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__}.sum_rounds")

    def summed_nbytes(self, shape: torch.Size, world_size: int) -> int:
        """The bytes of all tensors that `sum_rounds` yields for a gradient of this torch.Size."""
        raise NotImplementedError(f"{type(self).__name__}.summed_nbytes")

    def check(self, payload: torch.Tensor, numel: int) -> None:
        """PayloadError if a payload holds a scale that no encoder writes.

        `decode_into` is safe on any bytes, but does not check scales. Call this first on payloads
        from peers that are not trusted. Scales may be NaN: encoders write that for inputs that are
        not finite.
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

    def __init_subclass__(cls, **keywords):
        """Register a class that has a `name` of its own as a method."""
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            other = REGISTRY.get(cls.name)
            if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(f"name: got {cls.name!r} in {cls.__qualname__}, which is {other.__qualname__}'s")
            REGISTRY[cls.name] = cls

    def to_dict(self) -> dict:
        """The configuration as a JSON-able dict: {"name": …, argument: value, …}; `from_dict` reads it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name, **fields, **{part: fields[part].to_dict() for part in self.parts}}

    @property
    def spec(self) -> str:
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


class Bucketed(Compressor):
    """A compressor with a scale for each bucket. Its field `bucket` is the bucket's entries; 0: the whole tensor."""

    bucket_multiple: ClassVar[int] = 1  # of entries in a bucket

    bucket: int

    def _bucket(self, numel):
        """Entries of a bucket: `bucket`. A smaller tensor is one bucket, rounded up to the multiple."""
        whole = max(1, -(-numel // self.bucket_multiple)) * self.bucket_multiple
        return min(self.bucket, whole) if self.bucket else whole


def _spec_value(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def code_section(numel: int, bits: int) -> Section:
    """The Section of a bit stream of numel codes."""
    return Section((numel * bits + 7) // 8, bits // math.gcd(bits, 8))


def kept_count(numel: int, sparsity: float) -> int:
    """Entries that a sparse compressor keeps: max(1, round(numel (1 - sparsity))), none of none."""
    return max(1, round(numel * (1 - sparsity))) if numel else 0


def check_scales(what: str, payload: torch.Tensor, count: int, nan: bool = False) -> None:
    """PayloadError unless a payload begins with `count` float32 scales that are finite and not negative.

    nan: whether they may be NaN too, which stands for a poisoned input.
    """
    if payload.numel() < 4 * count:
        raise PayloadError(f"payload: got {payload.numel()} bytes, expected at least {4 * count}")
    scales = packing.bytes_to_float(payload[: 4 * count])
    wrong = scales[(scales < 0) | scales.isinf() | (scales.isnan() & (not nan))]
    if wrong.numel():
        raise PayloadError(f"payload: {what} {float(wrong[0]):g}, expected finite ones of 0 or above")


def selection_words(numel: int, k: int) -> int:
    """32-bit words of scratch memory for the C++ selection of k: room for what a sampled bound lets through."""
    return min(numel, 2 * k) + 16384


def selection_workspace(numel: int, k: int, device: torch.device) -> torch.Tensor:
    """Scratch memory for the C++ selection, int32."""
    return torch.empty(selection_words(numel, k), dtype=torch.int32, device=device)
