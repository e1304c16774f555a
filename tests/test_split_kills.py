"""Killing either half at random moments: no step is lost, none is taken twice."""

import json
import os
import sys

import pytest
import torch

from tests.launching import run
from tests.nested import assert_same

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")
pytestmark = pytest.mark.ranks

TIMEOUT_SECONDS = 280


def train(folder, mode, steps, kills=0):
    """Run split_kills.py; its outcome and what both halves saved last. Nothing outlives it."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.split_kills", folder, "--mode", mode, "--steps", steps, "--kills", kills]
    code, output = run(command, TIMEOUT_SECONDS, None, {})
    assert code == 0, output[-4000:]
    states = []
    for half in ("client", "server"):
        (path,) = (folder / half).glob(f"*/step-{steps:09d}.pt")
        states.append(torch.load(path, weights_only=True))
    return json.loads(output.splitlines()[-1]), states


LONG = os.environ.get("GCOMPRESS_LONG") == "1"
KILLED = [("labels", 600, 50), ("delta", 120, 10), ("u-shaped", 120, 10)]
KILLED = KILLED if LONG else [(mode, 120, 6) for mode, _, _ in KILLED[:2]]


@pytest.mark.parametrize(("mode", "steps", "kills"), KILLED)
def test_killed_halves_end_where_an_uninterrupted_run_ends_to_the_bit(tmp_path, mode, steps, kills):
    """Weights, running statistics (which count the steps), momentum, schedule and remembered activations."""
    _, expected = train(tmp_path / "whole", mode, steps)
    outcome, found = train(tmp_path / "killed", mode, steps, kills)
    assert sum(outcome["kills"].values()) == kills and min(outcome["kills"].values()) > 0
    assert outcome["step"] == steps
    late = [step for step in outcome["killed_at"] if step > 6]
    assert len(late) > kills / 2, "most kills are of halves that had something to lose"
    assert int(expected[0]["head"]["1.num_batches_tracked"]) == steps
    assert expected[1]["tail"]["scheduler"]["last_epoch"] == steps // 100
    assert_same(expected, found)
