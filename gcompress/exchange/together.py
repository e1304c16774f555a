"""Pieces of many gradients encoded, added up and decoded by one call of the C++ kernels for all of them.

What is called for a piece never changes but for addresses and seeds, so it is noted once (backends/calls.py). Bytes and
results are those of one piece after the other (`OneByOne` of pieces.py).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import backends
from ..backends.calls import CallList, recorded
from ..backends.cpu import MOST_MORE
from ..errors import PayloadError
from ..feedback import flat_values
from .pieces import OneByOne


def calls_of(items, world_size):
    """[(encoding Call, decoding Call)] of items (see pieces.py), or None if one of them cannot take part."""
    kernels = backends.cpu_kernels()
    if kernels is None or world_size - 1 > MOST_MORE:
        return None
    known, found = {}, []
    for item in items:
        kind = item.compressor, item.shape if item.compressor.uses_shape else (item.numel,)
        if kind not in known:
            known[kind] = _calls(kernels, *kind)
        if known[kind] is None:
            return None
        found.append(known[kind])
    return found


def _calls(kernels, compressor, shape):
    names, numel = compressor.kernels or (), math.prod(shape)
    if not (kernels.has(names) and kernels.keeps_residual_with(names) and kernels.adds_with(names)):
        return None
    if numel == 0 or not compressor.fixed_size or compressor.parts:
        return None
    values, payload = SizedTensor(shape), SizedTensor((compressor.nbytes(numel),))
    encode = recorded(kernels, lambda to: compressor._encode_native(to, values, payload, 0), "gc_memory")
    decode = recorded(kernels, lambda to: compressor._decode_native(to, payload, values, False), "gc_more")
    return encode and decode and (encode, decode)


class SizedTensor:
    """A CPU tensor of which only the shape is real."""

    device = torch.device("cpu")

    def __init__(self, shape):
        self.shape = shape

    def numel(self):
        return math.prod(self.shape)

    def data_ptr(self):
        return 0


def more_words(count):
    """That many gc_more (csrc/gcompress.h), a row of words each: no payloads, a factor of 1, read again at once."""
    more = np.zeros((count, 3), np.int64)
    set_factor(more, 1.0, True)
    return more


def set_factor(more, factor, again):
    """Set the last word of every gc_more."""
    more.view(np.int32)[:, 4:] = np.array([factor], np.float32).view(np.int32)[0], again


class Together:
    """Encodes items of gradients to one payload, and adds and decodes such payloads.

    Args:
        items: in the order of their payloads.
        calls: what `calls_of` found for them.
        world_size: the number of ranks.
    """

    def __init__(self, items, calls, world_size):
        kernels = backends.cpu_kernels()
        self.items, self._world_size, self._one_by_one = items, world_size, OneByOne(items)
        self._starts = np.array([item.start for item in items], np.int64)
        sizes = [item.nbytes for item in items]
        self._offsets, self.nbytes = np.cumsum([0, *sizes[:-1]]), sum(sizes)
        self._encode = CallList(kernels, [encode for encode, _ in calls])
        self._decode = CallList(kernels, [decode for _, decode in calls])
        self._mean = CallList(kernels, [call for encode, decode in calls for call in (decode, encode)])
        self._memory = np.zeros((len(items), 3), np.int64)
        self._memory_places = self._memory.ctypes.data + 24 * np.arange(len(items))
        self._poisoned = np.zeros(len(items), np.int32)
        self._memory[:, 2] = self._poisoned.ctypes.data + 4 * np.arange(len(items))
        self._more = more_words(len(items))
        self._more_places = self._more.ctypes.data + 24 * np.arange(len(items))
        self._others = np.zeros((len(items), world_size - 1), np.int64)
        self._more[:, 0] = self._others.ctypes.data + 8 * (world_size - 1) * np.arange(len(items))
        self._more[:, 1] = world_size - 1

    def encode(self, values, memory_for, seed_of):
        """One payload; the arguments of `OneByOne.encode`."""
        try:
            return self._encoded(values, memory_for, seed_of)
        except PayloadError:  # one needs a larger workspace than tensors of its size do
            return self._one_by_one.encode(values, memory_for, seed_of)

    def mean(self, rows, factor, total, memory_for, key_of, seed_of):
        """The payload of the items' sums over ranks, times a factor; the arguments of `OneByOne.mean`.

        rows: one behind the other in memory. `memory_for` gets None for the sum.
        """
        others = lambda item, _: memory_for(item, None), key_of, seed_of
        try:
            return self._mean_of(rows, factor, total, *others)
        except PayloadError:  # as above, or one is bad, of which it is then said whose it is
            return self._one_by_one.mean(rows, factor, total, *others)

    def decode_sum(self, rows, factor, places):
        """Decode the sums over ranks, times a factor, to {name: the whole result}; `rows` is as for `mean`."""
        self._set_rows(rows, factor, again=False)
        self._set_decode(rows[0], self._more_places, places)
        try:
            self._decode.run()
        except PayloadError:
            return self._one_by_one.decode_sum(rows, factor, places)
        return [row[self.nbytes :] for row in rows]

    def decode(self, payload, places):
        """Decode one payload to {name: the whole result}."""
        self._set_decode(payload, 0, places)
        try:
            self._decode.run()
        except PayloadError:
            self._one_by_one.decode(payload, places)

    def _encoded(self, values, memory_for, seed_of):
        flat = {name: flat_values(gradient) for name, gradient in values.items()}
        sources = np.array([flat[item.name].data_ptr() for item in self.items], np.int64) + 4 * self._starts
        payload = torch.empty(self.nbytes, dtype=torch.uint8)
        opened = self._open({item.name: (memory_for(item), flat[item.name]) for item in self.items})
        self._encode.set("x", sources)
        self._encode.set("payload", payload.data_ptr() + self._offsets)
        self._encode.set("memory", self._memory_words([opened[item.name] for item in self.items], self._starts))
        if self._encode.has("seed"):
            self._encode.set("seed", np.array([seed_of(item) for item in self.items], np.int64))
        self._encode.run()
        self._close(opened, [item.name for item in self.items])
        return payload

    def _mean_of(self, rows, factor, total, memory_for, key_of, seed_of):
        payload = torch.empty(self.nbytes, dtype=torch.uint8)
        keys = [key_of(item) for item in self.items]
        opened = self._open(
            {key: (memory_for(item, None), total[: item.numel]) for key, item in zip(keys, self.items, strict=True)}
        )
        calls = self._mean  # a decoder's and an encoder's for each item
        self._set_rows(rows, factor, again=True)
        calls.set("out", total.data_ptr())
        calls.set("x", total.data_ptr())
        calls.set("more", np.repeat(self._more_places, 2))
        calls.set("memory", np.repeat(self._memory_words([opened[key] for key in keys], 0), 2))
        starts = np.array([rows[0].data_ptr(), payload.data_ptr()])
        calls.set("payload", (starts + self._offsets[:, None]).ravel())
        if calls.has("seed"):
            calls.set("seed", np.repeat(np.array([seed_of(item) for item in self.items], np.int64), 2))
        calls.run()
        self._close(opened, keys)
        return payload

    def _set_decode(self, payload, more, places):
        self._decode.set("more", more)
        self._decode.set("payload", payload.data_ptr() + self._offsets)
        outs = np.array([places[item.name].data_ptr() for item in self.items], np.int64)
        self._decode.set("out", outs + 4 * self._starts)

    def _set_rows(self, rows, factor, again):
        others = rows[0].data_ptr() + self.nbytes * np.arange(1, self._world_size)
        self._others[:] = others + self._offsets[:, None]
        set_factor(self._more, factor, again)

    def _open(self, by_key):
        """{key: (ErrorFeedback, residual or None, tensor for the new one) or None}, one opening of each."""
        return {key: memory and (memory, *memory.opened(key, values)) for key, (memory, values) in by_key.items()}

    def _memory_words(self, opened, starts):
        """Where each item's gc_memory lies, or 0: filled from what `_open` made of it and its first entry."""
        self._poisoned[:] = 0
        self._memory[:, 0] = [0 if each is None or each[1] is None else each[1].data_ptr() for each in opened]
        self._memory[:, 1] = [0 if each is None else each[2].data_ptr() for each in opened]
        self._memory[:, :2] += np.where(self._memory[:, :2] > 0, 4 * np.reshape(starts, (-1, 1)), 0)
        return np.where([each is not None for each in opened], self._memory_places, 0)

    def _close(self, opened, keys):
        poisoned = {keys[number] for number in np.flatnonzero(self._poisoned)} if self._poisoned.any() else ()
        for key, each in opened.items():
            if each is not None:
                each[0].closed(key, each[2], key in poisoned)
