"""What the examples' checkpoints hold, and whether two hold the same."""

import torch

TIMES = ("seconds", "tokens_per_second")  # differ from run to run


def checkpoint_files(folder):
    """What the last checkpoint holds, by file name."""
    last = folder / (folder / "latest").read_text().strip()
    return {path.name: torch.load(path, weights_only=True) for path in sorted(last.glob("*.pt"))}


def assert_same(one, other, where="checkpoint"):
    """Equal to the last bit, in whatever nesting of dicts and lists."""
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in TIMES:
                assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == other, where
