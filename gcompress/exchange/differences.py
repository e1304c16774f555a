"""An all-gather of sharded weights that sends differences: how a shard has changed since all ranks last heard of it.

Every rank keeps a reference: the weights of all ranks as they were last told. The owner of a shard encodes its shard
minus the reference; all add the decoded difference to the reference, and use that as the weights, the owner too.
What an encoding loses is part of the next difference, so that no other error feedback is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..compressors import Compressor
from ..errors import ConfigError, PayloadError
from ..memory import checked_copies
from ..policy import Policy
from .engine import Engine, result
from .report import Report

# What a rank has to say of a shard. A rank may find another thing than others; all do what `_agreed` says.
NOTHING, DIFFERENCE, WHOLE, AGAIN = range(4)
# A difference larger than this part of the shard is sent whole: other weights have been loaded.
LARGEST_DIFFERENCE = 0.5
FLAGS, PAYLOADS = 1, 2  # lanes; gradients may be under way in lane 0


class Shard(NamedTuple):
    """Entries start to stop of each rank's row: its shard of one parameter, with torch's padding."""

    name: str
    start: int
    stop: int
    shape: torch.Size
    compressor: Compressor | None


class WeightDifferences:
    """The weights of one module as all ranks know them: N rows, one from each rank.

    Args:
        policy: a Policy. Compressors must be of fixed size; feedback and exchange do not matter.
        engine: see engine.py.
        shapes: {name: shape of a rank's padded shard, the same on all ranks}, in the order of a row.
        report: counts the bytes; shared by all modules.

    Attributes:
        numel: entries of a row.
    """

    def __init__(self, policy: Policy, engine: Engine, shapes: Mapping[str, Sequence[int]], report: Report):
        self._engine, self._report, self._shards, self.numel = engine, report, [], 0
        for name, shape in shapes.items():
            size = torch.Size(shape)
            compressor = policy.compressor_for(name, size.numel())
            if compressor is not None and not compressor.fixed_size:
                raise ConfigError(f"weights: got {compressor}, expected one whose payloads have a fixed size")
            self._shards.append(Shard(name, self.numel, self.numel + size.numel(), size, compressor))
            self.numel += size.numel()
        self._name = f"weights.{next(iter(shapes))}"
        self._known: torch.Tensor | None = None  # float32, N x numel, the same bits on all ranks
        self._told: torch.Tensor | None = None  # this rank's row when it was last looked at
        self._loaded: torch.Tensor | None = None  # this rank's row of `_known`, from a state
        self._updates = 0  # seeds compressors that round at random

    def gather(self, row: torch.Tensor, out: torch.Tensor, *, quiet: bool) -> None:
        """Write the weights of all ranks to `out`; all ranks must call it with the same `quiet`.

        Args:
            row: this rank's shards, 1-D, `numel` entries; may be part of `out`.
            out: N x numel; it may be of another type.
            quiet: nothing can have changed since the last call, as within a backward pass: nothing is sent.
        """
        known, sent = self._known, 0
        if known is None or not quiet:
            known, sent = self._update(row)
        out.copy_(known)
        self._report.add_weights(self.numel, sent, self._engine.world_size())

    def _update(self, row):
        """Tell all ranks how this one's row has changed; returns (the reference, the bytes that were sent)."""
        own = torch.tensor(self._news(row), dtype=torch.uint8, device=row.device)
        sizes = [own.numel()] * self._engine.world_size()
        gathered = self._gathered(own, FLAGS, sizes).view(-1, own.numel())
        if bool((gathered == AGAIN).all()):
            restoring = self._restore(row)
            known, sent = self._update(row)
            return known, own.numel() + restoring + sent
        news = [DIFFERENCE if int(each) == DIFFERENCE else (int(each) and WHOLE) for each in gathered.amax(0)]
        if self._known is None:
            self._known = torch.zeros(len(sizes), self.numel, device=row.device)
        self._loaded, self._told = None, row.clone()
        changed = [(shard, each) for shard, each in zip(self._shards, news, strict=True) if each != NOTHING]
        if not changed:
            return self._known, own.numel()
        payload = torch.cat([self._encoded(row, *each) for each in changed])
        rows = self._gathered(payload, PAYLOADS, [payload.numel()] * len(sizes)).view(len(sizes), -1)
        for rank, received in enumerate(rows):
            self._decode(rank, received, changed, row.dtype)
        self._updates += 1
        return self._known, own.numel() + payload.numel()

    def _news(self, row):
        """What this rank has to say of each shard."""
        if self._known is None:
            return [WHOLE if self._loaded is None else AGAIN] * len(self._shards)
        return [self._news_of(shard, row[shard.start : shard.stop]) for shard in self._shards]

    def _news_of(self, shard, values):
        if self._told is not None and torch.equal(values, self._told[shard.start : shard.stop]):
            return NOTHING
        if shard.compressor is None:
            return WHOLE
        lag = torch.linalg.vector_norm(self._difference(shard, values))
        near = lag <= LARGEST_DIFFERENCE * torch.linalg.vector_norm(values.float())  # not if it is not finite
        return DIFFERENCE if bool(near) and bool(lag.isfinite()) else WHOLE

    def _difference(self, shard, values):
        return values.float() - self._known[self._engine.rank(), shard.start : shard.stop]

    def _encoded(self, row, shard, news):
        """The payload of this rank's shard, 1-D uint8."""
        values = row[shard.start : shard.stop]
        if news == WHOLE:
            return values.contiguous().view(torch.uint8)
        seed = zlib.crc32(f"{shard.name}/{self._updates}/{self._engine.rank()}".encode())
        return shard.compressor.compress(self._difference(shard, values).view(shard.shape), seed=seed)[0]

    def _decode(self, rank, payload, changed, dtype):
        """Bring the reference up to date with what a rank has sent."""
        for shard, news in changed:
            known = self._known[rank, shard.start : shard.stop]
            size = known.numel() * dtype.itemsize if news == WHOLE else shard.compressor.nbytes(known.numel())
            part, payload = payload[:size], payload[size:]
            try:
                if news == WHOLE:
                    known.copy_(part.clone().view(dtype))  # at an address that this type may have
                else:
                    shard.compressor.decode_into(part, known, add=True)
            except PayloadError as error:
                raise PayloadError(f"weights {shard.name!r} from rank {rank}: {error}") from None

    def _restore(self, row):
        """Make the reference of what every rank has loaded; returns the bytes that were sent."""
        payload = self._loaded.to(row.device).view(torch.uint8)
        sizes = [payload.numel()] * self._engine.world_size()
        self._known = self._gathered(payload, PAYLOADS, sizes).view(torch.float32).view(len(sizes), -1).clone()
        self._told, self._loaded = self._told.to(row), None
        return payload.numel()

    def _gathered(self, payload, lane, sizes):
        operation = self._engine.allgather(f"{self._name}.{lane}", lane, payload, sizes)
        return result(operation, f"weights {', '.join(shard.name for shard in self._shards)}")

    def state_dict(self) -> dict:
        """What this rank needs to go on to the bit: tensors of its own row, and a count."""
        known = self._loaded if self._known is None else self._known[self._engine.rank()]
        told = self._told
        if known is None or told is None:
            return {}
        return {"known": known.clone(), "told": told.float(), "updates": self._updates}

    def check(self, saved: dict) -> None:
        """ConfigError if it is no `state_dict()` of such weights."""
        if saved == {}:
            return
        if not isinstance(saved, dict) or type(saved.get("updates")) is not int:
            raise ConfigError(f"weights: got {type(saved).__name__}, expected what state_dict() returned")
        rows = {key: saved.get(key) for key in ("known", "told")}
        checked_copies("weights", rows, dict.fromkeys(rows, self.numel))

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict()`, on all ranks before the same forward pass; from {} all weights are sent again."""
        self.check(saved)
        self._known = self._told = self._loaded = None
        if saved:
            self._loaded, self._updates = saved["known"].clone(), saved["updates"]
            self._told = saved["told"].clone()
