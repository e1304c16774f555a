"""The kernels of polar for the GPU on the host, beyond the laws of test_cuda.py: matrices, all rates, all blocks."""

import ctypes
import math
import subprocess

import pytest
import torch

from gcompress import Polar, backends
from gcompress.backends.gpu.plans import DeviceKernels
from gcompress.compressors.polar import device, outliers, reference
from gcompress.compressors.polar.bits import PolarCode
from gcompress.compressors.polar.device import DevicePolar
from gcompress.compressors.polar.layout import Layout
from gcompress.compressors.polar.native import NativePolar
from gcompress.feedback import ErrorFeedback
from tests import emulation
from tests.compressors import gauss
from tests.test_cuda import BUILD, check_bytes, needs_compiler

pytestmark = needs_compiler


@pytest.fixture
def launcher():
    return emulation.EmulatedLauncher(emulation.build(BUILD))


def spread(shape, seed=0):
    """Rows and columns of very different deviations, and some entries far beyond them."""
    rows, columns = gauss(shape[:1], seed=seed + 1).mul(1.5).exp(), gauss(shape[1:], seed=seed + 2).mul(1.5).exp()
    return gauss(shape, seed=seed) * rows.view(-1, *[1] * (len(shape) - 1)) * columns


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.55, 0.7, 1.0, 1.4, 1.9, 2.4, 3.0, 3.6, 4.0])
def test_every_rate_makes_the_bytes_of_the_cpu(rate, launcher):
    table = DeviceKernels(launcher)
    for tensor in (gauss(4000), spread((67, 130)), spread((20, 300), 5)):
        check_bytes(Polar(rate=rate, block=256, floor=0), table, tensor, (rate, tensor.shape))
    check_bytes(Polar(rate=rate, block=256, unbiased=True), table, gauss(4000), (rate, "unbiased"))


@pytest.mark.parametrize("scales", ["rowcol", "chunk", "tensor"])
@pytest.mark.parametrize("shape", [(16, 16), (17, 1100), (129, 33), (65, 4, 9), (40, 260), (1100, 16)], ids=str)
def test_matrices_make_the_bytes_of_the_cpu(shape, scales, launcher):
    """With rows and columns of no share (codes 0), rows of zeros, and outliers."""
    tensor = spread(shape, 9)
    tensor[3] = 0
    for rate, share in ((0.2, 0.0), (1.5, "auto"), (1.5, 0.05)):
        compressor = Polar(rate=rate, block=512, scales=scales, outliers=share, rank=0, floor=0)
        check_bytes(compressor, DeviceKernels(launcher), tensor, (rate, share))


def test_a_product_apart_makes_the_bytes_of_the_cpu(launcher):
    tensor = gauss((90, 3), seed=1) @ gauss((3, 110), seed=2) + 0.1 * gauss((90, 110), seed=3)
    check_bytes(Polar(rate=1.0, block=256), DeviceKernels(launcher), tensor, "product")


@pytest.mark.parametrize("list_size", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 256, 512, 2048])
def test_codewords_are_those_of_the_reference(block, list_size, launcher):
    """Of samples that leave ties, with every number of information bits near the ends and some between."""
    backend = DevicePolar(DeviceKernels(launcher))
    samples = torch.randint(-127, 128, (8 * block,), generator=torch.Generator().manual_seed(block)).to(torch.int8)
    few = {1, 3, block // 4, block // 2, block - 1, block} if block < 512 else {7, block // 2}
    for information in few:
        for part in (samples, samples // 50):  # ties
            spending = PolarCode(block, information)._spending(8)
            expected, products = reference.encode_samples(part, spending, list_size)
            words, dots = backend.encode_samples(part, spending, list_size)
            assert torch.equal(words, expected) and dots[0][0] == products[0][0], (information, list_size)


@pytest.mark.parametrize("list_size", [1, 2])
def test_the_longest_blocks_make_the_bytes_of_the_cpu(list_size, launcher):
    """16384 positions of 64 lanes, with a list 4096."""
    numel = 64 * 8193 if list_size == 1 else 64 * 2049
    compressor = Polar(rate=0.5, block=16384, list_size=list_size, outliers=0.0)
    check_bytes(compressor, DeviceKernels(launcher), gauss(numel), list_size)


def test_samples_as_they_are_and_more_bits_than_shared_memory_holds(launcher, monkeypatch):
    tensor = torch.cat([gauss((36, 256)) * 1000, gauss((60, 256), seed=1)])
    compressor = Polar(rate=3.0, block=512, scales="chunk", outliers=0.0, floor=0)
    for most in (64 << 10, 1024):
        monkeypatch.setattr(device, "DECODE_SHARED", most)
        check_bytes(compressor, DeviceKernels(launcher), tensor, most)


@pytest.mark.parametrize("blocks", [1, 2, 6, 256])
def test_a_tile_of_the_real_size(blocks, launcher, monkeypatch):
    """4096 rows of 64 lanes, and a tail, whatever the number of thread blocks that share a tile."""
    monkeypatch.setattr(device, "ENOUGH_BLOCKS", blocks)
    check_bytes(Polar(rate=0.5 if blocks < 256 else 2.0), DeviceKernels(launcher), gauss(4096 * 64 + 17), blocks)


def test_outliers_are_those_that_reach_their_limit(launcher):
    """Also by nothing."""
    backend, host = DevicePolar(DeviceKernels(launcher)), NativePolar(backends.cpu_kernels())
    values = torch.randint(-9, 10, (9000,), generator=torch.Generator().manual_seed(2)).float()
    layout = Layout(9000, 9000, None, None)
    for floor in (5.0, 8.0, 9.0, 9.5):
        limits = outliers.Limits(floor, 0.0)
        places = backend.beyond(values, layout, limits, 0)
        assert torch.equal(places, host.beyond(values, layout, limits, 0))
        assert torch.equal(places, torch.nonzero(values.abs() >= floor).view(-1))


def test_the_code_for_bits_uses_the_kernels(launcher):
    bits = (gauss(70 * 256) > 0).to(torch.uint8)
    code = PolarCode(256, 100)
    payload = code.compress(bits)
    expected = code.decompress(payload, bits.numel())
    with backends.use_backend(DeviceKernels(launcher)):
        assert torch.equal(code.compress(bits), payload)
        assert torch.equal(code.decompress(payload, bits.numel()), expected)
    assert {"polar_encode", "polar_decode"} <= launcher.launched


def test_sums_have_the_order_of_the_cpu(launcher):
    """Floats of very different sizes, whose sums show every other order."""
    backend, host = DevicePolar(DeviceKernels(launcher)), NativePolar(backends.cpu_kernels())
    for shape in ((1, 7), (5, 16), (9, 300), (300, 17), (3, 4100)):
        values = torch.exp(5 * gauss(shape)).view(-1)
        for by_column in (False, True):
            found = backend.sums(values, shape[1], by_column)
            for own, other in zip(found, host.sums(values, shape[1], by_column), strict=True):
                assert (own is None) == (other is None) and (own is None or bool((own == other).all()))
    short = backend.sums(gauss(1000), 256, False)[0]  # a last row that is not whole
    assert bool((short == host.sums(gauss(1000), 256, False)[0]).all())


def test_error_feedback_keeps_a_matrix_a_matrix(launcher):
    """Its scales by row and column, and so its bytes, are those of the CPU."""
    expected, fused = ErrorFeedback(), ErrorFeedback()
    compressor = Polar(rate=1.0, block=64, rank=0)
    for step in range(3):
        gradient = spread((40, 50), step)
        payload, _ = expected.compress("w", gradient, compressor, seed=step)
        with backends.use_backend(DeviceKernels(launcher)):
            assert torch.equal(fused.compress("w", gradient, compressor, seed=step)[0], payload)
        assert torch.equal(fused.residual("w"), expected.residual("w"))


def test_bytes_of_four_at_once_are_those_of_one(tmp_path):
    """The words of four of csrc/arith/polar.h, for every pair of bytes."""
    source = tmp_path / "four.cc"
    header = emulation.sources.folder() / "arith" / "polar.h"
    source.write_text(
        f'#include "{header}"\n'
        'extern "C" unsigned check(unsigned a, unsigned b) { return four_check_nodes(a, b); }\n'
        'extern "C" unsigned variable(unsigned a, unsigned b, unsigned c) { return four_variable_nodes(a, b, c); }\n'
    )
    command = [emulation.COMPILER, "-O1", "-w", "-shared", "-fPIC", "-o", tmp_path / "four.so", source]
    subprocess.run(command, check=True)
    four = ctypes.CDLL(str(tmp_path / "four.so"))
    four.check.restype = four.variable.restype = ctypes.c_uint
    for a in range(-128, 128):
        for b in range(-128, 128, 4):
            bytes_a = [a, -a if a > -128 else 127, (a * 7 + 3) % 256 - 128, 127]
            bytes_b = [b, b + 1, b + 2, b + 3]
            words = [int.from_bytes(bytes(v & 255 for v in part), "little") for part in (bytes_a, bytes_b)]
            bits = [(a + b + k >> 2) & 1 for k in range(4)]
            check = [math.copysign(min(abs(x), abs(y), 127), x * y) for x, y in zip(bytes_a, bytes_b, strict=True)]
            total = [y - x if c else y + x for x, y, c in zip(bytes_a, bytes_b, bits, strict=True)]
            assert signed(four.check(*words)) == check
            expected = [max(-128, min(127, value)) for value in total]
            assert signed(four.variable(*words, sum(c << 8 * k for k, c in enumerate(bits)))) == expected


def signed(word):
    return [((word >> 8 * k & 255) ^ 128) - 128 for k in range(4)]
