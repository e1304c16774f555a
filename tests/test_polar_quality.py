"""How near the polar quantizer comes to the rate-distortion bound, from packed bytes with everything charged."""

import math

import pytest
import torch

from gcompress import ConfigError, PayloadError, Polar, backends
from tests.compressors import gauss, refusals


def relative_error(tensor, compressor):
    """|x - decoded|^2 / |x|^2 and the bits per entry that were spent."""
    payload, ctx = compressor.compress(tensor)
    decoded = compressor.decompress(payload, ctx)
    error = (tensor.double() - decoded.double()).square().sum() / tensor.double().square().sum()
    return float(error), 8 * payload.numel() / tensor.numel()


@pytest.mark.parametrize("rate, decibels", [(0.1, 0.12), (0.25, 0.20), (0.5, 0.32), (1, 0.52), (2, 0.72)])
def test_gap_to_the_gaussian_bound(rate, decibels):
    error, spent = relative_error(gauss(2**20), Polar(rate=rate))
    assert spent == pytest.approx(rate, abs=1e-4)
    assert 10 * math.log10(error * 4**spent) < decibels


@pytest.mark.parametrize("rate, decibels", [(0.1, 0.08), (0.25, 0.12), (0.5, 0.22), (1, 0.32), (2, 0.45)])
def test_gap_with_a_list_of_eight(rate, decibels):
    error, spent = relative_error(gauss(2**19), Polar(rate=rate, list_size=8))
    assert 10 * math.log10(error * 4**spent) < decibels


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.333, 1.7, 4])
def test_size_is_the_rate_whatever_the_shape(rate):
    for shape in ((5000,), (50, 100), (16, 16, 3, 3), (2, 1250)):
        payload, _ = Polar(rate=rate, floor=0).compress(gauss(*shape))
        assert payload.numel() == max(28, math.ceil(math.prod(shape) * rate / 8))
        payload, _ = Polar(rate=rate).compress(gauss(*shape))
        assert payload.numel() == max(min(512, math.ceil(math.prod(shape) / 8)), math.ceil(math.prod(shape) * rate / 8))


def test_scales_by_row_and_column_find_the_variance_of_a_matrix():
    """Rows and columns of very different scale: far below what a single scale allows."""
    rows = torch.exp(1.5 * gauss(300, 1, seed=1))
    columns = torch.exp(1.5 * gauss(1, 400, seed=2))
    matrix = rows * columns * gauss(300, 400, seed=3)
    fine, _ = relative_error(matrix, Polar(rate=0.5))
    coarse, _ = relative_error(matrix, Polar(rate=0.5, scales="tensor"))
    assert fine < 0.5 * coarse
    flat, _ = relative_error(matrix, Polar(rate=0.5, allocation="flat"))
    assert fine < flat


def test_scales_of_chunks_follow_a_vector_that_fades():
    vector = gauss(100_000) * torch.exp(-torch.arange(100_000) / 10_000)
    fine, _ = relative_error(vector, Polar(rate=0.5))
    coarse, _ = relative_error(vector, Polar(rate=0.5, scales="tensor"))
    assert fine < 0.5 * coarse


def student(*shape):
    """Student's t of 3 degrees of freedom."""
    return gauss(*shape, seed=4) / gauss(3, *shape, seed=5).square().mean(0).sqrt()


def laplace(*shape):
    half = torch.rand(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64) - 0.5
    return (-half.sign() * torch.log1p(-2 * half.abs().clamp(max=0.4999999))).float()


def lognormal(*shape):
    """Where a few entries hold nearly everything."""
    return torch.exp(1.5 * gauss(*shape, seed=7)) * gauss(*shape, seed=8).sign()


# A scalar quantizer with ideal entropy coding: .52, .38, .21, .062; .67, .49, .26, .074. Polar without outliers:
# .80, .68, .42, .24; .76, .61, .32, .11; .98, .96 of the log-normal.
@pytest.mark.parametrize(
    "source, rate, most",
    [(student, 0.25, 0.55), (student, 0.5, 0.39), (student, 1, 0.21), (student, 2, 0.056),
     (lognormal, 0.05, 0.55), (lognormal, 0.1, 0.37),
     (laplace, 0.25, 0.70), (laplace, 0.5, 0.51), (laplace, 1, 0.275), (laplace, 2, 0.074)],
)  # fmt: skip
def test_outliers_go_apart_where_tails_are_heavy(source, rate, most):
    assert relative_error(source(2**18), Polar(rate=rate))[0] < most


@pytest.mark.parametrize("rate", [0.1, 0.5, 1, 2, 4])
@pytest.mark.parametrize("shape", [(300,), (5000,), (200_000,), (300, 400)])
def test_choosing_outliers_by_the_data_never_costs_more_than_noise(shape, rate):
    scales = torch.exp(gauss(*shape[:1], *[1] * (len(shape) - 1), seed=8))
    one_huge = gauss(*shape)
    one_huge.view(-1)[17] = 1e6
    sparse = gauss(*shape) * (gauss(*shape, seed=9) > 1)
    for tensor in (gauss(*shape), laplace(*shape), student(*shape), scales * gauss(*shape), one_huge, sparse):
        plain, _ = relative_error(tensor, Polar(rate=rate, outliers=0.0))
        assert relative_error(tensor, Polar(rate=rate))[0] < 1.03 * plain


def test_one_huge_entry_does_not_hide_the_others():
    tensor = gauss(2**16)
    tensor[1234] = 1e6
    payload, ctx = Polar(rate=1).compress(tensor)
    error = Polar(rate=1).decompress(payload, ctx) - tensor
    error[1234] /= 1e6
    assert error.square().mean() < 0.31


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
def test_a_share_of_outliers_is_about_that(share):
    tensor = student(2**17)
    payload, _ = Polar(rate=2, outliers=share).compress(tensor)
    assert payload[0] & 8
    layer = int.from_bytes(bytes(payload[22:26].tolist()), "little")  # after the headers of payload and outliers
    assert 0.8 * share < (layer & (2**27 - 1)) / tensor.numel() < 1.05 * share


@pytest.mark.parametrize("backend", backends.available_backends())
def test_damaged_outliers_decode_or_are_refused(backend):
    compressor = Polar(rate=1, outliers=0.03)
    with backends.use_backend(backend):
        payload, ctx = compressor.compress(student(2000))
        assert payload[0] & 8
        assert refusals(compressor, payload, ctx, range(12, 120)) > 5


@pytest.mark.parametrize("rate", [0.25, 0.5, 1, 2])
def test_unbiased_errs_as_a_shorter_vector_made_long_again(rate):
    """Of a least error D an unbiased one is D / (1 - D): the same direction at full length."""
    for source in (gauss, student):
        least = relative_error(gauss(2**17), Polar(rate=rate))[0]
        error, spent = relative_error(source(2**17), Polar(rate=rate, unbiased=True))
        assert spent == pytest.approx(rate, abs=1e-3)
        assert error < 1.05 * least / (1 - least)


def test_unbiased_is_exact_along_the_input():
    """Every decoded block has its input as its component along it, whatever the seed."""
    for tensor in (student(5000), torch.nn.functional.one_hot(torch.tensor(7), 300).float(), gauss(40_000) * 1e-20):
        for seed in range(5):
            compressor = Polar(rate=0.5, unbiased=True)
            decoded = compressor.decompress(*compressor.compress(tensor, seed=seed)).double()
            for part, whole in zip(decoded.split(16384), tensor.double().split(16384), strict=True):
                assert float(part @ whole / (whole @ whole)) == pytest.approx(1, abs=1e-5)


def test_longer_blocks_err_less():
    errors = [relative_error(gauss(2**19), Polar(rate=0.5, block=block))[0] for block in (64, 512, 4096)]
    assert errors == sorted(errors, reverse=True)


def test_any_number_of_entries_is_about_as_good_as_a_power_of_two():
    """Shortened blocks: no jump where the entries do not fill a tile."""
    exact, _ = relative_error(gauss(2**16), Polar(rate=0.5))
    for numel in (2**16 + 64, 70_000, 90_001, 100_000):
        error, _ = relative_error(gauss(numel), Polar(rate=0.5))
        assert error < 1.02 * exact


def test_scale_and_sign_do_not_matter():
    tensor = gauss(40, 200)
    error, _ = relative_error(tensor, Polar(rate=1))
    for factor in (-1, 2.0**-60, 2.0**90):
        assert relative_error(tensor * factor, Polar(rate=1))[0] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("backend", backends.available_backends())
def test_bytes_that_contradict_themselves_are_refused(backend):
    with backends.use_backend(backend):
        payload, ctx = Polar(rate=0.5).compress(gauss(64, 128))
        for position, value in ((0, 0x40), (1, 200), (12, 255), (13, 255)):
            damaged = payload.clone()
            damaged[position] = value
            with pytest.raises(PayloadError, match="payload"):
                Polar(rate=0.5).decompress(damaged, ctx)


@pytest.mark.parametrize(
    "arguments",
    [{"rate": 0.01}, {"rate": 5}, {"rate": "1"}, {"block": 100}, {"block": 32}, {"scales": "rows"},
     {"allocation": "best"}, {"list_size": 3}, {"outliers": "few"}, {"outliers": 0.7}, {"outliers": True},
     {"unbiased": "yes"}],
)  # fmt: skip
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ConfigError, match=f"^{next(iter(arguments))}: got"):
        Polar(**arguments)
