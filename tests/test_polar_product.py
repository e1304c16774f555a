"""The strongest outer products of a matrix, which the polar code sends apart."""

import hashlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcompress import Polar, backends
from gcompress.compressors.polar import products, reference
from tests.compressors import gauss, refusals

PRODUCT = 32


def low_rank(rows, columns, rank, noise, seed=0):
    """Components of falling strength, over noise of this deviation."""
    strengths = 0.7 ** torch.arange(rank)
    return (gauss(rows, rank, seed=seed) * strengths) @ gauss(rank, columns, seed=seed + 1) + noise * gauss(
        rows, columns, seed=seed + 2
    )


def integers(rows, columns):
    """Rank two and something, from integer arithmetic, so that no generator's change moves them."""
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    noise = (i * 7919 + j * 104729 + i * j * 31) % 101 - 50
    return ((i % 17 - 8) * (j % 13 - 6) * 8 + (i * i % 23 - 11) * (j * j % 19 - 9) * 3 + noise).float() / 64


def error_of(tensor, compressor):
    payload, ctx = compressor.compress(tensor)
    assert payload.numel() == compressor.nbytes(tensor.numel())
    difference = compressor.decompress(payload, ctx) - tensor
    return float(difference.double().square().sum() / tensor.double().square().sum()), int(payload[0])


@pytest.mark.parametrize("rate", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("shape", [(256, 512), (600, 128), (64, 3, 5, 64), (32, 9000)])
def test_a_matrix_of_low_rank_errs_less(shape, rate):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    matrix = low_rank(rows, columns, 3, 0.5).view(shape)
    error, flags = error_of(matrix, Polar(rate=rate))
    without, _ = error_of(matrix, Polar(rate=rate, rank=0))
    assert flags & PRODUCT
    assert error < 0.6 * without


def test_rank_is_a_limit():
    matrix = low_rank(256, 512, 6, 0.1)
    errors = [error_of(matrix, Polar(rate=1, rank=rank))[0] for rank in (0, 1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    payload, _ = Polar(rate=1, rank=2).compress(matrix)
    (size,) = products.LENGTH.unpack(bytes(payload[-4:].tolist()))
    assert int(payload[-size + 4]) == 2


@pytest.mark.parametrize("rate", [0.1, 0.5, 1, 3])
def test_noise_has_no_product(rate):
    for tensor in (gauss(300, 500), gauss(64, 64), gauss(20, 4000), gauss(100_000)):
        assert not error_of(tensor, Polar(rate=rate))[1] & PRODUCT


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 1, 2, 4])
def test_a_product_never_costs_more_than_noise(rate):
    """Whatever is in the matrix: sparse rows, huge entries, rank one alone, scales of any size."""
    sparse = gauss(256, 256) * (gauss(256, 1, seed=1) > 1)
    one_huge = low_rank(200, 300, 2, 1)
    one_huge[3, 4] = 1e6
    scaled = low_rank(200, 300, 2, 1) * torch.exp(2 * gauss(200, 1, seed=7)) * torch.exp(2 * gauss(1, 300, seed=8))
    for matrix in (sparse, one_huge, scaled, gauss(200, 1) * gauss(1, 300, seed=5), torch.ones(100, 100)):
        assert error_of(matrix, Polar(rate=rate))[0] <= 1.03 * error_of(matrix, Polar(rate=rate, rank=0))[0] + 1e-5


@pytest.mark.parametrize("factor", [1e-25, 1e-6, 1e20, 1e36])
def test_scale_does_not_matter(factor):
    matrix = low_rank(256, 300, 3, 0.3)
    error, flags = error_of(matrix * factor, Polar(rate=0.5))
    assert flags & PRODUCT
    assert error == pytest.approx(error_of(matrix, Polar(rate=0.5))[0], rel=0.1)


@pytest.mark.parametrize("rate", [0.25, 1, 2])
@pytest.mark.parametrize("backend", backends.available_backends())
def test_the_same_bytes_everywhere(rate, backend):
    """By any backend and number of threads; on any machine: the digests were written once."""
    digests = {0.25: "6a32f762dbb54c2f", 1: "b5451d4a56d29cec", 2: "77667589304c2d15"}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with backends.use_backend(backend):
                payload, ctx = Polar(rate=rate, floor=0).compress(integers(150, 210))
                decoded = Polar(rate=rate, floor=0).decompress(payload, ctx)
            assert payload[0] & PRODUCT
            data = bytes(payload.tolist()) + bytes(decoded.view(torch.uint8).view(-1).tolist())
            assert hashlib.sha256(data).hexdigest()[:16] == digests[rate]
    finally:
        torch.set_num_threads(threads)


class ExactProducts(TorchDispatchMode):
    """Holds every product of matrices to what makes it the same in any order: integers, and sums below 2^53."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            left, right = arguments[-2:]
            for side in (left, right):
                assert side.dtype == torch.float64 and torch.equal(side, side.round())
            assert float((left.abs() @ right.abs()).max()) < 2**53
            self.count += 1
        return function(*arguments, **(options or {}))

    def unwatched(self, function):
        """The function without the mode, whose time for each operation adds up."""

        def run(*arguments, **options):
            self.__exit__(None, None, None)
            try:
                return function(*arguments, **options)
            finally:
                self.__enter__()

        return run


@pytest.mark.parametrize("rate", [0.25, 2, 4])
def test_products_of_matrices_are_exact(rate, monkeypatch):
    one_huge = low_rank(200, 300, 2, 1)
    one_huge[3, 4] = 1e6
    for matrix in (
        low_rank(300, 200, 5, 0.3),
        low_rank(64, 9000, 3, 1e-4),
        one_huge,
        torch.ones(100, 100),
        gauss(200, 1) * gauss(1, 300),
    ):
        with backends.use_backend("reference"), ExactProducts() as products, monkeypatch.context() as patched:
            for name in ("encode", "decode"):  # of what the products leave, by many small operations
                patched.setattr(reference, name, products.unwatched(getattr(reference, name)))
            payload, ctx = Polar(rate=rate).compress(matrix)
            Polar(rate=rate).decompress(payload, ctx)
        assert products.count > 5


@pytest.mark.parametrize("backend", backends.available_backends())
def test_damaged_products_decode_or_are_refused(backend):
    compressor = Polar(rate=1)
    with backends.use_backend(backend):
        payload, ctx = compressor.compress(low_rank(100, 90, 3, 0.3))
        assert payload[0] & PRODUCT
        (size,) = products.LENGTH.unpack(bytes(payload[-4:].tolist()))
        places = [*range(-4, 0), *range(-size, -size + 40), *range(-size, -4, 23)]
        assert refusals(compressor, payload, ctx, places) > 10


def test_factors_survive_their_bytes():
    generator = torch.Generator().manual_seed(3)
    left = torch.randint(-products.LARGEST_FACTOR, products.LARGEST_FACTOR + 1, (40, 3), generator=generator)
    right = torch.stack([torch.zeros(50), torch.arange(50) - 25, torch.ones(50)], 1).to(torch.int64)
    factors = products.Factors(left, right, [-3, 4, 7])
    section = products.pack(factors)
    payload = torch.frombuffer(bytearray(bytes(28) + section), dtype=torch.uint8)
    found, rest = products.unpack(payload, 2000)
    assert rest.numel() == 28 and found.exponents == factors.exponents
    assert torch.equal(found.left, left) and torch.equal(found.right, right)
