"""One half's checkpoints, under step numbers that both halves share."""

import os
import pathlib
import pickle
import re
import secrets

import torch

from ..errors import ConfigError

RUN_NAME = re.compile(r"[0-9a-f]{32}")
FILE_NAME = re.compile(r"step-(\d{9})\.pt")


def new_run():
    """A name for a training run: random, so that the halves of two runs are never taken for one."""
    return secrets.token_hex(16)


class Checkpoints:
    """A folder with a folder for each run, and in it a file for each of the last steps saved.

    A file counts only when it is whole: it is written under another name, synchronised
    and renamed. The halves save one after the other and each keeps two, so that after a
    crash at any moment there is a step that both have.

    Args:
        folder: made if it does not exist. Two halves need two.
        keep: files kept for a run, 2 or more.
    """

    def __init__(self, folder, keep=2):
        if keep < 2:
            raise ConfigError(f"keep: got {keep}, expected 2 or more, or a crash could leave no common step")
        self.folder, self.keep = pathlib.Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def latest_run(self):
        """The run that was saved last, or None."""
        runs = [path for path in self.folder.iterdir() if RUN_NAME.fullmatch(path.name) and self.steps(path.name)]
        return max(runs, key=lambda path: path.stat().st_mtime_ns).name if runs else None

    def steps(self, run):
        """The steps that `load` has, in order."""
        names = (FILE_NAME.fullmatch(path.name) for path in self._path(run).glob("step-*.pt"))
        return sorted(int(match[1]) for match in names if match)

    def save(self, run, step, state):
        """Write a state of tensors, numbers, strings, lists and dicts."""
        path = self._path(run, step)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def prune(self, run):
        """Remove all but the last `keep`: when the other half has the newest, too."""
        for step in self.steps(run)[: -self.keep]:
            self._path(run, step).unlink(missing_ok=True)

    def discard_after(self, run, step):
        """Remove what was saved beyond a step to which both halves went back."""
        for later in self.steps(run):
            if later > step:
                self._path(run, later).unlink(missing_ok=True)

    def load(self, run, step):
        """The state saved for a step; ConfigError if the file is damaged."""
        path = self._path(run, step)
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ConfigError(f"checkpoint {path}: {str(error).splitlines()[0]}") from error

    def _path(self, run, step=None):
        if not RUN_NAME.fullmatch(run):
            raise ConfigError(f"run: got {run[:40]!r}, expected 32 hexadecimal digits")
        return self.folder / run if step is None else self.folder / run / f"step-{step:09d}.pt"
