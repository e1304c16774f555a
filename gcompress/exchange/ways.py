"""The ways in which gradients travel: all-gather, two-phase, summed, and the plain all-reduce.

Each is a generator for `Schedule`: it yields the collective operation that it wants next, and is sent the result.

allgather: every rank receives every other's payload, and decodes and adds them all. One
    round, one encoding; a rank sends N - 1 payloads.
twophase: every parameter is cut into pieces, each owned by a rank, as if the ranks were each
    other's parameter servers. All-to-all: every rank sends its encoded pieces to their owners,
    which decode and add them in float32 and encode the mean again, with an error feedback of
    their own. All-gather: the owners send that to all. A rank sends 2 (N - 1) / N payloads.
    Parameters travel in buckets, each on its way as soon as its last gradient is there.
summed: the engine's own all-reduce adds the payloads of a `summable` compressor.
"""

import contextlib
import zlib
from typing import NamedTuple

import torch

from .. import packing
from ..compressors import Compressor
from ..errors import PayloadError
from ..feedback import NoFeedback, Slice
from ..memory import Scratch
from ..packing import u32_bytes
from .plan import Piece
from .summed import sum_over_ranks


class Encoded(NamedTuple):
    """A gradient that is encoded for two-phase."""

    compressor: Compressor
    payloads: list[torch.Tensor]  # of its pieces, 1-D uint8
    place: torch.Tensor  # where its mean is to be, 1-D float32


class OwnedPiece(NamedTuple):
    """A piece of a parameter on its way to its owner and back."""

    name: str
    piece: Piece
    compressor: Compressor


class Ways:
    """The ways of one rank's exchange.

    Args:
        exchange: the GradientExchange, whose plan, memory and report they use.
    """

    def __init__(self, exchange):
        self._exchange = exchange
        self._scratch = Scratch()

    def all_gather(self, gradients, places):
        """All-gather of {name: gradient} in one payload; the means come to {name: place}."""
        world_size, compressors, payloads = self._exchange.engine.world_size(), {}, []
        for name, gradient in gradients.items():
            compressor = compressors[name] = self._exchange.compressor_for(name, gradient.numel())
            coder = (self._memory_for(compressor, name) or NoFeedback).compress
            payload, _ = coder(name, gradient, compressor, seed=self._seed(name, self._exchange.engine.rank()))
            self._exchange.report.add_all_gather(gradient.numel(), payload.numel(), world_size)
            payloads.append(payload)
        payload = torch.cat(payloads) if len(payloads) > 1 else payloads[0]
        sizes = [payload.numel()] * world_size
        if not all(compressor.fixed_size for compressor in compressors.values()):
            lengths = yield "allgather", u32_bytes(payload.numel(), payload.device), [4] * world_size
            sizes = packing.unpack_bits(lengths, world_size, 32).tolist()
            self._check_sizes(sizes, gradients, compressors)
            self._exchange.report.add_all_gather(0, 4, world_size)
        gathered = yield "allgather", payload, sizes
        rows = _rows(gathered, sizes, f"gradients {', '.join(gradients)}")
        for name, place in places.items():
            rows = decode_sum(compressors[name], rows, place, self._factor(), name)
        _check_used(rows, f"gradients {', '.join(gradients)}")
        return places

    def _factor(self):
        """What makes the wanted result of the ranks' sum."""
        return 1.0 / self._exchange.engine.world_size() if self._exchange.average else 1.0

    def _check_sizes(self, sizes, gradients, compressors):
        most = sum(compressors[name].nbytes(gradient.numel()) for name, gradient in gradients.items())
        if max(sizes) > most:
            raise PayloadError(
                f"gradients {', '.join(gradients)}: a rank announces {max(sizes)} bytes, expected at most {most}: "
                "do all ranks have the same model?"
            )

    def all_reduce(self, gradients):
        """All-reduce of {name: gradient} in one tensor, float32 unless one is float64."""
        parts = [_as_real(gradient.detach()).reshape(-1) for gradient in gradients.values()]
        exact = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        flat = torch.cat([part.to(exact) for part in parts])
        self._exchange.report.add_all_reduce(
            flat.numel(), flat.numel() * flat.element_size(), self._exchange.engine.world_size()
        )
        total = yield "allreduce", flat, "sum"
        total.mul_(self._factor())
        totals = zip(gradients.items(), total.split([part.numel() for part in parts]), strict=True)
        return {
            name: torch.view_as_complex(part.view(-1, 2)) if gradient.is_complex() else part
            for (name, gradient), part in totals
        }

    def summed(self, name, gradient):
        world_size, compressor = (
            self._exchange.engine.world_size(),
            self._exchange.compressor_for(name, gradient.numel()),
        )
        self._exchange.report.add_all_reduce(
            gradient.numel(), compressor.summed_nbytes(gradient.shape, world_size), world_size
        )
        total = yield from sum_over_ranks(
            name,
            gradient,
            compressor,
            self._memory_for(compressor, name),
            self._exchange.memories,
            seed=self._seed(name),
            world_size=world_size,
        )
        return {name: total.mul_(self._factor())}

    def encoded_pieces(self, name, gradient, place):
        """The gradient, Encoded; what its pieces lost is kept as one residual."""
        compressor, entry = self._exchange.compressor_for(name, gradient.numel()), self._exchange.plan.entries[name]
        rank = self._exchange.engine.rank()
        parts = [
            Slice(piece.start, piece.stop, entry.shape_of(piece), self._seed(name, rank, piece.start))
            for piece in entry.pieces
        ]
        coder = self._memory_for(compressor, name) or NoFeedback
        return Encoded(compressor, coder.compress_parts(name, gradient, compressor, parts), place)

    def two_phase(self, encoded):
        """All-to-all and all-gather of {name: Encoded}."""
        world_size, rank = self._exchange.engine.world_size(), self._exchange.engine.rank()
        owned = [[] for _ in range(world_size)]  # OwnedPieces by owner, in the order in which they travel
        outgoing = [[] for _ in range(world_size)]
        for name, (compressor, payloads, _) in encoded.items():
            for piece, payload in zip(self._exchange.plan.entries[name].pieces, payloads, strict=True):
                owned[piece.owner].append(OwnedPiece(name, piece, compressor))
                outgoing[piece.owner].append(payload)
        sizes = [sum(payload.numel() for payload in payloads) for payloads in outgoing]
        self._count_two_phase(encoded, sizes)
        what = f"gradients {', '.join(encoded)}"
        packed = torch.cat([payload for payloads in outgoing for payload in payloads])
        received = yield "alltoall", packed, sizes, [sizes[rank]] * world_size
        rows = _rows(received, [sizes[rank]] * world_size, what)
        again = [packed[:0]]
        for name, piece, compressor in owned[rank]:
            total = self._scratch.floats(piece.numel, packed.device)
            rows = decode_sum(compressor, rows, total, self._factor(), name)
            again.append(self._encoded_mean(name, piece, compressor, total))
        gathered = yield "allgather", torch.cat(again), sizes
        means = {name: each.place for name, each in encoded.items()}
        for pieces, row in zip(owned, _rows(gathered, sizes, what), strict=True):
            for name, (_, start, stop), compressor in pieces:
                size = compressor.nbytes(stop - start)
                compressor.decode_into(row[:size], means[name][start:stop])
                row = row[size:]
        return means

    def _encoded_mean(self, name, piece, compressor, total):
        """The payload of the mean (or sum) of a piece that this rank owns."""
        # The residual waits if no rank had a gradient; this one having had one is enough to know otherwise.
        remembers = self._exchange.policy.feedback_for(compressor) and not (
            name in self._exchange.absent and not bool(total.any())
        )
        total = total.view(self._exchange.plan.entries[name].shape_of(piece))
        coder = (self._exchange.owner_feedback if remembers else NoFeedback).compress
        payload, _ = coder(piece.key(name), total, compressor, seed=self._seed(name, "mean", piece.start))
        return payload

    def _count_two_phase(self, encoded, sizes):
        world_size, own = self._exchange.engine.world_size(), sizes[self._exchange.engine.rank()]
        numel = sum(self._exchange.plan.entries[name].numel for name in encoded)
        self._exchange.report.add(numel, sum(sizes) + own, sum(sizes) - own + (world_size - 1) * own, world_size)

    def _memory_for(self, compressor, name):
        return self._exchange.feedback if self.remembers(compressor, name) else None

    def remembers(self, compressor, name):
        return self._exchange.policy.feedback_for(compressor) and name not in self._exchange.absent

    def _seed(self, name, *what):
        """32 bits that differ from step to step, and for what differs."""
        again = [f"again {self._exchange.carried[name]}"] if name in self._exchange.carried else []
        return zlib.crc32("/".join(map(str, (name, self._exchange.steps, *what, *again))).encode())


def _as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _rows(tensor, sizes, what):
    """The ranks' parts of what lies one after the other."""
    if tensor.numel() != sum(sizes):
        raise PayloadError(
            f"{what}: got {tensor.numel()} bytes from {len(sizes)} ranks, expected {sum(sizes)}: "
            "do all ranks have the same model?"
        )
    return tensor.split(sizes)


def _check_used(rows, what):
    for rank, row in enumerate(rows):
        if row.numel():
            raise PayloadError(f"{what} from rank {rank}: {row.numel()} bytes are left over: have all the same model?")


def decode_sum(compressor, rows, out, factor, name):
    """Decode to `out` the sum, in rank order, of a payload at the start of every rank's row, times a factor.

    Returns what follows the payloads in each row.
    """
    numel, payloads, rest = out.numel(), [], []
    for rank, row in enumerate(rows):
        with _from_rank(rank, name):
            size = compressor.payload_nbytes(row, numel)
        payloads.append(row[:size])
        rest.append(row[size:])
    try:
        compressor.decode_sum(payloads, out, factor)
    except PayloadError:
        for rank, payload in enumerate(payloads):
            with _from_rank(rank, name):
                compressor.decode_into(payload, out)
        raise
    return rest


@contextlib.contextmanager
def _from_rank(rank, name):
    """Say whose payload it was that does not fit."""
    try:
        yield
    except PayloadError as error:
        raise PayloadError(f"gradient {name!r} from rank {rank}: {error}") from None
