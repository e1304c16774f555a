"""The ranks of torch.distributed's process groups, as far as they only have to agree (gcompress/exchange/engine.py)."""

import torch
import torch.distributed as dist


class ProcessGroupRanks:
    """The ranks of a process group (`Ranks`); None: all ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = dist.group.WORLD if group is None else group
        self._on_device = dist.get_backend(self.group) == "nccl"
        # Asked for with every gradient, and torch looks for them every time; a group's never change.
        self._world_size, self._rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def world_size(self):
        return self._world_size

    def rank(self):
        return self._rank

    def gather_texts(self, text: str) -> list[str]:
        """See `Ranks`; the time-out is the process group's."""
        device = torch.device("cuda", torch.cuda.current_device()) if self._on_device else torch.device("cpu")
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world_size())]
        dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=self.group)
        longest = max(int(length) for length in lengths)
        rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
        dist.all_gather(rows, torch.nn.functional.pad(own, (0, longest - own.numel())), group=self.group)
        return [bytes(row[: int(length)].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]
