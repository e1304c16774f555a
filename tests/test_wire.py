"""The frame of split learning: what goes in comes out, and whatever else is PayloadError."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google_crc32c", reason="google-crc32c is not installed: pip install -e .[split]")

from gcompress import PayloadError  # noqa: E402
from gcompress.split import wire  # noqa: E402
from gcompress.split.wire import Frame, Kind  # noqa: E402
from tests.launching import REPOSITORY  # noqa: E402

LIMITS = dict.fromkeys(Kind, 5000)
FRAME = Frame(Kind.FORWARD, bytes(range(16)), step=7, sequence=9, samples=3, body=b"activation")
# Written once, from docs/WIRE.md: version 1 stays readable for ever.
GOLDEN = (
    "4743574601000200000102030405060708090a0b0c0d0e0f0700000000000000090000000000000003000000000000000a00000000000000"
    "72c31233651703b761637469766174696f6e"
)


def test_the_golden_frame_is_written_and_read():
    assert wire.encode(FRAME).hex() == GOLDEN
    assert wire.decode(bytes.fromhex(GOLDEN), LIMITS) == FRAME


frames = st.builds(
    Frame,
    kind=st.sampled_from(list(Kind)),
    session=st.binary(min_size=16, max_size=16),
    step=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**64 - 1),
    samples=st.integers(0, 2**32 - 1),
    body=st.binary(max_size=300),
)


@given(st.lists(frames, max_size=4), st.data())
def test_frames_come_out_of_any_chunks(sent, data):
    stream = b"".join(map(wire.encode, sent))
    assert sum(frame.nbytes for frame in sent) == len(stream)
    reader, received, start = wire.FrameReader(LIMITS), [], 0
    while start < len(stream):
        size = data.draw(st.integers(1, 200))
        received += reader.feed(stream[start : start + size])
        start += size
    reader.close()
    assert received == sent


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_any_bytes_are_a_frame_or_refused(data):
    try:
        frame = wire.decode(data, LIMITS)
    except PayloadError:
        return
    assert wire.encode(frame) == data


def test_every_prefix_and_every_longer_string_is_refused():
    whole = wire.encode(FRAME)
    for size in range(len(whole)):
        with pytest.raises(PayloadError):
            wire.decode(whole[:size], LIMITS)
    for more in (b"\0", b"G", whole):
        with pytest.raises(PayloadError):
            wire.decode(whole + more, LIMITS)


def test_every_single_bit_flip_is_refused():
    whole = bytearray(wire.encode(FRAME))
    for position in range(8 * len(whole)):
        whole[position // 8] ^= 1 << position % 8
        with pytest.raises(PayloadError):
            wire.decode(bytes(whole), LIMITS)
        whole[position // 8] ^= 1 << position % 8


def sealed(header):
    return header + struct.pack("<I", wire.checksum(header))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: "HTTP"}, "begins with b'HTTP'"),
        ({1: 2}, "format version 2, this side speaks version 1"),
        ({2: 99}, "kind 99, expected one of HELLO"),
        ({3: 1}, "direction 1"),
        ({8: 1}, "reserved field 1"),
        ({9: 5001}, "announces 5001 bytes, at most 5000"),
        ({9: 2**64 - 1}, "at most 5000 were agreed"),
    ],
)
def test_a_header_is_refused_before_any_of_its_body_is_there(change, words):
    fields = [b"GCWF", 1, 2, 0, bytes(16), 0, 0, 0, 0, 10, 0]
    for position, value in change.items():
        fields[position] = value.encode() if isinstance(value, str) else value
    with pytest.raises(PayloadError, match=words):
        list(wire.FrameReader(LIMITS).feed(sealed(wire.HEADER.pack(*fields))))


def test_a_peer_of_another_version_is_told_so_before_its_header_is_read():
    with pytest.raises(PayloadError, match="version 513, this side speaks version 1"):
        list(wire.FrameReader(LIMITS).feed(b"GCWF\x01\x02"))


def test_kinds_that_nobody_expects_are_refused():
    with pytest.raises(PayloadError, match="got kind FORWARD, expected one of HELLO"):
        wire.decode(wire.encode(FRAME), {Kind.HELLO: 100})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[1]", "got a list"),
        (b"{", "not JSON"),
        (b'{"a":NaN}', "NaN is no number"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 60000, "not JSON"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "65 brackets open, expected at most 64"),
        (b" " * 70000, "at most 65536"),
    ],
)
def test_messages_that_are_none_are_refused(body, words):
    with pytest.raises(PayloadError, match=words):
        wire.read_message(body)


@pytest.mark.parametrize("value", ["x", -1, 1.0, True, 2**63, None, [0]])
def test_a_size_is_a_size(value):
    with pytest.raises(PayloadError, match="size is"):
        wire.take({"size": value}, "size", int)
    with pytest.raises(PayloadError, match="sizes is"):
        wire.take({"sizes": [value]}, "sizes", [int])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_tensors_come_back_and_other_sizes_do_not(dtype):
    tensor = torch.arange(24).to(dtype).view(2, 3, 4)
    data = wire.write_tensor(tensor.transpose(0, 2))
    assert torch.equal(wire.read_tensor(data, dtype, (4, 3, 2)), tensor.transpose(0, 2))
    for shape in ((4, 3), (25,), (2**40,), ()):
        with pytest.raises(PayloadError, match="expected"):
            wire.read_tensor(data, dtype, shape)


def test_weights_come_back_and_others_do_not():
    template = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    body = wire.write_weights(template)
    assert len(body) <= wire.weights_limit(template)
    loaded = wire.read_weights(body, template)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in template.items())
    renamed = {("x" + name if name == "0.bias" else name): tensor for name, tensor in template.items()}
    wider = {**template, "0.bias": torch.zeros(4)}
    poisoned = {**template, "0.bias": torch.full((3,), float("nan"))}
    for wrong, words in ((renamed, "one side only"), (wider, "expected torch.float32 of shape"), (poisoned, "finite")):
        with pytest.raises(PayloadError, match=words):
            wire.read_weights(wire.write_weights(wrong), template)
    for damaged in (b"", body[:-1], body + b"x", struct.pack("<Q", 2**62) + body[8:]):
        with pytest.raises(PayloadError, match="not safetensors"):
            wire.read_weights(damaged, template)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory by /proc")
def test_a_hundred_thousand_damaged_frames_are_read_or_refused():
    """In a process whose memory is limited; GCOMPRESS_FUZZ_CASES asks for more than 100,000."""
    cases = int(os.environ.get("GCOMPRESS_FUZZ_CASES", "100000"))
    command = [sys.executable, "-m", "tests.wire_fuzz", "--cases", str(cases)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60 + cases // 1000)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["cases"] == cases
    assert 0.3 * cases < outcome["refused"] < cases, "some damage is harmless, most is not"


def test_nothing_in_the_tree_unpickles_what_it_does_not_trust():
    """No pickle, and no torch.load without weights_only, in code that could see a peer's bytes."""
    files = [path for folder in ("gcompress", "plugins", "examples") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
            for banned in ("pickle.load", "pickle.Unpickler", "marshal.load", "cloudpickle", "dill", "joblib.load"):
                assert banned not in line, where
            if "torch.load(" in line:
                assert "weights_only=True" in line, where
