"""A model's gradients cut into partitions, each the task of one parameter server, and their encoding on both sides."""

import heapq
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..checks import check_integer
from ..compressors import Compressor
from ..errors import ConfigError, PayloadError
from ..feedback import EstimateFeedback, NoFeedback, new_memory, second_memory, whole
from ..packing import bytes_to_float, float_to_bytes, to_type
from ..policy import Policy
from ..residual_types import PACKED, saved_nbytes
from .encoding_errors import coded


class Partition(NamedTuple):
    """A run of entries of one flattened parameter, and who is responsible for it."""

    name: str
    start: int
    numel: int
    server: int
    compressor: Compressor | None  # None: the entries travel as float32

    @property
    def nbytes(self) -> int:
        """The size of its payload in either direction; the largest possible if it is not `fixed_size`."""
        return self.compressor.nbytes(self.numel) if self.compressor else 4 * self.numel


def partition(
    sizes: dict[str, int], policy: Policy | None, servers: int, partition_numel: int = 1 << 20
) -> list[Partition]:
    """Cut parameters into partitions and balance these over servers by payload bytes.

    Args:
        sizes: {name: number of entries}, in the same order on all ranks.
        policy: a Policy, or None to compress nothing.
        servers: how many there are.
        partition_numel: the most entries of one partition, so that a large tensor uses all
            servers and its parts are encoded, sent, added and decoded at the same time.

    Returns:
        A list of Partition, a parameter's in order; a partition's index in it is its key.
    """
    check_integer("servers", servers, 1)
    check_integer("partition_numel", partition_numel, 1)
    parts = []
    for name, numel in sizes.items():
        compressor = policy.compressor_for(name, numel) if policy else None
        for start in range(0, numel, partition_numel):
            parts.append(Partition(name, start, min(partition_numel, numel - start), 0, compressor))
    # The largest first, each to the server that has least to do.
    loads = [(0, server) for server in range(servers)]
    for key in sorted(range(len(parts)), key=lambda key: -parts[key].nbytes):
        load, server = heapq.heappop(loads)
        parts[key] = parts[key]._replace(server=server)
        heapq.heappush(loads, (load + parts[key].nbytes, server))
    return parts


class PartitionCodec:
    """One side's encoder and decoder of partitions, with its error feedback.

    The residual of an encoding is only proposed until `settle` (see gcompress/memory.py).

    Args:
        partitions: from `partition`.
        policy: the same that it was called with. Momentum correction is a worker's; a warm-up
            is refused, since a server does not know at which step a job was taken up again.
        side: "worker 3" or "server": enters the seeds of compressors that round at random.
    """

    def __init__(self, partitions, policy, side):
        if policy and policy.warmup_steps:
            raise ConfigError(f"warmup_steps: got {policy.warmup_steps}, expected 0 with parameter servers")
        self.partitions, self._side, self._policy = partitions, side, policy
        self._feedback = new_memory(policy, at_once=False) if policy else None
        if self._feedback and side == "server":
            self._feedback = second_memory(policy)
        if self._feedback:
            self._feedback.of_rank(side)

    def encode(self, key: int, values: torch.Tensor, step: int, peer: str = "") -> torch.Tensor:
        """The payload (1-D uint8) of a 1-D float32 tensor; `peer` names a memory of its own for one receiver."""
        part = self.partitions[key]
        if values.numel() != part.numel:
            raise ConfigError(f"gradient {part.name!r}: got {values.numel()} entries, expected {part.numel}")
        if part.compressor is None:
            return float_to_bytes(to_type(values, torch.float32)).clone()
        seed = self._seed(part, step, peer)
        if self._policy.feedback_for(part.compressor):
            return self._feedback.compress(memory_name(part) + peer, values, part.compressor, seed=seed)[0]
        return part.compressor.compress(values, seed=seed)[0]

    def coded(self, key: int, values: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(What `encode` would encode now, what that decodes to), 1-D float32 tensors; nothing changes."""
        part = self.partitions[key]
        feedback = self._feedback if self._policy.feedback_for(part.compressor) else NoFeedback
        corrected = feedback.preview(memory_name(part), values)
        return coded(part.compressor, corrected, whole(corrected, self._seed(part, step)))

    def _seed(self, part, step, peer=""):
        return zlib.crc32(f"{part.name}/{part.start}/{step}/{self._side}/{peer}".encode())

    def encode_nothing(self, key: int) -> torch.Tensor:
        """The payload of zeros, without memory: no one had anything to send."""
        part = self.partitions[key]
        zeros = torch.zeros(part.numel)
        return part.compressor.compress(zeros)[0] if part.compressor else float_to_bytes(zeros)

    def decode(self, key: int, payload: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """Decode into, or add to, a 1-D float32 tensor; PayloadError on bytes that do not fit."""
        part = self.partitions[key]
        try:
            if part.compressor is not None:
                part.compressor.decode_into(payload, out, add=add)
            elif payload.numel() != part.nbytes:
                raise PayloadError(f"got {payload.numel()} bytes, expected {part.nbytes}")
            else:
                out.add_(bytes_to_float(payload)) if add else out.copy_(bytes_to_float(payload))
        except PayloadError as error:
            raise PayloadError(f"gradient {part.name!r} from entry {part.start} on: {error}") from None

    def deliver(self, key: int, mean: torch.Tensor) -> None:
        """Make of what a worker pulled, decoded to a 1-D float32 tensor, the mean of the gradients, in place."""
        part = self.partitions[key]
        if isinstance(self._feedback, EstimateFeedback) and part.compressor:
            if self._policy.feedback_for(part.compressor):
                self._feedback.deliver(memory_name(part), mean)

    def settle(self, keys: Iterable[int], applied: bool, peer: str = "") -> None:
        """The last results of these keys were applied, or not: memory follows them or stays."""
        if self._feedback:
            names = [memory_name(self.partitions[key]) + peer for key in keys]
            self._feedback.apply(names) if applied else self._feedback.discard(names)

    def carry_on(self, key: int) -> None:
        """The next gradient contains the last result: go on from what is proposed."""
        if self._feedback:
            self._feedback.carry_on(memory_name(self.partitions[key]))

    def add(self, key: int, values: torch.Tensor) -> None:
        """Add what was not delivered after all to the partition's residual, if it has one."""
        part = self.partitions[key]
        if self._feedback and part.compressor and self._policy.feedback_for(part.compressor):
            self._feedback.add(memory_name(part), values)

    def residual(self, key: int, proposed: bool = False) -> torch.Tensor | None:
        """A partition's residual as 1-D uint8, or the one that is proposed if that is asked for; or None."""
        if self._feedback is None:
            return None
        saved = self._feedback.memories["residual"].saved_one(memory_name(self.partitions[key]), proposed)
        return None if saved is None else saved.view(torch.uint8)

    def residual_nbytes(self, key: int) -> int:
        """The bytes of `residual(key)`."""
        return saved_nbytes(self._policy.residual if self._policy else "float32", self.partitions[key].numel)

    def load_residual(self, key: int, saved: torch.Tensor | None) -> None:
        """Go on from `residual(key)`; ConfigError if it is none."""
        if self._feedback is None:
            return
        residuals, part = self._feedback.memories["residual"], self.partitions[key]
        name, packed = memory_name(part), self._policy.residual in PACKED
        residuals.drop(lambda other: other == name)
        if saved is not None:
            values = saved if packed else bytes_to_float(saved)
            residuals.load_one(name, residuals.checked("residual", {name: values}, {name: part.numel})[name])

    def forget(self, peer: str) -> None:
        """Drop the memories of a receiver that is gone."""
        if self._feedback:
            self._feedback.memories["residual"].drop(lambda name: name.endswith(peer))

    def state_dict(self) -> dict:
        """This side's residuals by name; see `ErrorFeedback`."""
        return self._feedback.state_dict() if self._feedback else {}

    def checked(self, state: dict) -> dict[str, dict[str, torch.Tensor]]:
        """What `load` takes, of a `state_dict()` that a job with this policy and partitions saved; ConfigError else."""
        sizes = {memory_name(part): part.numel for part in self.partitions if part.compressor}
        return self._feedback.checked(state, sizes) if self._feedback else {}

    def load(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from tensors that `checked` returned."""
        if self._feedback:
            self._feedback.load_tensors(tensors)


def memory_name(part: Partition) -> str:
    """The name of a partition's residual."""
    return f"{part.name}/{part.start}"
