"""The report of one rank: bytes handed to its engine and what that means on the network, times, errors of encoding."""

from __future__ import annotations

import dataclasses

from .encoding_errors import EncodingErrors
from .times import Times


@dataclasses.dataclass
class Report:
    """Gradient bytes of one rank, and where its time goes; payloads and uncompressed tensors alike are counted.

    sent_bytes: handed to the engine by this rank.
    wire_bytes: what this rank then has to send with the engine's ring algorithms, without
        protocol headers: (N - 1) times the payload for an all-gather among N ranks, what is
        for others in an all-to-all, 2 (N - 1) / N times the tensor for an all-reduce,
        and for parameter servers the payload once.
    within_node_bytes: of an exchange by nodes (docs/NODES.md), handed over for ranks of the same node; all the others
        are then of this rank's share of the gradients, and of what it sends to other nodes.
    pulled_bytes: received from parameter servers; with other exchanges it is not counted.
    fp32_bytes, fp16_bytes: the same gradients as float32 and float16 handed over whole;
    fp32_wire_bytes: and all-reduced as float32.
    last_step_bytes, last_step_fp32_bytes: sent_bytes and fp32_bytes of the last step alone.

    times: seconds by phase, see times.py; `print(report.times)` shows a table.
    encoding_errors: see `errors`.
    """

    steps: int = 0
    sent_bytes: int = 0
    wire_bytes: float = 0
    fp32_bytes: int = 0
    fp32_wire_bytes: float = 0
    last_step_bytes: int = 0
    pulled_bytes: int = 0
    last_step_fp32_bytes: int = 0
    within_node_bytes: int = 0
    _step_bytes: int = dataclasses.field(default=0, repr=False)
    _step_fp32_bytes: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        self.times, self.encoding_errors = Times(), EncodingErrors()

    @property
    def fp16_bytes(self) -> int:
        return self.fp32_bytes // 2

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than float32 were handed to the engine; 1 before anything was."""
        return self.fp32_bytes / self.sent_bytes if self.sent_bytes else 1.0

    @property
    def errors(self) -> dict[str, float]:
        """{parameter: relative squared error of this rank's encoding}, see `Results.measure_errors`; empty before."""
        return dict(self.encoding_errors.last)

    def add_all_gather(self, numel: int, payload_bytes: int, world_size: int) -> None:
        """Count a payload that stands for `numel` entries and goes to every other rank."""
        self.add(numel, payload_bytes, (world_size - 1) * payload_bytes, world_size)

    def add_all_reduce(self, numel: int, tensor_bytes: int, world_size: int) -> None:
        """Count a tensor of `numel` entries that is summed on the way."""
        self.add(numel, tensor_bytes, _ring(tensor_bytes, world_size), world_size)

    def add_reduce_scatter(self, numel: int, payload_bytes: int, own_bytes: int, world_size: int) -> None:
        """Count a payload of `numel` entries of which every rank gets its part, this one `own_bytes`."""
        self.add(numel, payload_bytes, payload_bytes - own_bytes, world_size)
        self.fp32_wire_bytes -= _ring(4 * numel, world_size) // 2  # of a ring all-reduce that is one half

    def add_weights(self, numel: int, payload_bytes: int, world_size: int) -> None:
        """Count what goes to every other rank in place of `numel` float32 weights."""
        self.add(numel, payload_bytes, (world_size - 1) * payload_bytes, world_size)
        self.fp32_wire_bytes += 4 * numel * (world_size - 1) - _ring(4 * numel, world_size)

    def add_push_pull(self, numel: int, pushed: int, pulled: int, world_size: int) -> None:
        """Count a payload that goes to a parameter server and the one that comes back."""
        self.pulled_bytes += pulled
        self.add(numel, pushed, pushed, world_size)

    def add(self, numel: int, sent: int, wire: float, world_size: int) -> None:
        """Count `sent` bytes handed over for `numel` entries, for which `wire` bytes leave this rank."""
        self.sent_bytes += sent
        self._step_bytes += sent
        self.wire_bytes += wire
        self.fp32_bytes += 4 * numel
        self._step_fp32_bytes += 4 * numel
        self.fp32_wire_bytes += _ring(4 * numel, world_size)

    def end_step(self) -> None:
        """Close the count of one optimizer step."""
        self.times.end_step()
        self.encoding_errors.end_step(self.steps)
        self.steps += 1
        self.last_step_bytes, self._step_bytes = self._step_bytes, 0
        self.last_step_fp32_bytes, self._step_fp32_bytes = self._step_fp32_bytes, 0

    def as_dict(self) -> dict[str, float]:
        """All figures, JSON-able: `counts`, and the seconds of `times` in this process."""
        return {**self.counts(), **self.times.as_dict()}

    def scalars(self, prefix: str = "gcompress/") -> dict[str, float]:
        """{name: value} of the last step, for whatever draws curves: bytes, seconds by phase, and the last errors.

        With TensorBoard: `for name, value in report.scalars().items(): writer.add_scalar(name, value, step)`.
        """
        sent, whole = self.last_step_bytes, self.last_step_fp32_bytes
        found = {"sent_bytes": sent, "ratio": whole / sent if sent else 1.0, **self.times.last_step_dict()}
        found.update({f"error/{name}": error for name, error in self.encoding_errors.last.items()})
        return {f"{prefix}{name}": float(value) for name, value in found.items()}

    def counts(self) -> dict[str, float]:
        """The figures that saved states hold: bytes and steps, which do not depend on the machine; JSON-able."""
        figures = {name: value for name, value in dataclasses.asdict(self).items() if not name.startswith("_")}
        return {**figures, "fp16_bytes": self.fp16_bytes, "ratio": self.ratio}

    def load(self, figures: dict[str, float]) -> None:
        """Continue the count of an earlier `counts()` or `as_dict()`; seconds are those of this process."""
        for field in dataclasses.fields(self):
            if field.name in figures:
                setattr(self, field.name, figures[field.name])

    def __str__(self):
        within = f"; {self.within_node_bytes:,} handed over within its node" if self.within_node_bytes else ""
        return (
            f"{self.steps} steps, {self.sent_bytes:,} bytes handed over by this rank "
            f"({self.ratio:.2f}x fewer than float32, {self.ratio / 2:.2f}x fewer than float16), "
            f"{self.wire_bytes:,} on the wire (float32 all-reduce: {self.fp32_wire_bytes:,}){within}"
        )


def _ring(tensor_bytes, world_size):
    return 2 * (world_size - 1) * tensor_bytes // world_size
