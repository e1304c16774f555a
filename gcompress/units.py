"""Rates, times and sizes as people write them: "1gbit", "10Gb/s", "300ms", "25MiB"."""

from __future__ import annotations

import math
import re

from .checks import is_number, shown
from .errors import ConfigError

PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?\s*"


def link_rate(text: object, argument: str = "link") -> float:
    """Bits per second of a link's rate.

    Args:
        text: tc's "100mbit" and "1gbit", also "10Gb/s" and "1.5 Mbit/s", or bytes: "125MB/s", "100MiB/s". A small b is
            bits, a large B bytes.
        argument: what an error calls it.

    Raises:
        ConfigError: it is none of these. "10Gbps" is refused: tc takes it for bytes, most others for bits.
    """
    example = "a rate such as 100mbit, 1gbit, 10Gb/s (bits) or 125MB/s (bytes)"
    found = re.fullmatch(NUMBER + r"([kmgt]?i?)(bits?|bytes?|b)(/s|ps)?", str(text).strip(), re.IGNORECASE)
    if isinstance(text, str) and found:
        number, power, prefix, unit, per = found.groups()
        if per and per.lower() == "ps":
            raise ConfigError(f"{argument}: got {shown(text)}, bits for some and bytes for tc, expected {example}")
        scale = {**PREFIXES, **BINARY}.get(prefix.lower())
        in_bytes = unit == "B" or unit.lower().startswith("byte")
        if scale and (per or unit.lower().startswith("bit")):
            bits = float(f"{number}e{power or 0}") * scale * (8 if in_bytes else 1)
            if 0 < bits < math.inf:
                return bits
    raise ConfigError(f"{argument}: got {shown(text)}, expected {example}")


def duration(text: object, argument: str = "duration") -> float:
    """Seconds of "300ms", "0.3s", "50us", or a number of seconds; 0 is one.

    Raises:
        ConfigError: it is none of these, or negative.
    """
    found = re.fullmatch(NUMBER + r"(s|ms|us|µs|)", str(text).strip()) if isinstance(text, str) else None
    if found:
        seconds = float(f"{found[1]}e{found[2] or 0}") * SECONDS[found[3]]
    else:
        seconds = float(text) if isinstance(text, (int, float)) and is_number(text) else math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{argument}: got {shown(text)}, expected a time such as 300ms, 0.3s or 50us")
    return seconds


def byte_count(text: object, argument: str = "bytes") -> int:
    """Bytes of "25MB", "25MiB" or a number of them.

    Raises:
        ConfigError: it is none of these, or less than one.
    """
    found = re.fullmatch(NUMBER + r"([kmgt]?i?)B?", str(text).strip(), re.IGNORECASE)
    scale = {**PREFIXES, **BINARY}.get(found[3].lower()) if found else None
    count = float(f"{found[1]}e{found[2] or 0}") * scale if found and scale else 0.0
    if isinstance(text, bool) or not 1 <= count < 2**63:
        raise ConfigError(f"{argument}: got {shown(text)}, expected a number of bytes such as 25MB or 8MiB")
    return int(count)


def in_bits(bits_per_second: float) -> str:
    """A rate in tc's form with three digits, as `link_rate` reads it: "1gbit", "93.7mbit"."""
    for prefix, scale in (("t", 1e12), ("g", 1e9), ("m", 1e6), ("k", 1e3)):
        if bits_per_second >= 0.9995 * scale:
            return f"{float(f'{bits_per_second / scale:.3g}'):g}{prefix}bit"
    return f"{bits_per_second:.3g}bit"


def in_seconds(seconds: float) -> str:
    """A time with three digits, as `duration` reads it: "0.3s", "12.3ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g}{unit}"
    return f"{1e6 * seconds:.3g}us" if seconds else "0s"
