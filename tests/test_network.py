"""The report's bytes against the counter of a network interface."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.launching import REPOSITORY

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run `make setup`")
pytestmark = pytest.mark.ranks
ATTEMPTS, LARGEST_RATIO = 3, 1.06

_spec = importlib.util.spec_from_file_location("slow_link", REPOSITORY / "tools" / "slow_link.py")
slow_link = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow_link)


@pytest.mark.horovod
@pytest.mark.root
@pytest.mark.skipif(slow_link.missing() is not None, reason=str(slow_link.missing()))
def test_an_interface_counts_what_the_report_says(tmp_path):
    """Within 6 %: TCP's headers, and the messages of Horovod's cycles, made rare here.

    A busy machine takes longer for a step, in which more such messages go: what is beyond it is counted again. The
    least counts, since a counter may see what others sent, but never less than we did.
    """
    specs = ["none", "fp16", "mask:sparsity=0.99,bits=2", "quantize:bits=4", "topk:sparsity=0.9"]
    specs += ["quantize:bits=4@twophase", "randomk:sparsity=0.9", "ddp/quantize:bits=4@twophase", "ddp/fp16"]
    least = {}
    for attempt in range(ATTEMPTS):
        again = [spec for spec in specs if least.get(spec, LARGEST_RATIO) >= LARGEST_RATIO]
        for spec, ratio in counted(again, tmp_path / f"figures-{attempt}.json").items() if again else ():
            least[spec] = min(ratio, least.get(spec, ratio))
    assert list(least) == specs
    assert all(0.995 < ratio < LARGEST_RATIO for ratio in least.values()), least


def counted(specs, out):
    """{spec: bytes that an interface counted over those that the report expected}."""
    command = [sys.executable, REPOSITORY / "benchmarks" / "slow_link.py", "--ranks", "4", "--parameters", "4"]
    subprocess.run(
        [*command, "--steps", "3", "--json", out, "--compressors", *specs],
        check=True,
        timeout=240,
        env={**os.environ, "HOROVOD_CYCLE_TIME": "20"},
        capture_output=True,
    )
    rows = json.loads(out.read_text())
    return {row["method"]: row["counted_wire_bytes"] / row["expected_wire_bytes"] for row in rows}
