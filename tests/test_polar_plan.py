"""The plan of polar in C++ (csrc/polar/plan/) and in Python: the same bytes, and the same payloads are refused."""

import itertools
import threading

import pytest
import torch

from gcompress import PayloadError, Polar, backends
from gcompress.backends import calls
from gcompress.compressors.polar import coding, products, reference, whole
from gcompress.compressors.polar.native import NativePolar
from tests.compressors import gauss, inputs, poisoned

ISAS = backends.available_backends()[1:]
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
SHAPES = ((1,), (300,), (2048,), (9001,), (70_000,), (40, 3, 50), (64, 200), (200, 64), (17, 1000), (512, 96))
OPTIONS = (
    {"rate": 0.1, "floor": 0},
    {"rate": 0.25, "block": 1024},
    {"rate": 0.5, "allocation": "flat"},
    {"rate": 1.0, "outliers": 0.02, "rank": 2},
    {"rate": 1.7, "scales": "chunk", "block": 256},
    {"rate": 2.5, "list_size": 2, "block": 64},
    {"rate": 4.0, "rank": 0},
    {"rate": 0.7, "unbiased": True},
)


def adversaries(shape):
    """What plans stumble over: outliers, products, zeros, scales of any size."""
    first, rest = shape[0], torch.Size(shape[1:]).numel()
    entries = gauss(*shape)
    rows, columns = gauss(first, 1, seed=1), gauss(1, rest, seed=2)
    matrix = entries.view(first, rest)
    one_huge = entries.clone()
    one_huge.view(-1)[entries.numel() // 2] = 1e12
    yield entries
    yield one_huge
    yield entries / gauss(3, *shape, seed=3).square().mean(0).sqrt()
    yield torch.where(gauss(*shape, seed=4) > 2, entries * 1e3, 0.0)
    yield (rows * columns).view(shape)
    yield (rows * columns + 0.2 * gauss(first, 1, seed=6) * gauss(1, rest, seed=7) + 0.05 * matrix).view(shape)
    yield (matrix * torch.exp(2 * rows) * torch.exp(2 * columns)).view(shape)
    yield (matrix * (rows > 1)).view(shape)
    yield entries * 1e-26
    yield entries * 1e36


def bits_of(values):
    return torch.where(values.isnan(), 0, values.view(torch.int32))


def check(compressor, tensor, isas=ISAS):
    with backends.use_backend(ISAS[-1]):  # the plan in Python, whose steps are kernels
        steps = NativePolar(backends.cpu_kernels())
    expected = torch.empty(compressor.nbytes(tensor.numel()), dtype=torch.uint8)
    compressor._encode(steps, tensor.contiguous(), expected, 5)
    decoded = torch.ones(tensor.numel())
    coding.decode_into(steps, expected, decoded, True, compressor.block)
    for isa in isas:
        with backends.use_backend(isa):
            payload, _ = compressor.compress(tensor, seed=5)
            assert torch.equal(payload, expected), (compressor, tuple(tensor.shape), isa)
            found = torch.ones(tensor.numel())
            compressor.decode_into(payload, found, add=True)
            assert torch.equal(bits_of(found), bits_of(decoded)), (compressor, tuple(tensor.shape), isa)
    return int(expected[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_plans_make_the_same_bytes(options):
    compressor, flags = Polar(**options), set()
    for number, (shape, k) in enumerate(itertools.product(SHAPES, range(10))):
        tensor = next(itertools.islice(adversaries(shape), k, None))
        flags.add(check(compressor, tensor, [ISAS[number % len(ISAS)]]))
    assert len(flags) > 2 or options.get("unbiased")


@pytest.mark.parametrize("numel", [1, 65, 1023, 8192])
def test_both_plans_agree_about_inputs_that_break_codecs(numel):
    for tensor in [*inputs(numel).values(), *poisoned(numel).values()]:
        for shape in ((numel,), (16, numel // 16)) if numel % 16 == 0 else ((numel,),):
            check(Polar(rate=0.5), tensor.view(shape), ISAS[-1:])
            check(Polar(rate=0.5, unbiased=True), tensor.view(shape), ISAS[:1])


def test_a_larger_matrix_of_low_rank():
    matrix = gauss(1024, 4) @ gauss(4, 600, seed=1) + 0.3 * gauss(1024, 600, seed=2)
    assert check(Polar(rate=0.25), matrix) & 32
    assert check(Polar(rate=0.25), matrix.t().contiguous()) & 32


@pytest.mark.parametrize("rate", [0.25, 1.0, 3.0])
def test_the_same_damaged_payloads_are_refused(rate):
    """One byte, or some, of payloads with all that a payload may have."""
    generator = torch.Generator().manual_seed(9)
    compressor, refused, total = Polar(rate=rate, block=256, floor=0), 0, 0
    for k in (2, 3, 5, 6):
        tensor = next(itertools.islice(adversaries((64, 200)), k, None))
        payload, _ = compressor.compress(tensor)
        for trial in range(80):
            damaged = payload.clone()
            for _ in range(1 + trial % 3):
                ends = (40, len(payload))[trial % 2]
                at = int(torch.randint(0, ends, (), generator=generator))
                damaged[-1 - at if trial % 5 == 0 else at] = torch.randint(0, 256, (), generator=generator)
            expected = torch.ones(tensor.numel())
            try:
                coding.decode_into(reference, damaged, expected, True, compressor.block)
            except PayloadError as error:
                refused += 1
                with pytest.raises(PayloadError) as found:
                    compressor.decode_into(damaged, torch.ones(tensor.numel()), add=True)
                assert str(found.value) == str(error)
                continue
            total += 1
            values = torch.ones(tensor.numel())
            compressor.decode_into(damaged, values, add=True)
            assert torch.equal(bits_of(values), bits_of(expected))
    assert refused > 20 and total > 20


def remembered(compressor, tensor, residual, in_place):
    """(payload, new residual, whether it is not finite) of an encoder that remembers."""
    old, flag = residual.clone(), torch.zeros(1, dtype=torch.int32)
    fresh = old if in_place else torch.full_like(old, 9.0)
    remembering = backends.cpu_kernels().remembering(old.data_ptr(), fresh.data_ptr(), flag.data_ptr())
    payload = compressor.encode_with(remembering, tensor.contiguous(), 5)
    assert in_place or torch.equal(bits_of(old), bits_of(residual))
    return payload, fresh, bool(flag)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_remembered_is_what_the_payload_loses(options, isa, monkeypatch):
    """To the bit, of products, outliers and all else, in its place or not, and if the workspace must grow."""
    compressor = Polar(**options)
    with backends.use_backend(ISAS[-1]):
        steps = NativePolar(backends.cpu_kernels())
    for shape in ((1,), (300,), (40, 3, 50), (200, 64)):
        tensors = *adversaries(shape), torch.zeros(shape), torch.full(shape, float("nan"))
        for number, tensor in enumerate(tensors):
            residual = torch.where(gauss(*shape, seed=9) > 0, 0.3 * tensor.flip(0).nan_to_num(0), torch.tensor(-0.0))
            corrected = tensor + residual
            expected, lost = (
                torch.empty(compressor.nbytes(tensor.numel()), dtype=torch.uint8),
                corrected.clone().view(-1),
            )
            compressor._encode(steps, corrected, expected, 5)
            sent = torch.empty_like(lost)
            coding.decode_into(steps, expected, sent, False, compressor.block)
            lost -= sent
            for in_place, small in ((False, False), (True, False), (True, True)):
                with backends.use_backend(isa), monkeypatch.context() as patch:
                    if small:
                        patch.setattr(whole, "ENCODER_ROOM", 1 << 10)
                        patch.setattr(whole, "DECODER_ROOM", 1 << 10)
                        patch.setattr(calls, "_local", threading.local())
                    payload, fresh, flag = remembered(compressor, tensor, residual, in_place)
                assert torch.equal(payload, expected), (shape, number, in_place, small)
                assert flag == (not lost.isfinite().all()), (shape, number)
                assert flag or torch.equal(fresh.view(torch.int32).view(-1), lost.view(torch.int32)), (shape, number)


@pytest.mark.parametrize("rate", [0.1, 0.25, 1])
def test_a_product_that_only_a_sample_shows_is_not_made(rate):
    """Of matrices that are searched by a sample: the same choice in Python, and noise ends with the sample."""
    noise, directions = gauss(700, 400), gauss(700, 4) @ gauss(4, 400, seed=1)
    searched = []
    for strength in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
        tensor = noise + strength * directions
        check(Polar(rate=rate), tensor)
        total = float(tensor.abs().double().sum())
        searched.append(
            products.find(tensor, total, 700 * 400 * rate / 8, lambda bits: 2 ** (-2 * bits / 280_000), "auto")
        )
    assert searched[0] is None and searched[-1] is not None


def test_a_workspace_grows_to_what_is_needed(monkeypatch):
    tensor = gauss(300, 500)
    expected, ctx = Polar(rate=1).compress(tensor)
    decoded = Polar(rate=1).decompress(expected, ctx)
    monkeypatch.setattr(whole, "ENCODER_ROOM", 1 << 10)
    monkeypatch.setattr(whole, "DECODER_ROOM", 1 << 10)
    monkeypatch.setattr(calls, "_local", threading.local())
    payload, ctx = Polar(rate=1).compress(tensor)
    assert torch.equal(payload, expected)
    monkeypatch.setattr(calls, "_local", threading.local())
    assert torch.equal(Polar(rate=1).decompress(payload, ctx), decoded)


def test_threads_that_come_first_together_make_the_same_bytes():
    tensor, found = gauss(120, 80), []
    expected, _ = Polar(rate=0.5).compress(tensor)

    def run(barrier):
        barrier.wait()
        payload, ctx = Polar(rate=0.5).compress(tensor)
        found.append(torch.equal(payload, expected) and bool(Polar(rate=0.5).decompress(payload, ctx).any()))

    for _ in range(5):
        whole._tables.cache_clear()
        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=run, args=(barrier,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 20
