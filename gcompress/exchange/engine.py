"""What all ranks of a job must have configured alike, and how long they wait for each other.

An engine gathers the ranks' texts; what is in them and how they are compared is the same for all.
"""

import json
import os

from ..errors import ConfigMismatchError

# Raised by every change of payloads or messages: ranks of different releases must not decode each other.
FORMAT_VERSION = 2


def timeout_seconds():
    """How long a rank waits for another before it ends with an error (GCOMPRESS_TIMEOUT, default 300)."""
    return float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))


def text_of(configuration):
    """A JSON-able configuration, and the format's version, as a text to compare."""
    return json.dumps({"format": FORMAT_VERSION, **configuration}, sort_keys=True)


def compare(texts, ranks=None, who="ranks"):
    """ConfigMismatchError, naming each configuration and its ranks, unless the ranks' texts are all the same."""
    groups = {}
    for rank, text in zip(ranks or range(len(texts)), texts, strict=True):
        groups.setdefault(text, []).append(rank)
    if len(groups) > 1:
        found = "; ".join(f"{who} {ranks}: {text}" for text, ranks in groups.items())
        raise ConfigMismatchError(f"compression: expected one configuration on all {who}, got {found}")
