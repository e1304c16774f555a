"""Pieces of many gradients coded by one call (together.py), where residuals are packed (residual_types.py).

For each tensor the call unpacks its residual, encodes all its pieces, and packs what they lost, in memory of the
longest tensor's size that all share. What that needs is there from the second step on; the first one goes piece by
piece, with the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .. import backends
from ..backends.calls import CallList, recorded
from ..feedback import flat_values
from ..residual_types import Packed, PackedMemory
from .together import SizedTensor, Together, more_words


class Kept(NamedTuple):
    """A tensor whose residual is packed, while its pieces are encoded."""

    memory: PackedMemory
    before: Packed
    fresh: Packed
    seed: int


class PackedTogether(Together):
    """A `Together` for memories that are `packed`; see `Together` for its arguments."""

    def __init__(self, items, calls, world_size):
        super().__init__(items, calls, world_size)
        self._calls = calls
        self._alone = more_words(1)  # no other payload is added
        self._lists: dict[tuple, tuple[CallList, np.ndarray]] = {}  # {whether means, the keys kept: the calls, order}

    def _encoded(self, values, memory_for, seed_of):
        kept = self._kept({item.name: (memory_for(item), values[item.name].numel()) for item in self.items})
        if kept is None:
            return self._one_by_one.encode(values, memory_for, seed_of)
        flat = {name: flat_values(gradient) for name, gradient in values.items()}
        sources = np.array([flat[item.name].data_ptr() for item in self.items], np.int64) + 4 * self._starts
        payload = torch.empty(self.nbytes, dtype=torch.uint8)
        keys, starts = [item.name for item in self.items], self._starts
        calls, order = self._list(False, keys, kept)
        self._fill(calls, order, kept, keys, starts, sources, payload, seed_of)
        calls.run()
        self._propose(kept, keys)
        return payload

    def _mean_of(self, rows, factor, total, memory_for, key_of, seed_of):
        keys = [key_of(item) for item in self.items]
        found = zip(keys, self.items, strict=True)
        kept = self._kept({key: (memory_for(item, None), item.numel) for key, item in found})
        if kept is None:
            return self._one_by_one.mean(rows, factor, total, memory_for, key_of, seed_of)
        payload = torch.empty(self.nbytes, dtype=torch.uint8)
        calls, order = self._list(True, keys, kept)
        self._set_rows(rows, factor, again=True)
        self._fill(calls, order, kept, keys, 0, total.data_ptr(), payload, seed_of, rows)
        calls.run()
        self._propose(kept, keys)
        return payload

    def _kept(self, memories):
        """{key: Kept} of {key: (ErrorFeedback or None, entries)}; None if one has nothing on this device to unpack."""
        kept = {}
        for key, (memory, numel) in memories.items():
            if memory is None:
                continue
            before = memory.packed and memory.packed.kept(key)
            if before is None or before.numel != numel or not before.payload.is_cpu:
                return None
            kept[key] = Kept(memory.packed, before, *memory.packed.draft(key, numel, before.payload.device))
        return kept

    def _list(self, means, keys, kept):
        """(The calls, [(what, item or key)] in their order): "unpack" and "pack" around a key's items."""
        known = means, *kept
        if known not in self._lists:
            order, numbers = [], {}
            for number, key in enumerate(keys):
                numbers.setdefault(key, []).append(number)
            for key, items in numbers.items():
                order += [("decode", number) for number in items if means]
                order += [("unpack", key)] * (key in kept)
                order += [("encode", number) for number in items]
                order += [("pack", key)] * (key in kept)
            self._lists[known] = CallList(backends.cpu_kernels(), [self._call(each, kept) for each in order]), order
        return self._lists[known]

    def _call(self, what, kept):
        kind, which = what
        if kind in ("encode", "decode"):
            return self._calls[which][kind == "decode"]
        memory, before = kept[which].memory, kept[which].before
        values, payload = SizedTensor((before.numel,)), SizedTensor((before.payload.numel(),))
        kernels, compressor = backends.cpu_kernels(), memory.compressor
        if kind == "pack":
            return recorded(kernels, lambda to: compressor._encode_native(to, values, payload, 0), "gc_memory")
        return recorded(kernels, lambda to: compressor._decode_native(to, payload, values, False), "gc_more")

    def _fill(self, calls, order, kept, keys, starts, sources, payload, seed_of, rows=None):
        """Say where everything lies and which seeds there are."""
        longest = max((each.before.numel for each in kept.values()), default=0)
        room = next(iter(kept.values())).memory.room(longest, torch.device("cpu")).data_ptr() if kept else 0
        sources, starts = (np.broadcast_to(each, len(keys)) for each in (sources, starts))
        self._poisoned[:] = 0
        self._memory[:, :2] = room + 4 * np.reshape(starts, (-1, 1))
        seeds = [seed_of(item) for item in self.items]
        words = {role: np.zeros(len(order), np.int64) for role in ("memory", "more", "x", "payload", "seed", "out")}
        for number, (kind, which) in enumerate(order):
            if kind == "encode":
                words["x"][number], words["seed"][number] = sources[which], seeds[which]
                words["payload"][number] = payload.data_ptr() + self._offsets[which]
                words["memory"][number] = self._memory_places[which] if keys[which] in kept else 0
            elif kind == "decode":
                words["out"][number], words["more"][number] = sources[which], self._more_places[which]
                words["payload"][number] = rows[0].data_ptr() + self._offsets[which]
            elif kind == "unpack":
                words["out"][number], words["payload"][number] = room, kept[which].before.payload.data_ptr()
                words["more"][number] = self._alone.ctypes.data
            else:
                words["x"][number], words["payload"][number] = room, kept[which].fresh.payload.data_ptr()
                words["seed"][number] = kept[which].seed
        for role, each in words.items():
            if calls.has(role):
                calls.set(role, each)

    def _propose(self, kept, keys):
        poisoned = {keys[number] for number in np.flatnonzero(self._poisoned)} if self._poisoned.any() else ()
        for key, each in kept.items():
            if key not in poisoned:
                each.memory.propose(key, each.fresh)
