"""Feeds damaged frames to everything that reads from a peer: `python -m tests.wire_fuzz --cases 1000000`.

Nothing but PayloadError may come out, in little memory and time. Damage is of two kinds: any
bytes, and fields or bodies changed under checksums that are made right again, so that what
lies behind the checksums is reached.
"""

import argparse
import json
import random
import resource
import signal
import struct
import time

import torch

from gcompress import PayloadError
from gcompress.split import wire
from gcompress.split.agreement import Agreement
from gcompress.split.codec import ActivationCodec, Codec, Stats
from gcompress.split.wire import Frame, Kind

MEMORY_BYTES = 128 << 20  # above what the program has when it begins
CASE_SECONDS = 2.0
SHAPE, BATCH = (3, 4, 5), 6
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1)
SPECS = ["none", "quantize:bits=4", "mask:sparsity=0.9,bits=2", "mask:sparsity=0.9,bits=2,signed=false"]
SPECS += ["topk:sparsity=0.9", "topk:sparsity=0.5", "topk:sparsity=0.9,index=bitmap", "topk:sparsity=0.9,index=fixed"]


class Receiver:
    """Both sides' reading under one agreement, and one valid frame of each kind to begin with."""

    def __init__(self, spec, delta=0):
        first = {"delta_samples": delta} if delta else {}
        self.agreement = Agreement(up=spec, down=spec, shape=SHAPE, max_batch=BATCH, **first)
        self.sender, self.reader = ActivationCodec(self.agreement), ActivationCodec(self.agreement)
        self.codec = Codec(spec, SHAPE, BATCH)
        if delta:  # some samples are known already, some are new
            self.sender.encode(torch.randn(3, *SHAPE), torch.zeros(3, dtype=torch.int64), [0, 2, 4], 0, True)
            self.memory = self.sender.memory.state_dict()
        self.head = {"weight": torch.randn(4, 3), "bias": torch.randn(4), "count": torch.tensor(7)}
        body = wire.MESSAGE_LIMIT
        largest = self.reader.largest()
        self.limits = {Kind.HELLO: body, Kind.CONTROL: body, Kind.WELCOME: body, Kind.ANSWER: body}
        self.limits |= {Kind.FORWARD: largest, Kind.EVALUATE: largest, Kind.BACKWARD: self.codec.nbytes(BATCH)}
        self.limits |= {Kind.GRADIENT: 32 + self.codec.nbytes(BATCH), Kind.STATISTICS: 32}
        self.limits |= dict.fromkeys((Kind.HAND_IN, Kind.WEIGHTS), wire.weights_limit(self.head))

    def frames(self):
        batch, labels, ids = torch.randn(BATCH, *SHAPE).relu(), torch.arange(BATCH), list(range(BATCH))
        hello = {"agreement": self.agreement.to_dict(), "client": "a", "session": None, "steps": [0, 5], "sequence": 3}
        gradient = self.codec.encode(batch, 0)
        stats = Stats(0.5, 3, 4, BATCH).to_bytes()
        bodies = [
            (Kind.HELLO, 0, wire.write_message(hello)),
            (Kind.CONTROL, 0, wire.write_message({"do": "save"})),
            (Kind.FORWARD, BATCH, self.sender.encode(batch, labels, ids, 0, True)[0]),
            (Kind.EVALUATE, BATCH, self.sender.encode(batch, labels, ids, 0, False)[0]),
            (Kind.BACKWARD, BATCH, gradient),
            (Kind.GRADIENT, BATCH, stats + gradient),
            (Kind.STATISTICS, BATCH, stats),
            (Kind.WEIGHTS, 0, wire.write_weights(self.head)),
        ]
        return [wire.encode(Frame(kind, bytes(range(16)), 5, 6, samples, body)) for kind, samples, body in bodies]

    def read(self, data):
        frame = wire.decode(data, self.limits)
        if frame.kind in (Kind.HELLO, Kind.CONTROL, Kind.WELCOME, Kind.ANSWER):
            self.read_message(frame.kind, wire.read_message(frame.body))
        elif frame.kind in (Kind.FORWARD, Kind.EVALUATE):
            if self.reader.memory:
                self.reader.memory.load_state_dict(self.memory)
            self.reader.decode(frame.body, frame.samples, training=frame.kind == Kind.FORWARD)
        elif frame.kind == Kind.BACKWARD:
            self.codec.decode(frame.body, frame.samples)
        elif frame.kind == Kind.GRADIENT:
            sizes = [32, self.codec.nbytes(BATCH)]  # the client knows how many it sent
            sections = wire.read_sections(frame.body, sizes)
            Stats.from_bytes(sections[0])
            self.codec.decode(sections[1], BATCH)
        elif frame.kind == Kind.STATISTICS:
            Stats.from_bytes(frame.body)
        else:
            wire.read_weights(frame.body, self.head)

    def read_message(self, kind, message):
        if kind == Kind.CONTROL:
            return wire.take(message, "do", str)
        Agreement.from_message(wire.take(message, "agreement", dict))
        wire.take(message, "client", str)
        wire.take(message, "session", str, default=None)
        wire.take(message, "sequence", int)
        wire.take(message, "steps", [int])


def resealed(header, body):
    """A frame of these header fields (60 bytes) and body with checksums that are right."""
    header = bytearray(header[: wire.HEADER.size])
    struct.pack_into("<QI", header, 48, len(body), wire.checksum(bytes(body)))
    return bytes(header) + struct.pack("<I", wire.checksum(bytes(header))) + bytes(body)


def damage_anything(rng, data, others):
    """Bits, bytes, ends and pieces of a frame, checksums left as they are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        how, at = rng.randrange(6), rng.randrange(len(data)) if data else 0
        if how == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and data:
            data[at] = rng.choice(INTERESTING) & 0xFF
        elif how == 2:
            del data[at:]
        elif how == 3:
            data += rng.randbytes(rng.choice((1, 2, 64, 500)))
        elif how == 4:
            data[at:at] = data[at : at + rng.randrange(40)]
        else:
            other = rng.choice(others)
            data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data)


def damage_behind_checksums(rng, data, others):
    """A header field or the body changed, and the checksums made right."""
    header, body = bytearray(data[: wire.HEADER.size]), bytearray(data[wire.HEADER_BYTES :])
    how = rng.randrange(8)
    if how == 0:
        header[rng.randrange(len(header))] = rng.choice(INTERESTING) & 0xFF
    elif how == 1:
        struct.pack_into("<I", header, 40, rng.choice(INTERESTING) & 0xFFFFFFFF)  # samples
    elif how == 2 and body:  # a kind's body under another kind
        body = bytearray(rng.choice(others)[wire.HEADER_BYTES :])
    elif how == 3 and body:
        del body[rng.randrange(len(body)) :]
    elif how == 4 and body:
        body += rng.randbytes(rng.randrange(1, 30))
    elif how == 5:
        body = bytearray(hostile_message(rng))
    else:
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            if body:
                at = rng.randrange(len(body))
                size = rng.choice((1, 1, 4, 8))
                value = rng.choice(INTERESTING) if rng.random() < 0.5 else rng.getrandbits(64)
                body[at : at + size] = (value & (256**size - 1)).to_bytes(size, "little")[: len(body) - at]
    return resealed(header, body)


def hostile_message(rng):
    """JSON, or nearly, that a careless reader trips over."""
    value = rng.choice(
        [None, True, -1, 0, 2**63, 10**400, 1.5, "x" * 5000, [], {}, [0] * 5000, [[1]], {"name": "topk"}]
    )
    name = rng.choice(["agreement", "client", "session", "sequence", "steps", "shape", "up", "max_batch", "labels"])
    agreement = {"up": "topk", "down": "none", "shape": [3], "label_shape": [], "delta_first": "none"}
    agreement |= {"max_batch": 4, "delta_samples": 0, "labels": None}
    whole = {"agreement": agreement, "client": "a", "session": None, "sequence": 0, "steps": []}
    (agreement if name in agreement else whole)[name] = value
    texts = ["[" * 30000, '{"a":' * 10000, '{"agreement": NaN}', "\ud800", "", "{", '{"a": 1e999}', "1" * 5000]
    return rng.choice([json.dumps(whole), json.dumps(value), rng.choice(texts)]).encode(errors="surrogatepass")


def make_receivers():
    receivers = [Receiver(spec) for spec in SPECS]
    return receivers + [Receiver("quantize:bits=4", delta=8), Receiver("topk:sparsity=0.9", delta=8)]


def run(cases, seed):
    """Run the cases; returns (how many were refused, the slowest in seconds). Raises what it finds."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpus = [(receiver, receiver.frames()) for receiver in make_receivers()]
    for receiver, frames in corpus:
        for data in frames:
            receiver.read(data)  # all are good before they are damaged
    refused, slowest = 0, 0.0
    for number in range(cases):
        receiver, frames = rng.choice(corpus)
        method = rng.choice((damage_anything, damage_behind_checksums, damage_behind_checksums))
        data = method(rng, rng.choice(frames), frames)
        signal.setitimer(signal.ITIMER_REAL, 10 * CASE_SECONDS)
        started = time.perf_counter()
        try:
            receiver.read(data)
        except PayloadError:
            refused += 1
        except BaseException:
            print(f"case {number}: {receiver.agreement.up}: {data.hex()}", flush=True)
            raise
        slowest = max(slowest, time.perf_counter() - started)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return refused, slowest


def limit_memory():
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES,) * 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(1000, arguments.seed)  # libraries are loaded and their pools filled
    limit_memory()
    refused, slowest = run(arguments.cases, arguments.seed + 1)
    print(json.dumps({"cases": arguments.cases, "refused": refused, "slowest_seconds": round(slowest, 4)}))
    if slowest > CASE_SECONDS:
        raise SystemExit(f"a case took {slowest:.1f} s")


if __name__ == "__main__":
    main()
