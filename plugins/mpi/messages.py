"""What the ranks say to each other.

A key has four tags: what is pushed, of a worker that applied the last result of the key; the same
of one that did not; what is pulled (an empty message asks, a payload answers; an empty answer
tells a worker that it was given up); and what the server remembers of it (an empty message asks,
one of a single byte asks for what it was before the last result, another one is to be gone on
from). An empty push says that a worker had no gradient. One more tag says that a worker leaves,
one, among servers, that a worker was given up, and one carries a worker's numbers to server 0
and the sum back.
"""

TAGS = 4  # of a key


def push_tag(key, applied=True):
    """Of a pushed payload."""
    return TAGS * key if applied else TAGS * key + 1


def pull_tag(key):
    """Of the question for a mean, and of the answer."""
    return TAGS * key + 2


def memory_tag(key):
    """Of what a server remembers of a key."""
    return TAGS * key + 3


def leave_tag(partitions):
    """Of a worker that leaves."""
    return TAGS * len(partitions)


def given_up_tag(partitions):
    """Of a worker that was given up."""
    return TAGS * len(partitions) + 1


def sum_tag(partitions):
    """Of numbers to be summed, and of their sum."""
    return TAGS * len(partitions) + 2
