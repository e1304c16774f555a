"""Rates, times and sizes as people write them."""

import pytest

from gcompress import ConfigError
from gcompress.units import byte_count, duration, in_bits, in_seconds, link_rate

RATES = {
    "100mbit": 1e8,
    "1gbit": 1e9,
    "1Gbit/s": 1e9,
    "10Gb/s": 1e10,
    "10 gb/s": 1e10,
    "2.5Gbits/s": 2.5e9,
    "125MB/s": 1e9,
    "125 megabytes": None,
    "100MiB/s": 8 * 100 * 2**20,
    "64kibit": 64 * 1024,
    "1e3mbit": 1e9,
    ".5tbit": 5e11,
    "9600bit": 9600,
    "10Gbps": None,
    "10gbps": None,
    "125MB": None,
    "100": None,
    "100m": None,
    "0gbit": None,
    "-1gbit": None,
    "nangbit": None,
    "1e999gbit": None,
    "1gbit 2gbit": None,
    "": None,
}


@pytest.mark.parametrize("text, bits", RATES.items())
def test_a_rate_is_read_or_refused_by_name(text, bits):
    if bits is None:
        with pytest.raises(ConfigError, match="my link: got .*expected a rate such as 100mbit"):
            link_rate(text, "my link")
    else:
        assert link_rate(text) == pytest.approx(bits)


def test_a_number_is_no_rate():
    with pytest.raises(ConfigError, match="link: got 1000"):
        link_rate(1000)


@pytest.mark.parametrize(
    "text, seconds",
    {"300ms": 0.3, "0.3s": 0.3, "0.3": 0.3, "50us": 5e-5, "50 µs": 5e-5, "0": 0, 2: 2, 0.5: 0.5}.items(),
)
def test_a_time_is_read(text, seconds):
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "3 hours", "1e999", None, True, float("nan"), -1])
def test_what_is_no_time_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="step: got .*expected a time such as 300ms"):
        duration(text, "step")


def test_sizes():
    assert [byte_count(text) for text in ("25MB", "25MiB", "1", "1.5kB", 7)[:4]] == [25_000_000, 25 << 20, 1, 1500]
    for text in ("", "0", "0.5", "25Mbit", "-1MB", True, None, "1e30"):
        with pytest.raises(ConfigError, match="bucket: got .*expected a number of bytes"):
            byte_count(text, "bucket")


@pytest.mark.parametrize("bits", [1e3, 9.99e8, 1e9, 9.37e7, 9.9999e8, 2.5e12, 12.0])
def test_what_is_shown_is_read_back(bits):
    assert link_rate(in_bits(bits)) == pytest.approx(bits, rel=6e-3)
    for seconds in (bits * 1e-9, bits * 1e-3, 0):
        assert duration(in_seconds(seconds)) == pytest.approx(seconds, rel=6e-3)
