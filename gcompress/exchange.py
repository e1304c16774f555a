"""The mean (or sum) over ranks of compressed gradients, for any engine (see schedule.py).

allgather: every rank receives every other's payload, and decodes and adds them all. One
    round, one encoding; a rank sends N - 1 payloads.
twophase: every parameter is cut into pieces, each owned by a rank, as if the ranks were each
    other's parameter servers. All-to-all: every rank sends its encoded pieces to their owners,
    which decode and add them in float32 and encode the mean again, with an error feedback of
    their own. All-gather: the owners send that to all. A rank sends 2 (N - 1) / N payloads.
    Parameters travel in buckets, each on its way as soon as its last gradient is there.
summed: the engine's own all-reduce adds the payloads of a `summable` compressor.
"""

import logging
import zlib

import torch

from . import packing
from .compressors import Context
from .compressors.base import u32_bytes
from .errors import ConfigError, ExchangeError, PayloadError
from .feedback import ErrorFeedback, new_memory
from .plan import Plan
from .policy import as_policy
from .report import Report
from .schedule import Schedule

log = logging.getLogger(__name__)


class GradientExchange:
    """One rank's side of exchanging a model's gradients: policy, memory, report.

    Args:
        policy: what `gcompress.as_policy` takes, or None when nothing is compressed and
            the exchange only counts.
        engine: see schedule.py; may be None when policy is.
    """

    def __init__(self, policy, engine=None):
        self.policy = None if policy is None else as_policy(policy)
        self.engine = engine
        self.report = Report()
        self.plan = None
        # False: results are not looked at before they are waited for, since the ranks have yet to compare
        # their configurations, and a rank that refused another one's bytes would end alone.
        self.agreed = True
        self._schedule = Schedule()
        self._waiting = {}  # bucket number: {name: what was encoded} until it is complete
        self._tasks = {}  # bucket number: its task of this step
        self._feedback = new_memory(self.policy) if self.policy else None
        self._owner_feedback = ErrorFeedback()  # by the piece's key
        self._memories = {}  # what summable compressors remember, by parameter

    def compressor_for(self, name, numel):
        """The compressor that `start` would use, or None where the engine's own all-reduce is to be used."""
        return self.policy.compressor_for(name, numel, step=self.report.steps) if self.policy else None

    def prepare(self, shapes):
        """Plan the exchange of {name: shape}, in the model's order, for the engine's number of ranks.

        Logs the plan on rank 0. `start` plans a parameter that is not in it by itself.
        """
        self.plan = Plan(self.policy, shapes, self.engine.world_size())
        self._owner_feedback.retain(self._owned_pieces())
        if self.engine.rank() == 0:
            log.info("gradients travel by\n%s", self.plan)

    def _owned_pieces(self):
        """{key in the owner's feedback: entries} of the pieces that are this rank's."""
        rank = self.engine.rank()
        return {
            piece.key(name): piece.numel
            for name, entry in self.plan.entries.items()
            for piece in entry.pieces
            if piece.owner == rank
        }

    def _entry(self, name, shape):
        """The parameter's entry in a plan for as many ranks as there are now."""
        entries = self.plan.entries if self.plan else {}
        changed = name not in entries or entries[name].shape != shape
        if changed or self.plan.world_size != self.engine.world_size():
            self.prepare({**{other: entry.shape for other, entry in entries.items()}, name: shape})
        return self.plan.entries[name]

    def start(self, name, gradient, *, average=True):
        """Encode a gradient and start its exchange; move those under way.

        With two-phase, the exchange of a bucket starts when all its gradients are there.

        Returns a function that waits and returns the mean (or sum) over ranks of what each
        rank encoded, with the gradient's shape and type and the same bits on every rank. It
        must not be called before all gradients of the step were started.
        """
        entry, task = self._entry(name, gradient.shape), None
        if entry.exchange == "twophase":
            self._fill_bucket(name, gradient, entry.bucket, average)
        elif entry.exchange == "summed":
            task = self._schedule.start(self.engine, name, self._summed(name, gradient, average))
        else:
            task = self._schedule.start(self.engine, name, self._all_gather({name: gradient}, average))
        if self.agreed:
            self._schedule.advance(self.engine)
        ctx = Context(gradient.shape, gradient.dtype)

        def finish():
            means = self._schedule.wait(self.engine, task or self._task_of(name, entry.bucket))
            return means[name].to(ctx.dtype).view(ctx.shape)

        return finish

    def start_bucket(self, gradients, *, average=True):
        """Encode and start all of {name: gradient}, for engines that form buckets themselves.

        Every parameter takes its own exchange; those of one exchange travel together, and what is
        not compressed is all-reduced. On an engine that is `in_order`, all ranks must bring the
        same buckets in the same order.

        Returns a function that waits and returns {name: mean or sum over ranks}; its method
        `done()` moves the exchanges on and tells whether there is anything to wait for.
        """
        ways = {}
        for name, gradient in gradients.items():
            ways.setdefault(self._entry(name, gradient.shape).exchange, {})[name] = gradient
        tasks, first = [], next(iter(gradients))
        for way, members in ways.items():
            if way == "summed":
                steps = {name: self._summed(name, gradient, average) for name, gradient in members.items()}
            elif way == "twophase":
                encoded = {name: self._encoded_pieces(name, gradient) for name, gradient in members.items()}
                steps = {f"twophase.{first}": self._two_phase(encoded, average)}
            elif way == "allgather":
                steps = {f"allgather.{first}": self._all_gather(members, average)}
            else:
                steps = {f"allreduce.{first}": self._uncompressed(members, average)}
            tasks += [self._schedule.start(self.engine, name, each) for name, each in steps.items()]
        self._schedule.advance(self.engine)
        return _Bucket(self._schedule, self.engine, tasks, gradients)

    def _fill_bucket(self, name, gradient, number, average):
        members, waiting = self.plan.buckets[number], self._waiting.setdefault(number, {})
        waiting[name] = self._encoded_pieces(name, gradient)
        if len(waiting) == len(members):
            encoded = {member: waiting[member] for member in members}
            del self._waiting[number]
            steps = self._two_phase(encoded, average)
            self._tasks[number] = self._schedule.start(self.engine, self.first_name(name), steps)

    def _task_of(self, name, number):
        if number not in self._tasks:
            missing = set(self.plan.buckets[number]) - set(self._waiting.get(number, ()))
            raise ExchangeError(f"gradient {name!r}: its bucket waits for {', '.join(sorted(missing))}")
        return self._tasks[number]

    def first_name(self, name):
        """The engine's name of the first operation in which a parameter travels."""
        entry = self.plan.entries[name]
        return f"bucket.{entry.bucket}.{self.plan.buckets[entry.bucket][0]}" if entry.bucket >= 0 else name

    def _seed(self, name, *what):
        """32 bits that differ from step to step, and for what differs."""
        return zlib.crc32("/".join(map(str, (name, self.report.steps, *what))).encode())

    def _memory_for(self, compressor):
        return self._feedback if self.policy.feedback_for(compressor) else None

    def _all_gather(self, gradients, average):
        """All-gather of {name: gradient} in one payload."""
        world_size, compressors, payloads = self.engine.world_size(), {}, []
        for name, gradient in gradients.items():
            compressor = compressors[name] = self.compressor_for(name, gradient.numel())
            coder = (self._memory_for(compressor) or _Forgetful).compress
            payload, _ = coder(name, gradient, compressor, seed=self._seed(name, self.engine.rank()))
            self.report.add_all_gather(gradient.numel(), payload.numel(), world_size)
            payloads.append(payload)
        payload = torch.cat(payloads) if len(payloads) > 1 else payloads[0]
        sizes = [payload.numel()] * world_size
        if not all(compressor.fixed_size for compressor in compressors.values()):
            lengths = yield "allgather", u32_bytes(payload.numel(), payload.device), [4] * world_size
            sizes = packing.unpack_bits(lengths, world_size, 32).tolist()
            self._check_sizes(sizes, gradients, compressors)
            self.report.add_all_gather(0, 4, world_size)
        gathered = yield "allgather", payload, sizes
        rows = _rows(gathered, sizes, f"gradients {', '.join(gradients)}")
        means = {}
        for name, gradient in gradients.items():
            means[name], rows = decode_sum(compressors[name], rows, gradient.numel(), name)
            if average:
                means[name].mul_(1.0 / world_size)
        _check_used(rows, f"gradients {', '.join(gradients)}")
        return means

    def _check_sizes(self, sizes, gradients, compressors):
        most = sum(compressors[name].nbytes(gradient.numel()) for name, gradient in gradients.items())
        if max(sizes) > most:
            raise PayloadError(
                f"gradients {', '.join(gradients)}: a rank announces {max(sizes)} bytes, expected at most {most}: "
                "do all ranks have the same model?"
            )

    def _uncompressed(self, gradients, average):
        """All-reduce of {name: gradient} in one tensor, float32 unless one is float64."""
        parts = [gradient.detach().reshape(-1) for gradient in gradients.values()]
        exact = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        flat = torch.cat([part.to(exact) for part in parts])
        self.report.add_all_reduce(flat.numel(), flat.numel() * flat.element_size(), self.engine.world_size())
        total = yield "allreduce", flat, "sum"
        if average:
            total.mul_(1.0 / self.engine.world_size())
        return dict(zip(gradients, total.split([part.numel() for part in parts]), strict=True))

    def _summed(self, name, gradient, average):
        world_size, compressor = self.engine.world_size(), self.compressor_for(name, gradient.numel())
        feedback = self._memory_for(compressor)
        corrected = (feedback or _Forgetful).corrected(name, gradient)
        memory = self._memories.setdefault(name, {})
        before = dict(memory)
        rounds = compressor.sum_rounds(
            corrected, shape=gradient.shape, seed=self._seed(name), world_size=world_size, memory=memory
        )
        self.report.add_all_reduce(gradient.numel(), compressor.summed_nbytes(gradient.shape, world_size), world_size)
        result = None
        while True:
            try:
                tensor, op = rounds.send(result)
            except StopIteration as stop:
                total, own = stop.value
                break
            result = yield "allreduce", tensor, op
        if feedback:
            feedback.keep(name, corrected, own, sparse=compressor.sparse)
        if not bool(torch.isfinite(total).all()):
            self._memories[name] = before
        return {name: total.mul_(1.0 / world_size) if average else total}

    def _encoded_pieces(self, name, gradient):
        """(compressor, payloads of the pieces); what they lost is remembered as for the whole."""
        compressor = self.compressor_for(name, gradient.numel())
        feedback = self._memory_for(compressor)
        corrected = (feedback or _Forgetful).corrected(name, gradient)
        decoded = torch.empty_like(corrected) if feedback else None
        entry, payloads = self.plan.entries[name], []
        for piece in entry.pieces:
            part = corrected[piece.start : piece.stop].view(entry.shape_of(piece))
            payload, _ = compressor.compress(part, seed=self._seed(name, self.engine.rank(), piece.start))
            payloads.append(payload)
            if feedback:
                compressor.decode_into(payload, decoded[piece.start : piece.stop])
        if feedback:
            feedback.keep(name, corrected, decoded, sparse=compressor.sparse)
        return compressor, payloads

    def _two_phase(self, encoded, average):
        """All-to-all and all-gather of {name: (compressor, payloads of its pieces)}."""
        world_size, rank = self.engine.world_size(), self.engine.rank()
        owned = [[] for _ in range(world_size)]  # (name, piece, compressor) in the order in which they travel
        outgoing = [[] for _ in range(world_size)]
        for name, (compressor, payloads) in encoded.items():
            for piece, payload in zip(self.plan.entries[name].pieces, payloads, strict=True):
                owned[piece.owner].append((name, piece, compressor))
                outgoing[piece.owner].append(payload)
        sizes = [sum(payload.numel() for payload in payloads) for payloads in outgoing]
        self._count_two_phase(encoded, sizes)
        what = f"gradients {', '.join(encoded)}"
        packed = torch.cat([payload for payloads in outgoing for payload in payloads])
        received = yield "alltoall", packed, sizes, [sizes[rank]] * world_size
        rows = _rows(received, [sizes[rank]] * world_size, what)
        again = [packed[:0]]
        for name, piece, compressor in owned[rank]:
            total, rows = decode_sum(compressor, rows, piece.numel, name)
            again.append(self._encoded_mean(name, piece, compressor, total, average))
        gathered = yield "allgather", torch.cat(again), sizes
        means = {name: packed.new_empty(self.plan.entries[name].numel, dtype=torch.float32) for name in encoded}
        for pieces, row in zip(owned, _rows(gathered, sizes, what), strict=True):
            for name, (_, start, stop), compressor in pieces:
                size = compressor.nbytes(stop - start)
                compressor.decode_into(row[:size], means[name][start:stop])
                row = row[size:]
        return means

    def _encoded_mean(self, name, piece, compressor, total, average):
        """The payload of the mean (or sum) of a piece that this rank owns."""
        if average:
            total.mul_(1.0 / self.engine.world_size())
        total = total.view(self.plan.entries[name].shape_of(piece))
        coder = (self._owner_feedback if self.policy.feedback_for(compressor) else _Forgetful).compress
        payload, _ = coder(piece.key(name), total, compressor, seed=self._seed(name, "mean", piece.start))
        return payload

    def _count_two_phase(self, encoded, sizes):
        world_size, own = self.engine.world_size(), sizes[self.engine.rank()]
        numel = sum(self.plan.entries[name].numel for name in encoded)
        self.report.add(numel, sum(sizes) + own, sum(sizes) - own + (world_size - 1) * own, world_size)

    def advance(self):
        """Move the exchanges under way as far as they go without waiting; returns whether any moved."""
        return self._schedule.advance(self.engine)

    def end_step(self):
        """To be called once after all gradients of a step."""
        self._tasks.clear()
        self.report.end_step()

    def abandon_step(self):
        """Forget what is under way, after the engine has failed or was reset."""
        self._schedule.clear()
        self._waiting.clear()
        self._tasks.clear()

    def state_dict(self):
        """This rank's memory and counts: save one per rank and load each on its own rank."""
        return {
            "rank": self.engine.rank() if self.engine else 0,
            "world_size": self.engine.world_size() if self.engine else 1,
            "policy": self.policy.to_dict() if self.policy else None,
            "report": self.report.as_dict(),
            "feedback": self._feedback.state_dict() if self._feedback else {},
            "owner_feedback": self._owner_feedback.state_dict(),
            "memories": {name: dict(memory) for name, memory in self._memories.items()},
        }

    def memory_vectors(self, state):
        """What a `state_dict()` owes (nothing if None), as one float32 vector for each kind and parameter.

        "residual/NAME", with momentum correction "velocity/NAME", and "owner/NAME" for what owners
        of pieces owe. All ranks of one plan have the same keys.
        """
        vectors = {}
        for kind in self._feedback.kinds if self._feedback else ():
            own = self._feedback.of_kind(state["feedback"], kind) if state else {}
            for name, entry in self.plan.entries.items():
                if entry.compressor:
                    vectors[f"{kind}/{name}"] = own[name].clone() if name in own else torch.zeros(entry.numel)
        for name, entry in self.plan.entries.items():
            if entry.compressor and self.policy.feedback_for(entry.compressor):
                vectors[f"owner/{name}"] = torch.zeros(entry.numel)
        for key, residual in state["owner_feedback"].items() if state else ():
            name, _, borders = key.removesuffix("]").rpartition("[")
            start, stop = map(int, borders.split(":"))
            vectors[f"owner/{name}"][start:stop] = residual
        return vectors

    def load_memory_vectors(self, vectors, memories, steps):
        """Take up `memory_vectors`, of which this rank takes the pieces that it owns, and what all ranks share."""
        if self._feedback:
            kinds = {kind: {} for kind in self._feedback.kinds}
            for key, vector in vectors.items():
                kind, _, name = key.partition("/")
                if kind in kinds:
                    kinds[kind][name] = vector
            self._feedback.load_kinds(kinds)
        self._owner_feedback.load_state_dict(
            {
                piece.key(name): vectors[f"owner/{name}"][piece.start : piece.stop]
                for name, entry in self.plan.entries.items()
                for piece in entry.pieces
                if piece.owner == self.engine.rank() and f"owner/{name}" in vectors
            }
        )
        self._memories = {name: dict(memory) for name, memory in memories.items()}
        self.report.steps = steps

    def load_state_dict(self, state):
        """Go on from `state_dict()`; ConfigError if it was another policy's or another rank's."""
        policy = self.policy.to_dict() if self.policy else None
        if (as_policy(state["policy"]).to_dict() if state["policy"] else None) != policy:
            raise ConfigError(f"policy: the saved state is of {state['policy']}, this run uses {policy}")
        owned = state["owner_feedback"]
        foreign = set(owned) - set(self._owned_pieces()) if self.plan else ()
        if foreign:
            raise ConfigError(
                f"state: got what rank {state['rank']} of {state['world_size']} owes for {min(foreign)}, "
                f"expected a state that rank {self.engine.rank()} of {self.engine.world_size()} saved"
            )
        self.report.load(state["report"])
        if self._feedback:
            self._feedback.load_state_dict(state["feedback"])
        self._owner_feedback.load_state_dict(owned)
        self._memories = {name: dict(memory) for name, memory in state["memories"].items()}


class _Bucket:
    """What `start_bucket` returns."""

    def __init__(self, schedule, engine, tasks, gradients):
        self._schedule, self._engine, self._tasks = schedule, engine, tasks
        self._contexts = {name: Context(gradient.shape, gradient.dtype) for name, gradient in gradients.items()}

    def done(self):
        self._schedule.advance(self._engine)
        return all(task.done for task in self._tasks)

    def __call__(self):
        means = {}
        for task in self._tasks:
            means.update(self._schedule.wait(self._engine, task))
        return {name: means[name].to(ctx.dtype).view(ctx.shape) for name, ctx in self._contexts.items()}


class _Forgetful:
    """What ErrorFeedback does, without memory."""

    @staticmethod
    def compress(name, gradient, compressor, *, seed):
        return compressor.compress(gradient, seed=seed)

    @staticmethod
    def corrected(name, gradient):
        return gradient.detach().reshape(-1).to(torch.float32).contiguous()


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


def decode_sum(compressor, rows, numel, name):
    """Decode a payload at the start of every rank's row.

    Returns:
        Their float32 sum, added in rank order, and what follows them in each row.
    """
    total, rest = torch.empty(numel, dtype=torch.float32, device=rows[0].device), []
    for rank, row in enumerate(rows):
        try:
            size = compressor.payload_nbytes(row, numel)
            compressor.decode_into(row[:size], total, add=rank > 0)
        except PayloadError as error:
            raise PayloadError(f"gradient {name!r} from rank {rank}: {error}") from None
        rest.append(row[size:])
    return total, rest
