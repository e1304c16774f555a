"""The frame of split learning, and the only code that parses bytes from a peer (docs/WIRE.md).

A frame is a header of 64 bytes with its CRC32C, and a body with a CRC32C of its own. Nothing is
used before its checksum was checked. Nothing is allocated before its size was compared with what
was agreed. Whatever is wrong raises PayloadError. A checksum is not authentication: TLS does that
(gcompress/split/security.py).
"""

import dataclasses
import enum
import json
import struct

import google_crc32c
import torch

from ..errors import PayloadError

MAGIC = b"GCWF"
VERSION = 1
HEADER = struct.Struct("<4sHBB16sQQIIQI")  # and the CRC32C of these 60 bytes
HEADER_BYTES = HEADER.size + 4
CHUNK_BYTES = 1 << 20  # largest message of the link; gRPC's default limit is 4 MiB
MESSAGE_LIMIT = 64 * 1024  # bytes of a JSON body
MESSAGE_BRACKETS = 64  # most opening brackets in a JSON body; ours have five
NO_SESSION = bytes(16)
UP, DOWN = 0, 1


class Kind(enum.IntEnum):
    """What a frame is for. Those from 32 up are answers."""

    HELLO = 1  # JSON: the agreement, where the client can go on
    FORWARD = 2  # labels, sample ids, activation: of a training step
    BACKWARD = 3  # gradient of the server's output (U-shaped)
    EVALUATE = 4  # labels, activation: no step
    CONTROL = 5  # JSON: {"do": …}
    HAND_IN = 6  # safetensors: the head at the end of a round
    WELCOME = 32  # JSON: the session, the step at which both go on
    GRADIENT = 33  # statistics, gradient of the activation
    OUTPUT = 34  # the server's output (U-shaped)
    STATISTICS = 35  # of an evaluation
    ANSWER = 36  # JSON
    WEIGHTS = 37  # safetensors: the head for a round, with the round's number as step


@dataclasses.dataclass(frozen=True)
class Frame:
    """One message. Its session, step, sequence and direction tell a receiver whether it is an old one.

    kind: Kind. session: 16 bytes. step: training steps taken before this one. sequence: number of
    the request in its session, from 1; an answer has its request's. samples: how many are in a
    body of tensors.
    """

    kind: Kind
    session: bytes = NO_SESSION
    step: int = 0
    sequence: int = 0
    samples: int = 0
    body: bytes = b""

    @property
    def direction(self):
        return DOWN if self.kind >= Kind.WELCOME else UP

    @property
    def nbytes(self):
        """Its size on the wire."""
        return HEADER_BYTES + len(self.body)


def encode(frame):
    """The frame's bytes."""
    header = HEADER.pack(
        MAGIC, VERSION, frame.kind, frame.direction, frame.session, frame.step, frame.sequence, frame.samples, 0,
        len(frame.body), google_crc32c.value(frame.body),
    )  # fmt: skip
    return b"".join((header, struct.pack("<I", google_crc32c.value(header)), frame.body))


def chunks(data):
    """`data`, cut into pieces that fit into one message of the link."""
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]


class FrameReader:
    """Reads frames from a stream of chunks. A chunk may begin and end anywhere in a frame.

    Args:
        limits: {Kind: largest body in bytes} of the kinds that may come; the caller may replace
            it between frames. A header that announces more is refused before its body is stored.
            A body is stored as it arrives, so the receiver never holds more than the peer has sent.
    """

    def __init__(self, limits):
        self.limits = limits
        self._buffer = bytearray()
        self._header = None
        self._frames = 0

    @property
    def between_frames(self):
        """Whether no frame has arrived in part."""
        return self._header is None and not self._buffer

    @property
    def progress(self):
        """Changes when a frame begins, ends, or has grown by CHUNK_BYTES: then a slow peer gets more time."""
        waiting = len(self._buffer) + (HEADER_BYTES if self._header else 0)
        return self._frames, -(-waiting // CHUNK_BYTES)

    def feed(self, chunk):
        """Yield the frames that `chunk` completes."""
        self._buffer += chunk
        while True:
            if self._header is None:
                _check_opening(self._buffer)
                if len(self._buffer) < HEADER_BYTES:
                    return
                self._header = self._take_header()
            size = self._header[1]
            if len(self._buffer) < size:
                return
            body = bytes(memoryview(self._buffer)[:size])
            del self._buffer[:size]
            (fields, _, checksum), self._header = self._header, None
            self._frames += 1
            if google_crc32c.value(body) != checksum:
                raise PayloadError(f"frame: the body of {size} bytes does not match its CRC32C")
            yield Frame(*fields, body)

    def _take_header(self):
        header = bytes(memoryview(self._buffer)[:HEADER_BYTES])
        del self._buffer[:HEADER_BYTES]
        return parse_header(header, self.limits)

    def close(self):
        """PayloadError if the stream ended within a frame."""
        if not self.between_frames:
            raise PayloadError(f"frame: the stream ends within it, {len(self._buffer)} bytes after its last whole part")


def decode(data, limits):
    """The frame that `data` is; PayloadError if a byte is missing or left over."""
    reader = FrameReader(limits)
    frames = list(reader.feed(data))
    reader.close()
    if len(frames) != 1:
        raise PayloadError(f"frame: got {len(frames)} frames in {len(data)} bytes, expected 1")
    return frames[0]


def _check_opening(buffer):
    """Check magic and version. They stand first in every version, so that a peer of another one can be told so."""
    if not MAGIC.startswith(bytes(buffer[:4])):
        raise PayloadError(f"frame: begins with {bytes(buffer[:4])!r}, expected {MAGIC!r}")
    if len(buffer) >= 6 and (version := int.from_bytes(buffer[4:6], "little")) != VERSION:
        raise PayloadError(f"frame: got format version {version}, this side speaks version {VERSION}")


def parse_header(header, limits):
    """((kind, session, step, sequence, samples), body size, body's CRC32C) of a header's 64 bytes."""
    (checksum,) = struct.unpack_from("<I", header, HEADER.size)
    if google_crc32c.value(header[: HEADER.size]) != checksum:
        raise PayloadError("frame: the header does not match its CRC32C")
    magic, version, kind, direction, session, step, sequence, samples, zero, size, body_checksum = HEADER.unpack_from(
        header
    )
    _check_opening(header)
    if kind not in limits:
        expected = ", ".join(Kind(known).name for known in sorted(limits))
        name = Kind(kind).name if kind in Kind._value2member_map_ else kind
        raise PayloadError(f"frame: got kind {name}, expected one of {expected}")
    kind = Kind(kind)
    if direction != (DOWN if kind >= Kind.WELCOME else UP) or zero != 0:
        raise PayloadError(f"frame: {kind.name} with direction {direction} and reserved field {zero}")
    if size > limits[kind]:
        raise PayloadError(f"frame: {kind.name} announces {size} bytes, at most {limits[kind]} were agreed")
    return (kind, session, step, sequence, samples), size, body_checksum


def write_message(message):
    """A dict as a JSON body."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode()


def read_message(body):
    """The dict that `write_message` took."""
    if len(body) > MESSAGE_LIMIT:
        raise PayloadError(f"message: got {len(body)} bytes, expected at most {MESSAGE_LIMIT}")
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MESSAGE_BRACKETS:  # checked first, so that nothing deeply nested is parsed
        raise PayloadError(f"message: not JSON of ours: {brackets} brackets open, expected at most {MESSAGE_BRACKETS}")
    try:
        message = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise PayloadError(f"message: not JSON: {str(error)[:100]}") from None
    if not isinstance(message, dict):
        raise PayloadError(f"message: got a {type(message).__name__}, expected an object")
    return message


def _no_constant(name):
    raise ValueError(f"{name} is no number")


REQUIRED = object()


def take(message, name, kind, default=REQUIRED):
    """A message's field, of type str, int, float, bool, dict, or [int] (a list of sizes). None only if `default` is."""
    value = message.get(name, default)
    if value is REQUIRED:
        raise PayloadError(f"message: has no field {name!r}")
    if value is None and default is None:
        return None
    if kind == [int]:
        right = isinstance(value, (list, tuple)) and len(value) <= 1024 and all(_is_size(item) for item in value)
    elif kind is int:
        right = _is_size(value)
    else:
        right = isinstance(value, kind)
    if not right:
        expected = "a list of sizes" if kind == [int] else "a size" if kind is int else kind.__name__
        raise PayloadError(f"message: {name} is {str(value)[:100]!r}, expected {expected}")
    return value


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def write_tensor(tensor):
    """A tensor's entries, little-endian, in row-major order."""
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read_sections(body, sizes):
    """Cut a body into views of these sizes in bytes, which must add up to its length."""
    if len(body) != sum(sizes):
        raise PayloadError(f"body: got {len(body)} bytes, expected {' + '.join(map(str, sizes))} = {sum(sizes)}")
    view, sections = memoryview(body), []
    for size in sizes:
        sections.append(view[:size])
        view = view[size:]
    return sections


def read_tensor(section, dtype, shape):
    """A new tensor from a section of `write_tensor`, whose size must be that of dtype and shape."""
    shape = torch.Size(shape)
    if len(section) != shape.numel() * dtype.itemsize:
        raise PayloadError(f"tensor: got {len(section)} bytes, expected {dtype} of shape {tuple(shape)}")
    if not section:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(section), dtype=torch.uint8).view(dtype).view(shape)


def write_weights(state):
    """A state dict as safetensors."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})


def read_weights(body, template):
    """The state dict that `write_weights` took; it must be finite, and have the template's names, shapes and types."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(bytes(body))
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise PayloadError(f"weights: not safetensors: {str(error)[:100]}") from None
    if set(state) != set(template):
        odd = sorted(set(state) ^ set(template))
        raise PayloadError(f"weights: {odd[0][:100]!r} is on one side only; {len(odd)} such names")
    for name, tensor in state.items():
        expected = template[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, wanted = (f"{item.dtype} of shape {tuple(item.shape)}" for item in (tensor, expected))
            raise PayloadError(f"weights: {name} is {got}, expected {wanted}")
        if not bool(torch.isfinite(tensor).all()):
            raise PayloadError(f"weights: {name} is not finite")
    return state


def weights_limit(template):
    """The largest body of `write_weights` for a state dict: its entries, and a header with its names."""
    entries = sum(tensor.numel() * tensor.element_size() for tensor in template.values())
    return entries + sum(256 + 8 * len(name) for name in template) + 4096


def checksum(data):
    """CRC32C of bytes."""
    return google_crc32c.value(data)
