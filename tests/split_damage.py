"""How thoroughly the tests of faults in split learning look: GCOMPRESS_LONG=1 for the longer run."""

import os

LONG = os.environ.get("GCOMPRESS_LONG") == "1"


def trials(short, long):
    """How often a random trial is made."""
    return long if LONG else short


def damaged(rng, data):
    """Bytes with one piece of them changed, cut out, doubled or cut off; never the same bytes."""
    at = rng.randrange(len(data))
    size = min(rng.choice((1, 1, 4, 64)), len(data) - at)
    how = rng.randrange(5)
    if how == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + data[at + size :]
    if how == 3:
        return data[:at] + rng.randbytes(size) + data[at:]
    return data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + size]) + data[at + size :]
