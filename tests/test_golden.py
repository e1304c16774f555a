"""Payloads of format version 1, written once: they must decode, and be produced, for ever.

`python -m tests.test_golden` adds fixtures for methods' examples that have none; it never changes one.
"""

import base64
import json
import pathlib

import pytest
import torch

from gcompress import backends, from_spec, methods

PATH = pathlib.Path(__file__).parent / "golden" / "version-1.json"
FIXTURES = json.loads(PATH.read_text()) if PATH.exists() else {}
NUMEL, SEED = 301, 12345


def golden_input():
    """301 float32 entries from integer arithmetic, so that no generator's change moves them."""
    index = torch.arange(NUMEL, dtype=torch.int64)
    noise = (index * 7919 + index * index * 104729) % 2003 - 1001
    return (noise.to(torch.float32) / 256) ** 3 / 16


def test_every_method_has_a_fixture():
    assert {spec.partition(":")[0] for spec in FIXTURES} == set(methods())


@pytest.mark.parametrize("spec", FIXTURES)
@pytest.mark.parametrize("backend", backends.available_backends())
def test_golden_payload(spec, backend):
    compressor, expected = from_spec(spec), FIXTURES[spec]
    with backends.use_backend(backend):
        payload, ctx = compressor.compress(golden_input(), seed=SEED)
        decoded = compressor.decompress(payload, ctx)
    assert base64.b64encode(bytes(payload.tolist())).decode() == expected["payload"]
    assert base64.b64encode(bytes(decoded.view(torch.uint8).tolist())).decode() == expected["decoded"]


def main():
    for spec in (spec for method in methods().values() for spec in method.examples):
        if spec not in FIXTURES:
            payload, ctx = from_spec(spec).compress(golden_input(), seed=SEED)
            decoded = from_spec(spec).decompress(payload, ctx).view(torch.uint8)
            encoded = [base64.b64encode(bytes(part.tolist())).decode() for part in (payload, decoded)]
            FIXTURES[spec] = dict(zip(("payload", "decoded"), encoded, strict=True))
    PATH.write_text(json.dumps(FIXTURES, indent=1) + "\n")


if __name__ == "__main__":
    main()
