"""Activations and gradients as bytes; the memory of activations, of which only changes are sent."""

from __future__ import annotations

import collections
import math
import numbers
import time
import zlib
from typing import NamedTuple

import torch

from ..errors import ConfigError, ExchangeError, PayloadError
from . import wire
from .agreement import from_spec_or_none

STATISTICS_BYTES = 32


class Stats(NamedTuple):
    """The server's results for a batch. loss: mean over samples; top1, top5: how many samples were right."""

    loss: float
    top1: int
    top5: int
    samples: int

    def to_bytes(self) -> bytes:
        return wire.write_tensor(torch.tensor(self, dtype=torch.float64))

    @classmethod
    def from_bytes(cls, section: bytes) -> Stats:
        loss, *counts = wire.read_tensor(section, torch.float64, (4,)).tolist()
        if not all(0 <= count < 2**53 for count in counts):
            raise PayloadError(f"statistics: got counts {counts}")
        return cls(loss, *map(int, counts))


def seed_of(direction, step):
    """The seed for random rounding: another one for each tensor, and the same one when a step is done again."""
    return zlib.crc32(f"{direction}/{step}".encode())


class Codec:
    """One direction's tensors as bytes.

    Args:
        spec: a compressor's, or "none".
        shape: of one sample.
        max_batch: how many samples a peer may send at once.
    """

    def __init__(self, spec, shape, max_batch):
        self.compressor = from_spec_or_none(spec)
        if self.compressor is not None and not self.compressor.fixed_size:
            raise ConfigError(f"compressor {spec}: got one of variable size, expected one whose size is known before")
        self.shape, self.max_batch, self.numel = tuple(shape), max_batch, math.prod(shape)
        self.seconds = 0.0

    def nbytes(self, samples):
        """Bytes of a batch."""
        numel = samples * self.numel
        return 4 * numel if self.compressor is None else self.compressor.nbytes(numel)

    def encode(self, tensor, seed):
        """A batch's bytes; ExchangeError if an entry is not finite."""
        if tensor.shape[1:] != self.shape or not 0 <= len(tensor) <= self.max_batch:
            raise ConfigError(
                f"tensor: got shape {tuple(tensor.shape)}, expected at most {self.max_batch} samples of {self.shape}"
            )
        started = time.perf_counter()
        values = tensor.detach().float()
        if not bool(torch.isfinite(values).all()):
            raise ExchangeError("tensor: an entry to be sent is not finite: training has diverged (lower the rate?)")
        payload = values if self.compressor is None else self.compressor.compress(values, seed=seed)[0]
        data = wire.write_tensor(payload)
        self.seconds += time.perf_counter() - started
        return data

    def decode(self, section, samples, device="cpu"):
        """The batch that `encode` took; PayloadError if no encoder writes such bytes, or an entry is not finite."""
        started = time.perf_counter()
        if not 0 <= samples <= self.max_batch or len(section) != self.nbytes(samples):
            raise PayloadError(
                f"tensor: got {len(section)} bytes for {samples} samples of {self.shape}, at most {self.max_batch}"
            )
        numel, shape = samples * self.numel, (samples, *self.shape)
        if self.compressor is None:
            values = wire.read_tensor(section, torch.float32, shape)
        else:
            payload = wire.read_tensor(section, torch.uint8, (self.nbytes(samples),))
            self.compressor.check(payload, numel)
            values = torch.empty(numel)
            self.compressor.decode_into(payload, values)
        if not bool(torch.isfinite(values).all()):
            raise PayloadError("tensor: an entry that came is not finite")
        self.seconds += time.perf_counter() - started
        return values.view(shape).to(device)


class DeltaMemory:
    """The last activation of each sample, as the receiver decoded it.

    AQ-SGD (Wang et al., arXiv 2206.01299): both sides keep this memory and update it with what
    the receiver decodes. So the client sends only the change since a sample's last visit. When
    the memory is full, the sample used longest ago is forgotten.

    Args:
        samples: how many are remembered.
        numel: entries of one sample's activation.
    """

    def __init__(self, samples, numel):
        self.samples, self.numel = samples, numel
        self._rows = collections.OrderedDict()  # sample id: row, the least recently used first
        self._values = torch.empty(samples, numel)
        self._latest = None  # what `remember` got last, until it is final

    def known(self, ids):
        """Which of the ids (a list) are remembered, as a bool tensor."""
        self.commit()
        return torch.tensor([sample in self._rows for sample in ids], dtype=torch.bool)

    def recall(self, ids):
        """Float32 of shape (ids, numel); all must be known."""
        self.commit()
        return self._values[[self._rows[sample] for sample in ids]]

    def remember(self, ids, values):
        """Remember float32 values of shape (ids, numel), for at most `samples` different ids.

        `revert` undoes this until `commit`, or until the memory is used next.
        """
        self.commit()
        self._latest = ids, values.detach()

    def revert(self):
        """Undo the last `remember`."""
        self._latest = None

    def commit(self):
        """Make the last `remember` final."""
        (ids, values), self._latest = self._latest or ([], []), None
        for sample, value in zip(ids, values, strict=True):
            if sample in self._rows:
                self._rows.move_to_end(sample)
            elif len(self._rows) < self.samples:
                self._rows[sample] = len(self._rows)
            else:
                _, row = self._rows.popitem(last=False)
                self._rows[sample] = row
            self._values[self._rows[sample]] = value

    def state_dict(self):
        self.commit()
        ids = torch.tensor(list(self._rows), dtype=torch.int64)
        return {"ids": ids, "values": self._values[list(self._rows.values())].clone()}

    def load_state_dict(self, state):
        self.revert()
        self._rows.clear()
        self.remember(state["ids"].tolist(), state["values"])
        self.commit()


class ActivationCodec:
    """Encodes and decodes the bodies of FORWARD and EVALUATE: labels, sample ids (delta mode), activation.

    Both sides have one. A training body changes the memory of activations. If its step fails,
    `revert` undoes that change; `commit` makes it final. So both sides' memories stay equal.
    """

    def __init__(self, agreement):
        self.agreement = agreement
        shape, most = agreement.shape, agreement.max_batch
        self.codec = Codec(agreement.up, shape, most)
        self.memory = self.first = None
        if agreement.delta_samples:
            self.first = Codec(agreement.delta_first, shape, most)
            self.memory = DeltaMemory(agreement.delta_samples, math.prod(shape))
        self._label_type = None if agreement.u_shaped else getattr(torch, agreement.labels)

    @property
    def seconds(self):
        return self.codec.seconds + (self.first.seconds if self.first else 0.0)

    def reset(self):
        """Forget all samples."""
        if self.memory:
            self.memory = DeltaMemory(self.memory.samples, self.memory.numel)

    def commit(self):
        """The last training step was taken: its change of the memory is final."""
        if self.memory:
            self.memory.commit()

    def revert(self):
        """The last training step failed: undo its change of the memory."""
        if self.memory:
            self.memory.revert()

    def _label_bytes(self, samples):
        if self._label_type is None:
            return 0
        return samples * math.prod(self.agreement.label_shape) * self._label_type.itemsize

    def largest(self):
        """Bytes of the largest body."""
        most = self.agreement.max_batch
        payload = self.codec.nbytes(most)
        if self.memory:
            payload += self.first.nbytes(most) + 8 * most
        return self._label_bytes(most) + payload

    def encode(self, activation, labels, ids, step, training):
        """(body, samples). When training in delta mode, remembers what the server will decode."""
        samples = len(activation)
        if samples == 0:
            raise ConfigError("batch: got no samples, expected 1 or more")
        parts = [] if self._label_type is None else [self._encode_labels(labels, samples)]
        if self.memory is None or not training:
            codec = self.first or self.codec
            parts.append(codec.encode(activation, seed_of("up", step)))
            return b"".join(parts), samples
        ids = self._checked_ids(ids, samples)
        parts.append(wire.write_tensor(torch.tensor(ids, dtype=torch.int64)))
        known = self.memory.known(ids)
        old = [sample for sample, seen in zip(ids, known.tolist(), strict=True) if seen]
        change = activation.detach()[known].float().cpu()
        change = change - self.memory.recall(old).view(change.shape)
        payloads = [
            self.first.encode(activation.detach()[~known], seed_of("first", step)),
            self.codec.encode(change, seed_of("up", step)),
        ]
        self._decode_delta(payloads, ids, known, old)
        return b"".join(parts + payloads), samples

    def decode(self, body, samples, training):
        """(activation, labels or None) of a body; PayloadError if `encode` does not write such a body."""
        if not 1 <= samples <= self.agreement.max_batch:
            raise PayloadError(f"batch: got {samples} samples, expected 1 to {self.agreement.max_batch}")
        labels = self._label_bytes(samples)
        if self.memory is None or not training:
            codec = self.first or self.codec
            sections = wire.read_sections(body, [labels, codec.nbytes(samples)])
            return codec.decode(sections[1], samples), self._decode_labels(sections[0], samples)
        if len(body) < labels + 8 * samples:
            raise PayloadError(f"body: got {len(body)} bytes, expected labels and ids of {samples} samples first")
        ids = wire.read_tensor(body[labels : labels + 8 * samples], torch.int64, (samples,)).tolist()
        if len(set(ids)) != samples:
            raise PayloadError("batch: a sample id occurs twice")
        known = self.memory.known(ids)
        old = [sample for sample, seen in zip(ids, known.tolist(), strict=True) if seen]
        sizes = [labels, 8 * samples, self.first.nbytes(samples - len(old)), self.codec.nbytes(len(old))]
        sections = wire.read_sections(body, sizes)
        targets = self._decode_labels(sections[0], samples)
        return self._decode_delta(sections[2:], ids, known, old), targets

    def _decode_delta(self, payloads, ids, known, old):
        first = self.first.decode(payloads[0], len(ids) - len(old))
        change = self.codec.decode(payloads[1], len(old))
        values = torch.empty(len(ids), *self.agreement.shape)
        values[~known] = first
        values[known] = change + self.memory.recall(old).view(change.shape)
        self.memory.remember(ids, values.view(len(ids), -1))
        return values

    def _checked_ids(self, ids, samples):
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids) if ids is not None else None
        if ids is not None and not all(map(_is_id, ids)):
            raise ConfigError(f"ids: got {ids[:3]}…, expected integers of 64 bits")
        if ids is None or len(ids) != samples or len(set(ids)) != samples:
            got = "none" if ids is None else f"{len(ids)}, {len(set(ids))} of them different"
            raise ConfigError(f"ids: got {got}, expected a different integer for each of the {samples} samples")
        return ids

    def _encode_labels(self, labels, samples):
        if not isinstance(labels, torch.Tensor) or labels.shape != (samples, *self.agreement.label_shape):
            got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else labels
            raise ConfigError(f"labels: got {got}, expected a tensor of shape {(samples, *self.agreement.label_shape)}")
        sent = labels.to(self._label_type)
        if not torch.equal(sent.to(labels.dtype), labels):
            raise ConfigError(f"labels: got values that do not fit into {self.agreement.labels}")
        return wire.write_tensor(sent)

    def _decode_labels(self, section, samples):
        if self._label_type is None:
            return None
        labels = wire.read_tensor(section, self._label_type, (samples, *self.agreement.label_shape))
        if labels.dtype.is_floating_point:
            if not bool(torch.isfinite(labels).all()):
                raise PayloadError("labels: an entry is not finite")
            return labels
        return labels.long()


def _is_id(value):
    return isinstance(value, numbers.Integral) and -(2**63) <= value < 2**63
