"""How near the polar quantizer comes to the rate-distortion bound, from packed bytes with everything charged."""

import math

import pytest
import torch

from gcompress import ConfigError, PayloadError, Polar, native


def relative_error(tensor, compressor):
    """|x - decoded|^2 / |x|^2 and the bits per entry that were spent."""
    payload, ctx = compressor.compress(tensor)
    decoded = compressor.decompress(payload, ctx)
    error = (tensor.double() - decoded.double()).square().sum() / tensor.double().square().sum()
    return float(error), 8 * payload.numel() / tensor.numel()


def gauss(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate, decibels", [(0.1, 0.12), (0.25, 0.20), (0.5, 0.32), (1, 0.52), (2, 0.72)])
def test_gap_to_the_gaussian_bound(rate, decibels):
    error, spent = relative_error(gauss(2**20), Polar(rate=rate))
    assert spent == pytest.approx(rate, abs=1e-4)
    assert 10 * math.log10(error * 4**spent) < decibels


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.333, 1.7, 4])
def test_size_is_the_rate_whatever_the_shape(rate):
    for shape in ((5000,), (50, 100), (16, 16, 3, 3), (2, 1250)):
        payload, _ = Polar(rate=rate).compress(gauss(*shape))
        assert payload.numel() == max(28, math.ceil(math.prod(shape) * rate / 8))


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


@pytest.mark.parametrize("backend", native.available_backends())
def test_bytes_that_contradict_themselves_are_refused(backend):
    with native.use_backend(backend):
        payload, ctx = Polar(rate=0.5).compress(gauss(64, 128))
        for position, value in ((0, 0x40), (1, 200), (12, 255), (13, 255)):
            damaged = payload.clone()
            damaged[position] = value
            with pytest.raises(PayloadError, match="payload"):
                Polar(rate=0.5).decompress(damaged, ctx)


@pytest.mark.parametrize(
    "arguments",
    [{"rate": 0.01}, {"rate": 5}, {"rate": "1"}, {"block": 100}, {"block": 32}, {"scales": "rows"},
     {"allocation": "best"}, {"list_size": 3}],
)  # fmt: skip
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ConfigError, match=f"^{next(iter(arguments))}: got"):
        Polar(**arguments)
