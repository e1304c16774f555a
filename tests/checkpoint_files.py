"""What the examples' checkpoints hold."""

import torch

TIMES = ("seconds", "tokens_per_second")  # differ from run to run


def checkpoint_files(folder):
    """What the last checkpoint holds, by file name."""
    last = folder / (folder / "latest").read_text().strip()
    return {path.name: torch.load(path, weights_only=True) for path in sorted(last.glob("*.pt"))}
