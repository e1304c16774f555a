"""The count of bytes: what a rank handed to its engine, and what that means on the network."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Report:
    """Gradient bytes of one rank; payloads and uncompressed tensors alike are counted.

    sent_bytes: handed to the engine by this rank.
    wire_bytes: what this rank then has to send with the engine's ring algorithms, without
        protocol headers: (N - 1) times the payload for an all-gather among N ranks, what is
        for others in an all-to-all, 2 (N - 1) / N times the tensor for an all-reduce,
        and for parameter servers the payload once.
    pulled_bytes: received from parameter servers; with other exchanges it is not counted.
    fp32_bytes, fp16_bytes: the same gradients as float32 and float16 handed over whole;
    fp32_wire_bytes: and all-reduced as float32.
    """

    steps: int = 0
    sent_bytes: int = 0
    wire_bytes: float = 0
    fp32_bytes: int = 0
    fp32_wire_bytes: float = 0
    last_step_bytes: int = 0
    pulled_bytes: int = 0
    _step_bytes: int = dataclasses.field(default=0, repr=False)

    @property
    def fp16_bytes(self) -> int:
        return self.fp32_bytes // 2

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than float32 were handed to the engine; 1 before anything was."""
        return self.fp32_bytes / self.sent_bytes if self.sent_bytes else 1.0

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
        self.fp32_wire_bytes += _ring(4 * numel, world_size)

    def end_step(self) -> None:
        """Close the count of one optimizer step."""
        self.steps += 1
        self.last_step_bytes, self._step_bytes = self._step_bytes, 0

    def as_dict(self) -> dict[str, float]:
        """All figures, JSON-able."""
        figures = {name: value for name, value in dataclasses.asdict(self).items() if not name.startswith("_")}
        return {**figures, "fp16_bytes": self.fp16_bytes, "ratio": self.ratio}

    def load(self, figures: dict[str, float]) -> None:
        """Continue the count of an earlier `as_dict()`."""
        for field in dataclasses.fields(self):
            if field.name in figures:
                setattr(self, field.name, figures[field.name])

    def __str__(self):
        return (
            f"{self.steps} steps, {self.sent_bytes:,} bytes handed over by this rank "
            f"({self.ratio:.2f}x fewer than float32, {self.ratio / 2:.2f}x fewer than float16), "
            f"{self.wire_bytes:,} on the wire (float32 all-reduce: {self.fp32_wire_bytes:,})"
        )


def _ring(tensor_bytes, world_size):
    return 2 * (world_size - 1) * tensor_bytes // world_size
