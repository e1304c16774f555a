"""Whatever bytes a decoder gets: nothing but PayloadError leaves it, backends agree, and memory stays in proportion.

GCOMPRESS_LONG=1 tries many times as many payloads.
"""

import os
import subprocess
import sys

import pytest
import torch

from gcompress import PayloadError, backends, from_spec
from gcompress.compressors.polar.tables import design_at, design_count
from tests.allocations import Allocations
from tests.compressors import COMPRESSORS, inputs, same_or_nan
from tests.hostile import hostile, hostile_polar, with_scales
from tests.launching import REPOSITORY

TRIALS = 200 if os.environ.get("GCOMPRESS_LONG") == "1" else 6
BACKENDS = ["reference", *backends.available_backends()[1:][-1:]]  # the C++ kernels differ in their instructions only
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
BESIDES = 1 << 20  # bytes that do not grow with a tensor: tables, headers, Python's own objects


def limit_of(compressor, backend, numel, payload):
    """Bytes that may be asked for by a decoder that is given and returns that many."""
    large = backend == "reference" or compressor.name == "polar"  # which unpack to 64-bit integers
    return (20 if large else 6) * (4 * numel + len(payload)) + BESIDES


def decoded(compressor, payload, numel):
    """1 plus what a payload decodes to, or None if it is refused."""
    out = torch.ones(numel)
    try:
        compressor.decode_into(payload, out, add=True)
    except PayloadError:
        return None
    return out


def same_outcome(one, other):
    if one is None or other is None:
        return one is other
    return same_or_nan(one, other)


def example(compressor, numel):
    shape = (20, numel // 20) if compressor.uses_shape and numel % 20 == 0 else (numel,)
    return compressor.compress(inputs(numel)["heavy"].view(shape), seed=7)[0]


@every_compressor
def test_any_bytes_decode_alike_or_are_refused_alike(compressor):
    generator = torch.Generator().manual_seed(11)
    for numel in (1, 65, 1000):
        payload = example(compressor, numel)
        for wrong in hostile(payload, generator, TRIALS):
            results = []
            for backend in BACKENDS:
                with backends.use_backend(backend):
                    results.append(decoded(compressor, wrong, numel))
            assert all(same_outcome(result, results[0]) for result in results), (numel, wrong)


@every_compressor
def test_looking_at_any_bytes_raises_payload_errors_only(compressor):
    generator = torch.Generator().manual_seed(14)
    for numel in (1, 65, 1000):
        payload = example(compressor, numel)
        for wrong in (*hostile(payload, generator, TRIALS), payload[:0], payload[:3]):
            for question in (compressor.check, compressor.payload_nbytes):
                try:
                    question(wrong, numel)
                except PayloadError:
                    pass


@every_compressor
def test_any_scale_decodes_alike(compressor):
    """Negative, not finite, -0 or subnormal: at every place where a payload may have one."""
    for numel in (65, 333):
        payload = example(compressor, numel)
        positions = {*range(0, min(len(payload), 4 * TRIALS), 1 if TRIALS > 6 else 3), max(0, len(payload) - 5)}
        for wrong in with_scales(payload, positions):
            results = []
            for backend in BACKENDS:
                with backends.use_backend(backend):
                    results.append(decoded(compressor, wrong, numel))
            assert all(same_outcome(result, results[0]) for result in results), (numel, wrong)


@pytest.fixture(scope="module")
def designs():
    """Those of polar, made once in a process, for which more is needed on the way."""
    return [design_at(index) for index in range(design_count())]


@every_compressor
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_allocates_in_proportion_to_what_it_returns(compressor, backend, designs):
    generator = torch.Generator().manual_seed(12)
    with backends.use_backend(backend):
        for numel in (1000, 8000 if backend == "reference" else 30000):
            payload = example(compressor, numel)
            decoded(compressor, payload, numel)  # makes tables and workspaces that stay
            for wrong in (payload, *hostile(payload, generator, TRIALS // 3)):
                with Allocations() as allocations:
                    decoded(compressor, wrong, numel)
                assert allocations.peak <= limit_of(compressor, backend, numel, wrong), (numel, wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_polar_is_told_of_it_believes_when_it_is_there(backend, designs):
    """Products and outliers: room was made for 20 times the entries that a few bytes claimed."""
    compressor, numel = from_spec("polar:rate=4"), 16000 if backend == "reference" else 40000
    with backends.use_backend(backend):
        decoded(compressor, example(compressor, numel), numel)
        for wrong in hostile_polar(numel, compressor.nbytes(numel)):
            with Allocations() as allocations:
                decoded(compressor, wrong, numel)
            assert allocations.peak <= limit_of(compressor, backend, numel, wrong), wrong[:40]


# Run by a fresh process, whose memory is limited to a little more than it has when it begins.
LIMITED = """
import resource, sys
import torch
from tests.compressors import COMPRESSORS
from gcompress import from_spec
from gcompress import backends
from tests.hostile import hostile, hostile_polar
from tests.test_hostile import decoded, example

torch.set_num_threads(1)
numel, generator, polar = 100_000, torch.Generator().manual_seed(13), from_spec("polar:rate=4")
payloads = {compressor: example(compressor, numel) for compressor in COMPRESSORS}
for compressor, payload in payloads.items():
    decoded(compressor, payload, numel)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
for compressor, payload in payloads.items():
    for wrong in hostile(payload, generator, 1):
        decoded(compressor, wrong, numel)
for backend in ("reference", "native"):
    with backends.use_backend(backend):
        for wrong in hostile_polar(numel, polar.nbytes(numel)):
            decoded(polar, wrong, numel)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="a process's memory is read from /proc")
def test_hostile_payloads_decode_where_memory_is_scarce():
    run = subprocess.run([sys.executable, "-c", LIMITED], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
