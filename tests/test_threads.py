"""Several threads: a large tensor has the same bytes and the same results with any number of them."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gcompress import PayloadError, backends, from_spec
from gcompress.backends import cpu
from gcompress.backends.calls import CallList, recorded
from tests.compressors import gauss, same_or_nan

pytestmark = pytest.mark.skipif(backends.cpu_kernels() is None, reason="the C++ kernels are not built here")
SHARE = cpu.LARGE // 2  # the fewest entries that a thread gets
SPECS = (
    "quantize:bits=4",
    "quantize:bits=3,bucket=4160",
    "quantize:bits=1,rounding=stochastic",
    "quantize:bits=5,bucket=0",
    "sign",
    "onebit",
    "mask:sparsity=0.99,bits=2",
    "mask:sparsity=0.3,bits=3",
    "mask:sparsity=0.99,bits=6,levels=lloyd",
    "mask:sparsity=0.9,bits=3,signed=false,levels=lloyd",
    "topk:sparsity=0.99",
    "topk:sparsity=0.3",
    "topk:sparsity=0.99,index=fixed",
    "topk:sparsity=0.99,index=bitmap",
    "topk:sparsity=0.999999",
    "topk:sparsity=0.99,chunk=4096,index=places",
    "fp16",
    "fp8",
    "mxfp4:bucket=16",
    "bf16:rounding=stochastic",
    "natural",
    "qsgd:bits=3",
    "ternary",
    "binmean:bits=3",
    "eden:bits=1",
    "eden:bits=3",
    "polar:rate=0.25",
    "polar:rate=0.1,list_size=2",
    "polar:rate=0.25,unbiased=true",
)


def inputs():
    """{name: (1-D float32, numbers of threads)}: just large enough, of no round size, and what breaks codecs."""
    just, numel = 2 * SHARE + 1, 7 * SHARE + 4321
    entries = gauss(numel)
    bad = entries[:just].clone()
    bad[5], bad[just // 2], bad[-1] = float("nan"), float("inf"), -float("inf")
    late = entries[:just].clone()
    late[-1] = float("inf")
    return {
        "just large": (entries[:just], (2,)),
        "not finite": (bad, (2,)),
        "not finite in the last share": (late, (2,)),
        "equal": (torch.full((just,), 0.3), (2,)),
        "gauss": (entries, (2, 7)),
        "ties": ((2 * entries).round(), (7,)),
        "one end": (torch.where(torch.arange(numel) < numel // 50, entries, 1e-3 * entries), (3,)),
    }


def with_threads(monkeypatch, threads):
    monkeypatch.setattr(cpu, "thread_count", lambda: threads)


def results(compressor, values, residual):
    """All that encoding and decoding makes."""
    payloads = [torch.empty(compressor.nbytes(values.numel()), dtype=torch.uint8) for _ in range(2)]
    compressor.encode_into(values, payloads[0], seed=5)
    compressor.encode_into(residual, payloads[1], seed=6)
    decoded, added, total = torch.empty_like(values), residual.clone(), torch.empty_like(values)
    compressor.decode_into(payloads[0], decoded)
    compressor.decode_into(payloads[0], added, add=True)
    compressor.decode_sum([*payloads, payloads[0]], total, factor=0.3)
    found = [*payloads, decoded, added, total]
    kernels = backends.kernels(values, compressor)
    if kernels.keeps_residual_with(compressor.kernels):
        for before in (0, residual.data_ptr()):
            fresh, flag = torch.empty_like(values), torch.zeros(1, dtype=torch.int32)
            remembering = kernels.remembering(before, fresh.data_ptr(), flag.data_ptr())
            found += [compressor.encode_with(remembering, values, 5), fresh, flag]
    return found


# How shares are cut does not depend on the instruction set; how their last blocks are packed does.
BEST, *OTHERS = reversed(backends.available_backends()[1:] or ["none"])
CASES = [(spec, BEST) for spec in SPECS] + [(spec, isa) for isa in OTHERS for spec in SPECS[::3]]


@pytest.mark.parametrize("spec, isa", CASES)
def test_any_number_of_threads_makes_the_same_bytes(spec, isa, monkeypatch):
    compressor = from_spec(spec)
    for name, (values, numbers) in inputs().items():
        residual = gauss(values.numel(), seed=1)
        with backends.use_backend(isa):
            with_threads(monkeypatch, 1)
            expected = results(compressor, values, residual)
            for threads in numbers:
                with_threads(monkeypatch, threads)
                for one, other in zip(results(compressor, values, residual), expected, strict=True):
                    assert same_or_nan(one, other), (name, threads)


@pytest.mark.parametrize("shape", [(2048, 1024), (1031, 777)])
@pytest.mark.parametrize("spec", ["polar:rate=0.25", "polar:rate=1,rank=0"])
def test_a_matrix_has_the_same_bytes_too(spec, shape, monkeypatch):
    tensor = gauss(*shape) * torch.exp(gauss(shape[0], 1, seed=1)) * torch.exp(gauss(shape[1], seed=2))
    tensor[torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 1e-4] *= 100
    compressor, found = from_spec(spec), []
    for threads in (1, 2, 3, 7):
        with_threads(monkeypatch, threads)
        payload, ctx = compressor.compress(tensor)
        found.append((payload, compressor.decompress(payload, ctx)))
    assert all(payload.equal(found[0][0]) and decoded.equal(found[0][1]) for payload, decoded in found)


@pytest.mark.parametrize("spec", ["mask:sparsity=0.99,bits=3", "topk:sparsity=0.99", "topk:sparsity=0.9,index=bitmap"])
def test_an_index_that_does_not_fit_is_refused_by_every_thread_alike(spec, monkeypatch):
    compressor, values, out = from_spec(spec), gauss(4 * SHARE), torch.empty(4 * SHARE)
    payload, _ = compressor.compress(values)
    for place in (-1, -2 * SHARE // 16, -1000, 4 * (values.numel() // 100) + 9000):
        bad = payload.clone()
        bad[place] ^= 0xFF
        refused = []
        for threads in (1, 2, 3, 7):
            with_threads(monkeypatch, threads)
            try:
                compressor.decode_into(bad, out)
                refused.append(False)
            except PayloadError:
                refused.append(True)
        assert len(set(refused)) == 1


def test_calls_from_two_threads_at_once_do_not_meet(monkeypatch):
    compressor = from_spec("topk:sparsity=0.99")
    tensors = [gauss(3 * SHARE + 77, seed=seed) for seed in range(4)]
    with_threads(monkeypatch, 1)
    expected = [compressor.compress(tensor)[0] for tensor in tensors]
    with_threads(monkeypatch, 3)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda each: compressor.compress(each)[0], 4 * tensors))
    assert all(payload.equal(other) for payload, other in zip(found, 4 * expected, strict=True))


@pytest.mark.parametrize("numel, large", [(cpu.LARGE - 1, False), (cpu.LARGE + 1, True)])
def test_calls_that_were_noted_have_threads_if_they_are_large(numel, large, monkeypatch):
    compressor, values, kernels = from_spec("quantize:bits=3"), gauss(numel), backends.cpu_kernels()
    expected, found = (torch.empty(compressor.nbytes(numel), dtype=torch.uint8) for _ in range(2))
    with_threads(monkeypatch, 1)
    compressor.encode_into(values, expected)
    with_threads(monkeypatch, 2)
    calls = CallList(
        kernels, [recorded(kernels, lambda to: compressor._encode_native(to, values, found, 0), "gc_memory")]
    )
    calls.set("x", values.data_ptr())
    calls.set("payload", found.data_ptr())
    calls.run()
    assert found.equal(expected) and calls.has("threads") == large


def test_a_process_may_fork_after_threads_were_used(monkeypatch):
    compressor, values = from_spec("quantize:bits=4"), gauss(3 * SHARE)
    with_threads(monkeypatch, 3)
    expected, found = (torch.empty(compressor.nbytes(values.numel()), dtype=torch.uint8) for _ in range(2))
    compressor.encode_into(values, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside threads
        child = os.fork()
    if child == 0:
        compressor.encode_into(values, found)
        os._exit(found.numpy().tobytes() != expected.numpy().tobytes())
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "torch_threads, cores, environment, expected",
    [
        (8, 8, {}, 8),
        (4, 8, {}, 4),
        (8, 2, {}, 2),
        (8, 8, {"LOCAL_WORLD_SIZE": "4"}, 2),
        (8, 8, {"HOROVOD_LOCAL_SIZE": "3"}, 2),
        (8, 8, {"LOCAL_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 1),
        (8, 1, {"BYTEPS_LOCAL_SIZE": "2"}, 1),
        (8, 8, {"LOCAL_WORLD_SIZE": "no number"}, 8),
    ],
)
def test_ranks_that_share_cores_get_their_part_of_them(torch_threads, cores, environment, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name in cpu.LOCAL_SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cpu.thread_count() == expected


def test_a_small_tensor_asks_for_no_threads(monkeypatch):
    def asked():
        raise AssertionError("asked how many threads there may be")

    monkeypatch.setattr(cpu, "thread_count", asked)
    compressor = from_spec("sign")
    compressor.decompress(*compressor.compress(gauss(cpu.LARGE - 1)))
