"""Handshakes that are meant to harm: each is refused at once, by name, in little memory, while a client trains on."""

import json
import logging
import random
import resource
import threading
import time

import grpc
import pytest

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

from gcompress import ConfigError, PayloadError, methods, split
from gcompress.compressors.base import LARGEST_DEPTH, LONGEST_SPEC  # noqa: E402
from gcompress.split import wire  # noqa: E402
from gcompress.split.agreement import Agreement  # noqa: E402
from gcompress.split.wire import Frame, Kind  # noqa: E402
from tests.split_damage import damaged, trials  # noqa: E402
from tests.split_tools import Rogue, Trainer, serving  # noqa: E402
from tests.wire_fuzz import hostile_message  # noqa: E402

REFUSED_SECONDS = 2.0  # of one handshake, and of one step meanwhile; two orders more than they take
GROWTH_BYTES = 64 << 20
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


def nested(deep, name="chain", inner="topk"):
    spec = inner
    for _ in range(deep):
        spec = f"{name}:({spec}),(quantize:bits=4)"
    return spec


def peak_memory():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


SPECS = {
    "nested": nested(20),
    "nested as hybrid": nested(20, "hybrid", "topk:sparsity=0.999"),
    "nested as names": "chain:first=(" * 18 + "topk" + ")" * 18,
    "deep": nested(400),
    "deeper": "chain:(" * 8000,
    "closing": ")" * 60_000,
    "long": "topk:sparsity=0." + "9" * 60_000,
    "commas": "topk:" + "," * 60_000,
    "many arguments": "topk:" + ",".join(f"a{number}=1" for number in range(8000)),
    "digits": "quantize:bits=" + "9" * 5000,
    "none": "",
}


class TestSpecs:
    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    @pytest.mark.parametrize("field", ["up", "down", "delta_first"])
    def test_hostile_ones_are_refused_at_once(self, spec, field):
        good = {"up": "none", "down": "none", "shape": [4], "label_shape": [], "labels": "int64", "max_batch": 9}
        message = {**good, "delta_samples": 0, "delta_first": "none", field: spec}
        before, started = peak_memory(), time.monotonic()
        with pytest.raises(PayloadError, match=f"{field}: "):
            Agreement.from_message(message)
        assert time.monotonic() - started < 0.1 and peak_memory() - before < GROWTH_BYTES
        with pytest.raises(ConfigError, match=f"{field}: "):
            Agreement(**{**message, "shape": (4,), "label_shape": ()})

    def test_those_within_the_bounds_are_read_at_once(self):
        started = time.monotonic()
        deepest = LARGEST_DEPTH - 1  # the innermost stands in none itself
        assert split.Agreement(up=nested(deepest), down="none", shape=(4,)).up.count("chain") == deepest
        assert time.monotonic() - started < 0.5
        with pytest.raises(ConfigError, match=f"deep, expected at most {deepest}"):
            split.Agreement(up=nested(deepest + 1), down="none", shape=(4,))
        assert len(nested(deepest)) < LONGEST_SPEC

    def test_mutated_ones_are_specs_or_refused_at_once(self):
        rng = random.Random(0)
        names = [*methods(), "chain:(topk:sparsity=0.99),(quantize:bits=4)", "hybrid:(threshold),(mask:bits=2)"]
        for _ in range(trials(500, 50_000)):
            name = rng.choice(names)
            arguments = rng.sample(["bits", "rate", "rank", "sparsity", "bucket", "signed", "index"], rng.randrange(3))
            values = rng.choices(["1", "0.5", "-1", "1e308", "nan", "9" * 40, "true", "(topk)", "()", "fixed"], k=3)
            spec = ",".join(filter(None, [f"{name}:"[: None if rng.random() < 0.9 else -1]] + [
                f"{argument}={value}" for argument, value in zip(arguments, values, strict=False)
            ]))  # fmt: skip
            spec = damaged(rng, spec.encode()).decode(errors="replace") if rng.random() < 0.7 else spec
            started = time.monotonic()
            try:
                Agreement(up=spec, down="none", shape=(3, 5))
            except ConfigError:
                pass
            assert time.monotonic() - started < REFUSED_SECONDS, spec


def hello_body(agreement, **changes):
    fields = {"agreement": agreement.to_dict(), "client": "client", "instance": "1" * 32, "session": None}
    return {**fields, "sequence": 0, "run": "0" * 32, "steps": [0], **changes}


def hostile_bodies(rng, agreement, count):
    """HELLO bodies: hostile specs in each place, JSON of every kind of damage, deep and wide values."""
    for spec in SPECS.values():
        body = hello_body(agreement)
        body["agreement"][rng.choice(["up", "down", "delta_first"])] = spec
        yield json.dumps(body).encode()
    whole = json.dumps(hello_body(agreement)).encode()
    for value in (
        b"[" * 900 + b"]" * 900,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b"9" * 4000,
        b'"' + b"x" * 60_000 + b'"',
    ):
        for name in (b'"steps":[0]', b'"client":"client"', b'"sequence":0', b'"shape":[24]'):
            yield whole.replace(name, name.split(b":")[0] + b":" + value)
    for _ in range(count):
        yield damaged(rng, whole) if rng.random() < 0.6 else hostile_message(rng)


def test_hostile_hellos_are_refused_while_another_client_trains(caplog):
    """Those that damage makes harmless are told to wait: a client of that name is connected."""
    caplog.set_level(logging.ERROR)  # pytest keeps what is logged, and with each refusal the bytes that came
    with serving() as (server, port):
        trainer = Trainer(port)
        trainer.step(0)
        over, longest, number = threading.Event(), [0.0], [0]

        def train():
            while not over.is_set():
                started = time.monotonic()
                trainer.step(number[0])
                number[0] += 1
                longest[0] = max(longest[0], time.monotonic() - started)

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        before, refused = peak_memory(), 0
        try:
            for body in hostile_bodies(random.Random(1), server.agreement, trials(60, 5000)):
                with Rogue(port) as stranger:
                    started = time.monotonic()
                    stranger.send(wire.encode(Frame(Kind.HELLO, body=body[: wire.MESSAGE_LIMIT])))
                    answer = stranger.receive()
                    assert time.monotonic() - started < REFUSED_SECONDS, body[:300]
                    assert not isinstance(answer, Frame), body[:300]
                    assert answer[0] in (*REFUSALS, grpc.StatusCode.UNAVAILABLE), (answer, body[:300])
                    refused += answer[0] in REFUSALS
        finally:
            over.set()
            thread.join(10)
        assert not thread.is_alive() and trainer.client.step == number[0] + 1 > 20
        assert longest[0] < REFUSED_SECONDS
        assert peak_memory() - before < GROWTH_BYTES
        assert refused > 20
