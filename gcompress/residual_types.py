"""How what is remembered is kept between steps: in float32, in one or two bytes an entry, or in the host's memory.

A policy names one type for all that its ranks, owners and servers remember:

    float32   as it is; nothing is lost, and encoders work on it in place.
    bf16      2 bytes: the upper half of every float32, rounded stochastically.
    int8      1.02 bytes: 8 bits of a grid for every 256 entries, rounded stochastically; the 8-bit error of LoCo
              (Xie et al., arXiv 2407.04480).
    cpu       float32 in page-locked host memory, for gradients on a GPU: copied beside other work.

Packed memory is a payload of one of the library's own compressors, so that all backends keep the same bytes. Rounding
must be unbiased. To nearest, a residual stays what it is as soon as what is added to it is smaller than half the
distance to its neighbours (of bf16 a 512th): what should wait for its turn is lost, always in the same direction.
Stochastically, what is remembered is right in the mean over steps. The seed counts how often a name's memory was
written, and follows what is applied: a step that is thrown away leaves no trace.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from .compressors import Compressor
from .compressors.casts import BF16
from .compressors.quantize import Quantize
from .errors import ConfigError, PayloadError
from .memory import Memory, Scratch, check_dict, check_entries, check_same

PACKED: dict[str, Compressor] = {
    "bf16": BF16(rounding="stochastic"),
    "int8": Quantize(bits=8, bucket=256, rounding="stochastic"),
}
RESIDUALS = ("float32", *PACKED, "cpu")
HEAD = 16  # bytes of a saved payload before it: entries and how often it was written, int64


class Packed(NamedTuple):
    """A vector as it is kept."""

    payload: torch.Tensor  # 1-D uint8
    numel: int
    written: int  # how often its name's memory was written; enters the seed of the next time


def held_nbytes(residual: str, numel: int) -> int:
    """The bytes that a vector takes in memory, in one of RESIDUALS."""
    return PACKED[residual].nbytes(numel) if residual in PACKED else 4 * numel


def saved_nbytes(residual: str, numel: int) -> int:
    """The bytes that a vector takes in a state."""
    return held_nbytes(residual, numel) + (HEAD if residual in PACKED else 0)


def made_memory(residual: str, at_once: bool, scratch: Scratch) -> Memory:
    """An empty memory of one of RESIDUALS. scratch: for all that a step unpacks."""
    if residual in PACKED:
        return PackedMemory(PACKED[residual], at_once, scratch)
    return HostMemory(at_once) if residual == "cpu" else Memory(at_once)


class PackedMemory(Memory):
    """A `Memory` of 1-D float32 tensors that keeps payloads.

    Args:
        compressor: of fixed size and unbiased; zeros stay zeros.
        at_once: see `Memory`.
        scratch: what `opened` unpacks to.
    """

    in_place = False

    def __init__(self, compressor: Compressor, at_once: bool = False, scratch: Scratch | None = None):
        super().__init__(at_once)
        self.compressor, self._scratch = compressor, scratch or Scratch()

    def get(self, name: str, default: object = None) -> object:
        """A new float32 tensor of what is kept."""
        found = super().get(name)
        return default if found is None else self._unpacked(found)

    def latest(self, name: str) -> torch.Tensor | None:
        found = super().latest(name)
        return None if found is None else self._unpacked(found)

    def spare(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A new tensor, which lives until it is put: between steps only what is applied takes memory."""
        return torch.empty_like(like)

    def opened(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(The value or None, where the next one is to be written): on a CPU one tensor, of the scratch memory."""
        found, fresh = super().get(name), self._scratch.floats(like.numel(), like.device)
        if found is None:
            return None, fresh
        check_same(name, found.numel, like)
        self._unpack(found, fresh)
        return fresh, fresh if like.is_cpu else torch.empty_like(
            like
        )  # a GPU's encoders read what they were given twice

    def put(self, name: str, value: Any, poisoned: torch.Tensor | None = None) -> None:
        packed, seed = self.draft(name, value.numel(), value.device)
        self.compressor.encode_into(value, packed.payload, seed=seed)
        if poisoned is not None and (kept := super().get(name)) is not None:
            old = kept.payload.to(value.device)
            packed = packed._replace(payload=torch.where(poisoned.bool(), old, packed.payload))
        self.propose(name, packed)

    def kept(self, name: str) -> Packed | None:
        """What `get` unpacks."""
        return super().get(name)

    def draft(self, name: str, numel: int, device: torch.device) -> tuple[Packed, int]:
        """(A vector whose payload is to be written, for `propose`; the seed of that)."""
        before = super().latest(name)
        return self._empty(name, numel, device, 1 + before.written if before else 1)

    def propose(self, name: str, packed: Packed) -> None:
        """`put` a vector that is packed."""
        super().put(name, packed)

    def room(self, numel: int, device: torch.device) -> torch.Tensor:
        """The scratch memory to unpack to."""
        return self._scratch.floats(numel, device)

    def value(self, name: str) -> torch.Tensor | None:
        found = self._values.get(name)
        return None if found is None else self._unpacked(found)

    def values(self) -> dict:
        """{name: a new float32 tensor} of what is applied."""
        return {name: self._unpacked(found) for name, found in self._values.items()}

    def saved(self) -> dict[str, torch.Tensor]:
        """{name: 1-D uint8 tensor}: two int64 (entries, how often written), then the payload."""
        return {name: _saved(found) for name, found in self._values.items()}

    def saved_one(self, name: str, proposed: bool = False) -> torch.Tensor | None:
        found = super().latest(name) if proposed else self._values.get(name)
        return None if found is None else _saved(found)

    def load(self, values: dict) -> None:
        super().load({name: _read(saved) for name, saved in values.items()})

    def load_one(self, name: str, saved: torch.Tensor) -> None:
        super().load_one(name, _read(saved))

    def load_vectors(self, vectors: dict[str, torch.Tensor]) -> None:
        """Replace everything by these float32 vectors, packed."""
        found = {name: self._empty(name, vector.numel(), vector.device, 0) for name, vector in vectors.items()}
        for name, (packed, seed) in found.items():
            self.compressor.encode_into(vectors[name].contiguous(), packed.payload, seed=seed)
        super().load({name: packed for name, (packed, _) in found.items()})

    def vectors_of(self, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Float32 vectors of what `checked` returned."""
        return {name: self._unpacked(_read(each)) for name, each in saved.items()}

    def checked(self, what: str, tensors: dict, sizes: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
        """Copies of the tensors of a saved {name: tensor}; see `checked_copies` of memory.py."""
        check_dict(what, tensors)
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.dtype != torch.uint8:
                got = getattr(tensor, "dtype", type(tensor).__name__)
                raise ConfigError(f"{what} {name!r}: got {got}, expected a 1-D uint8 tensor, as saved with this policy")
            numel, count = tensor[:HEAD].clone().cpu().view(torch.int64).tolist() if tensor.numel() >= HEAD else (-1, 0)
            if numel < 0 or count < 0 or tensor.numel() != HEAD + self.compressor.nbytes(numel):
                raise ConfigError(f"{what} {name!r}: got {tensor.numel()} bytes that are no {self.compressor}")
            check_entries(what, name, numel, sizes)
            self._check_payload(what, name, _read(tensor))
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def _check_payload(self, what, name, packed):
        try:
            self.compressor.check(packed.payload, packed.numel)
        except PayloadError as error:
            raise ConfigError(f"{what} {name!r}: {error}") from None
        if not bool(torch.isfinite(self._unpacked(packed)).all()):
            raise ConfigError(f"{what} {name!r}: got entries that are not finite")

    def _empty(self, name, numel, device, count):
        payload = torch.empty(self.compressor.nbytes(numel), dtype=torch.uint8, device=device)
        return Packed(payload, numel, count), zlib.crc32(f"kept/{name}/{self.salt}/{count}".encode())

    def _unpacked(self, packed):
        values = torch.empty(packed.numel, device=packed.payload.device)
        self.compressor.decode_into(packed.payload, values)
        return values

    def _unpack(self, packed, out):
        self.compressor.decode_into(packed.payload.to(out.device), out)


def _saved(packed):
    head = torch.tensor([packed.numel, packed.written], device=packed.payload.device)
    return torch.cat([head.view(torch.uint8), packed.payload])


def _read(saved):
    numel, count = saved[:HEAD].clone().cpu().view(torch.int64).tolist()
    return Packed(saved[HEAD:].clone(), numel, count)


class HostMemory(Memory):
    """A `Memory` of float32 tensors that lie in page-locked host memory while their gradients lie on a GPU.

    Of gradients on the CPU it is a plain `Memory`. A value is copied out on a stream of its own, behind the work that
    made it, and copied in on the same stream; while one tensor is worked on, the next one of the last step comes.

    Args:
        at_once: see `Memory`.
        copies: what moves tensors; None: `DeviceCopies`, made when a gradient on a GPU comes.
    """

    def __init__(self, at_once: bool = False, copies: DeviceCopies | None = None):
        super().__init__(at_once)
        self._copies: Any = copies
        self._after: dict[str, str] = {}  # {name: which one was opened after it in the last step}
        self._last: str | None = None
        self._ahead: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # {name: (value, its copy under way)}

    def get(self, name: str, default: object = None) -> object:
        """The value, on the host; valid once the GPU's copies are done, which is waited for."""
        self._wait()
        return super().get(name, default)

    def latest(self, name: str) -> torch.Tensor | None:
        self._wait()
        return super().latest(name)

    def values(self) -> dict:
        self._wait()
        return super().values()

    def spare(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return super().spare(name, like) if self._is_here(like) else torch.empty_like(like)

    def give_back(self, name: str, value: object) -> None:
        if value is None or self._is_here(value):
            super().give_back(name, value)

    def opened(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        if self._is_here(like):
            return super().opened(name, like)
        found, ahead = super().get(name), self._ahead.pop(name, (None, None))
        if self._last not in (None, name):
            self._after[self._last] = name
        self._last, following = name, self._after.get(name)
        came = None
        if found is not None:
            check_same(name, found.numel(), like)
            came = ahead[1] if ahead[0] is found else self._copies.begin(found, like)
            self._copies.come(came)
        if following is not None and (expected := super().get(following)) is not None:
            self._ahead[following] = expected, self._copies.begin(expected, like)
        return came, torch.empty_like(like)

    def put(self, name: str, value: Any, poisoned: torch.Tensor | None = None) -> None:
        if self._is_here(value):
            super().put(name, value)
            return
        self._ahead.pop(name, None)
        found, self._spare[name] = self._spare.get(name), None
        host = found if found is not None and found.shape == value.shape else self._copies.room(value)
        self._copies.leave(value, host)
        super().put(name, host)

    def add(self, name: str, values: torch.Tensor) -> None:
        latest = self.latest(name)
        self.put(name, values if latest is None else latest.to(values.device) + values)

    def drop(self, matches) -> None:
        super().drop(matches)
        self._ahead.clear()

    def load(self, values: dict) -> None:
        self._wait()
        self._ahead.clear()
        super().load(values)

    def _is_here(self, tensor):
        if self._copies is None and tensor.is_cuda:
            self._copies = DeviceCopies()
        return self._copies is None or self._copies.is_here(tensor)

    def _wait(self):
        if self._copies is not None:
            self._copies.wait()

    def __getstate__(self):
        self._wait()
        return {**self.__dict__, "_copies": None, "_ahead": {}}


class DeviceCopies:
    """Copies between a GPU and page-locked memory on a stream beside the one that computes."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor needs no copy."""
        return tensor.is_cpu

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """Page-locked memory for a tensor."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def begin(self, host: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A copy on the device of `like`, under way until `come`."""
        with torch.cuda.stream(self._beside(like.device)):
            return host.to(like.device, non_blocking=True)

    def come(self, tensor: torch.Tensor) -> None:
        """Let the computing stream go on once a copy is there."""
        current = torch.cuda.current_stream(tensor.device)
        current.wait_stream(self._beside(tensor.device))
        tensor.record_stream(current)

    def leave(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """Begin to copy a tensor, which nobody writes to any more, to the host."""
        beside = self._beside(tensor.device)
        beside.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(beside):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(beside)

    def wait(self) -> None:
        """Until nothing is under way."""
        for stream in self._streams.values():
            stream.synchronize()

    def _beside(self, device):
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
