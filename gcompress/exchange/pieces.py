"""What of gradients travels in one payload, and how it is encoded, added up and decoded one item after the other."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ..compressors import Compressor
from ..errors import PayloadError
from ..feedback import NoFeedback, Slice


class Item(NamedTuple):
    """Entries start to stop of a gradient, encoded by themselves."""

    name: str
    start: int
    stop: int
    shape: torch.Size
    compressor: Compressor

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Of its payload; the largest possible if that is not fixed."""
        return self.compressor.nbytes(self.numel)


class OneByOne:
    """Encodes items of gradients to one payload, and adds and decodes such payloads, one after the other.

    Args:
        items: in the order of their payloads.
    """

    def __init__(self, items):
        self.items = items

    def encode(self, values, memory_for, seed_of):
        """One payload.

        Args:
            values: {name: the whole gradient}.
            memory_for: from an item to its ErrorFeedback, or None.
            seed_of: from an item to its seed.
        """
        parts: dict[str, list[Item]] = {}
        for item in sorted(self.items, key=lambda item: item.start):
            parts.setdefault(item.name, []).append(item)
        payloads = {}
        for name, items in parts.items():
            coder = memory_for(items[0]) or NoFeedback
            slices = [Slice(item.start, item.stop, item.shape, seed_of(item)) for item in items]
            found = coder.compress_parts(name, values[name], items[0].compressor, slices)
            payloads.update(zip(items, found, strict=True))
        return joined([payloads[item] for item in self.items])

    def mean(self, rows, factor, total, memory_for, key_of, seed_of):
        """The payload of the items' sums over ranks, times a factor.

        Args:
            rows: the ranks' payloads.
            total: float32 memory for the longest item.
            memory_for: from an item and its sum to an ErrorFeedback, or None.
            key_of: from an item to its name there.
            seed_of: as for `encode`.
        """
        payloads = []
        for item in self.items:
            whole = total[: item.numel]
            rows = decode_sum(item, rows, whole, factor, again=True)
            coder = memory_for(item, whole) or NoFeedback
            payload, _ = coder.compress(key_of(item), whole.view(item.shape), item.compressor, seed=seed_of(item))
            payloads.append(payload)
        return joined(payloads, rows[0])

    def decode_sum(self, rows, factor, places):
        """Decode the sums over ranks, times a factor, to {name: the whole result}; returns what follows in each row."""
        for item in self.items:
            rows = decode_sum(item, rows, places[item.name][item.start : item.stop], factor)
        return rows

    def decode(self, payload, places):
        """Decode one payload to {name: the whole result}."""
        for item in self.items:
            item.compressor.decode_into(payload[: item.nbytes], places[item.name][item.start : item.stop])
            payload = payload[item.nbytes :]


def joined(payloads, like=None):
    """Payloads one behind the other; an empty one like another tensor if there are none."""
    if len(payloads) == 1:
        return payloads[0]
    return torch.cat(payloads) if payloads else like[:0]


def decode_sum(item, rows, out, factor, again=False):
    """Decode to `out` the sum of a payload at the start of every row, in rank order; returns what follows them.

    again: see `Compressor.decode_sum`.
    """
    payloads, rest = [], []
    for rank, row in enumerate(rows):
        with _from_rank(rank, item.name):
            size = item.compressor.payload_nbytes(row, item.numel)
        payloads.append(row[:size])
        rest.append(row[size:])
    try:
        item.compressor.decode_sum(payloads, out, factor, again=again)
    except PayloadError:  # whose is bad, unless one only needs more room than payloads of its size do
        for rank, payload in enumerate(payloads):
            with _from_rank(rank, item.name):
                item.compressor.decode_into(payload, out, add=rank > 0)
        out.mul_(factor)
    return rest


def decode_mean_of_senders(item, rows, out, factor):
    """Decode to `out` an entry's mean over the ranks that sent it, times a factor; returns what follows in the rows."""
    rest, count, one = [], torch.zeros_like(out), torch.empty_like(out)
    out.zero_()
    for rank, row in enumerate(rows):
        with _from_rank(rank, item.name):
            size = item.compressor.payload_nbytes(row, item.numel)
            item.compressor.decode_into(row[:size], one)
        out.add_(one)
        count.add_(one != 0)
        rest.append(row[size:])
    out.div_(count.clamp_(min=1)).mul_(factor)
    return rest


@contextlib.contextmanager
def _from_rank(rank, name):
    """Say whose payload it was that does not fit."""
    try:
        yield
    except PayloadError as error:
        raise PayloadError(f"gradient {name!r} from rank {rank}: {error}") from None
