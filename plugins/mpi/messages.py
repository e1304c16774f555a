"""What the ranks say to each other, and how long they wait.

A key has three tags: what is pushed; what is pulled (an empty message asks, a payload
answers; an empty answer tells a worker that it was given up); and what the server remembers of
it (an empty message asks, another one is to be gone on from). One more tag says that a worker
leaves, one, among servers, that a worker was given up, and one carries a worker's numbers to
server 0 and the sum back.
"""

import os

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two looks at what has come


def push_tag(key):
    return 3 * key


def pull_tag(key):
    return 3 * key + 1


def memory_tag(key):
    return 3 * key + 2


def leave_tag(partitions):
    return 3 * len(partitions)


def given_up_tag(partitions):
    return 3 * len(partitions) + 1


def sum_tag(partitions):
    return 3 * len(partitions) + 2


def timeout_seconds():
    """How long a rank waits for another before it reports it (GCOMPRESS_TIMEOUT, default 300)."""
    return float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))
