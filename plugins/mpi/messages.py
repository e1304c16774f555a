"""What the ranks say to each other, and how long they wait.

A key has two tags: what is pushed, and what is pulled (an empty message asks, a payload
answers; an empty answer tells a worker that it was given up). One more tag says that a worker
leaves, and one, among servers, that a worker was given up.
"""

import os

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two looks at what has come


def push_tag(key):
    return 2 * key


def pull_tag(key):
    return 2 * key + 1


def leave_tag(partitions):
    return 2 * len(partitions)


def given_up_tag(partitions):
    return 2 * len(partitions) + 1


def timeout_seconds():
    """How long a rank waits for another before it reports it (GCOMPRESS_TIMEOUT, default 300)."""
    return float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))
