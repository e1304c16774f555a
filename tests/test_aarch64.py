"""The kernels as a 64-bit ARM processor runs them, by an emulator: NEON's and the portable ones give the same bytes.

Needs Debian's g++-aarch64-linux-gnu and qemu-user, and a few minutes for the first build, which is kept in build/.
"""

import base64
import shutil

import pytest
import torch

from gcompress import backends, from_spec
from gcompress.feedback import ErrorFeedback
from tests.compressors import COMPRESSORS, inputs, poisoned, same_or_nan
from tests.foreign_kernels import ForeignKernels, built_for
from tests.test_golden import FIXTURES, SEED, golden_input

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ISAS = {"portable": [], "neon": ["-DGC_NEON"]}

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no cross compiler (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(not EMULATOR, reason="no emulator (Debian: qemu-user)"),
    pytest.mark.skipif(backends.cpu_kernels() is None, reason="the C++ kernels are not built here"),
]


@pytest.fixture(scope="module", params=ISAS)
def kernels(request):
    with ForeignKernels([EMULATOR, built_for(COMPILER, ISAS), request.param]) as kernels:
        yield kernels


every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)


@pytest.mark.parametrize("spec", FIXTURES)
def test_golden_payloads_are_those_of_arm(kernels, spec):
    compressor, expected = from_spec(spec), FIXTURES[spec]
    with backends.use_backend(kernels):
        payload, ctx = compressor.compress(golden_input(), seed=SEED)
        decoded = compressor.decompress(payload, ctx)
    assert base64.b64encode(bytes(payload.tolist())).decode() == expected["payload"]
    assert base64.b64encode(bytes(decoded.view(torch.uint8).tolist())).decode() == expected["decoded"]


@every_compressor
def test_arm_bytes_are_the_bytes_of_this_processor(kernels, compressor):
    """For encoding, decoding and adding, on sizes around those of vectors and on inputs that break codecs."""
    before = kernels.calls
    for numel in (1, 63, 129, 1023, 8200):
        for name, tensor in {**inputs(numel), **poisoned(numel)}.items():
            if numel > 1023 and name not in ("heavy", "ties", "near largest", "many"):
                continue  # what smaller sizes have shown, at most of this test's time
            payload, ctx = compressor.compress(tensor, seed=7)
            decoded = compressor.decompress(payload, ctx)
            with backends.use_backend(kernels):
                assert torch.equal(compressor.compress(tensor, seed=7)[0], payload), (numel, name)
                total = torch.ones(numel)
                compressor.decode_into(payload, total, add=True)
                assert same_or_nan(total, torch.ones(numel) + decoded), (numel, name)
                assert same_or_nan(compressor.decompress(payload, ctx), decoded), (numel, name)
    assert kernels.calls > before or compressor.kernels is None, "the emulated kernels have run"


@every_compressor
def test_arm_keeps_and_adds_up_what_this_processor_does(kernels, compressor):
    gradients = [inputs(1023, seed=0)["heavy"], poisoned(1023)["one inf"], inputs(1023, seed=1)["gauss"]]
    found = []
    for backend in (backends.backend(), kernels):
        with backends.use_backend(backend):
            feedback, steps = ErrorFeedback(), []
            for step, gradient in enumerate(gradients):
                steps.append(feedback.compress("w", gradient, compressor, seed=step)[0])
            out = torch.empty(1023)
            compressor.decode_sum([steps[each] for each in (0, 2, 0, 2)], out, 0.3)
            found.append((steps, feedback.residual("w"), out))
    (expected, residual, total), (steps, foreign_residual, out) = found
    assert all(torch.equal(one, other) for one, other in zip(steps, expected, strict=True))
    assert residual is None if foreign_residual is None else same_or_nan(residual, foreign_residual)
    assert same_or_nan(out, total)
