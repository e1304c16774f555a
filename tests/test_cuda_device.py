"""The laws on this machine's GPU: `make test-gpu`. Without one they are skipped, saying why."""

import os
import threading

import pytest
import torch

from gcompress import PayloadError, Quantize, backends, from_spec
from gcompress.backends import gpu
from gcompress.backends.gpu.plans import DeviceKernels
from gcompress.feedback import ErrorFeedback
from tests.compressors import COMPRESSORS, SIZES, inputs, poisoned, same_or_nan

ACTIVE, REASON = gpu.status()
REQUIRED = bool(os.environ.get("GCOMPRESS_REQUIRE_GPU"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ACTIVE and not REQUIRED, reason=REASON)]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
ON_DEVICE = [compressor for compressor in COMPRESSORS if backends.provides(DeviceKernels, compressor)]
# Those that never ask the device for a number; the encoder of lowrank is torch's, and polar plans on the host.
ASYNCHRONOUS = [
    compressor
    for compressor in ON_DEVICE
    if compressor.fixed_size
    and not any(name in str(compressor) for name in ("threshold", "entropy", "lowrank", "polar"))
]


def test_the_kernels_are_in_use():
    assert ACTIVE, REASON
    assert backends.kernels(torch.zeros(1, device="cuda"), Quantize) is not None


@pytest.mark.parametrize("spec", [str(compressor) for compressor in COMPRESSORS if compressor.name == "lowrank"])
def test_lowrank_is_as_near_as_on_the_cpu(spec):
    """Its sums in double precision come in another order, which shows where they cancel: no bytes are compared."""
    compressor = from_spec(spec)
    for numel in SIZES:
        for name, tensor in inputs(numel).items():
            expected = compressor.decompress(*compressor.compress(tensor, seed=7))
            payload, ctx = compressor.compress(tensor.cuda(), seed=7)
            decoded = compressor.decompress(payload, ctx).cpu()
            assert (decoded - expected).abs().max() <= 1e-5 * tensor.abs().max(), (numel, name)


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.name != "lowrank"], ids=str)
def test_the_bytes_are_those_of_the_cpu(compressor):
    for numel in SIZES:
        for name, tensor in {**inputs(numel), **poisoned(numel)}.items():
            payload, ctx = compressor.compress(tensor, seed=7)
            decoded, total = compressor.decompress(payload, ctx), torch.ones(numel)
            compressor.decode_into(payload, total, add=True)
            on_device, _ = compressor.compress(tensor.cuda(), seed=7)
            assert on_device.is_cuda and torch.equal(on_device.cpu(), payload), (numel, name)
            assert same_or_nan(compressor.decompress(payload.cuda(), ctx).cpu(), decoded), (numel, name)
            own_total = torch.ones(numel, device="cuda")
            compressor.decode_into(payload.cuda(), own_total, add=True)
            assert same_or_nan(own_total.cpu(), total), (numel, name)


@pytest.mark.parametrize("compressor", ON_DEVICE, ids=str)
def test_sixteen_million_entries_and_seven(compressor):
    tensor = torch.randn(2**24 + 7, generator=torch.Generator().manual_seed(5))
    payload, ctx = compressor.compress(tensor, seed=7)
    on_device, _ = compressor.compress(tensor.cuda(), seed=7)
    assert torch.equal(on_device.cpu(), payload)
    assert same_or_nan(compressor.decompress(on_device, ctx).cpu(), compressor.decompress(payload, ctx))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("compressor", ASYNCHRONOUS, ids=str)
def test_nothing_waits_for_the_device(compressor):
    tensor, out = torch.randn(70001, device="cuda"), torch.empty(70001, device="cuda")
    payload, _ = compressor.compress(tensor)  # compiles
    compressor.decode_into(payload, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        payload, _ = compressor.compress(tensor)
        compressor.decode_into(payload, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compressor", ASYNCHRONOUS, ids=str)
def test_encoding_and_decoding_are_captured_in_a_graph(compressor):
    tensor, out = torch.randn(70001, device="cuda"), torch.empty(70001, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, on the stream that is captured
        compressor.decode_into(compressor.compress(tensor)[0], out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        payload, _ = compressor.compress(tensor)
        compressor.decode_into(payload, out)
    tensor.copy_(torch.randn(70001, generator=torch.Generator().manual_seed(9)))
    graph.replay()
    torch.cuda.synchronize()
    expected, ctx = compressor.compress(tensor.cpu())
    assert torch.equal(payload.cpu(), expected)
    assert same_or_nan(out.cpu(), compressor.decompress(expected, ctx))


@pytest.mark.parametrize("spec", sorted({compressor.name for compressor in ON_DEVICE} - {"lowrank"}))
def test_error_feedback_is_that_of_the_cpu(spec):
    compressor, expected, fused = from_spec(spec), ErrorFeedback(), ErrorFeedback()
    for step in range(5):
        gradient = inputs(8200, seed=step)["heavy"]
        if step == 2:
            gradient[17] = float("inf")
        payload, _ = expected.compress("w", gradient, compressor, seed=step)
        on_device, _ = fused.compress("w", gradient.cuda(), compressor, seed=step)
        assert torch.equal(on_device.cpu(), payload)
        assert same_or_nan(fused.residual("w").cpu(), expected.residual("w"))


@every_compressor
def test_damaged_bytes_decode_or_are_refused_but_never_crash(compressor):
    generator = torch.Generator().manual_seed(3)
    payload, _ = compressor.compress(torch.randn(333, generator=generator))
    out = torch.empty(333, device="cuda")
    for trial in range(60):
        damaged = payload.clone()
        positions = torch.randint(0, len(payload), (1 + trial % 5,), generator=generator)
        damaged[positions] = torch.randint(0, 256, positions.shape, generator=generator).to(torch.uint8)
        try:
            compressor.decode_into(damaged.cuda(), out)
        except PayloadError:
            pass
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "spec", ["polar:rate=0.5", "polar:rate=2.0,outliers=0.01", "polar:rate=1.0,list_size=4,rank=0"]
)
@pytest.mark.parametrize("shape", [(64, 64), (1000, 300), (257, 3, 40), (3000, 4096)], ids=str)
def test_a_matrix_is_polar_coded_to_the_bytes_of_the_cpu(shape, spec):
    """Scales by row and column, strong products, all tiles, and what one entry has of several parts."""
    generator = torch.Generator().manual_seed(6)
    noise, rows = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator).exp()
    tensor = noise * rows.view(-1, *[1] * (len(shape) - 1)) * torch.randn(shape[-1], generator=generator).exp()
    compressor = from_spec(spec)
    payload, ctx = compressor.compress(tensor)
    on_device, _ = compressor.compress(tensor.cuda())
    assert torch.equal(on_device.cpu(), payload)
    assert same_or_nan(compressor.decompress(on_device, ctx).cpu(), compressor.decompress(payload, ctx))


def test_a_new_thread_has_the_same_kernels():
    tensor, made = torch.randn(5000, device="cuda"), []
    compressor = Quantize(bits=4)
    thread = threading.Thread(target=lambda: made.append(compressor.compress(tensor)[0]))
    thread.start()
    thread.join()
    assert torch.equal(made[0], compressor.compress(tensor)[0])


def test_half_precision_and_strides_come_back():
    base = torch.randn(6, 50, device="cuda").half()
    for tensor in (base, base.t(), base[:, ::3], base[:0]):
        decoded = from_spec("quantize:bits=8").decompress(*from_spec("quantize:bits=8").compress(tensor))
        assert decoded.shape == tensor.shape and decoded.dtype == tensor.dtype and decoded.is_cuda
