"""Checkpoints of one half of a model. Both halves save under the same step numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pathlib
import re
import secrets
import struct

import torch

from ..errors import ConfigError
from . import wire

RUN_NAME = re.compile(r"[0-9a-f]{32}")
FILE_NAME = re.compile(r"step-(\d{9})\.pt")
LATEST = "latest"  # a file that names the run saved last; the files' times may be wrong: clocks can be set back
MAGIC, TRAILER = b"GCCP", struct.Struct("<4sI")  # after torch's own file, with its CRC32C; torch ignores it
_log = logging.getLogger(__name__)


def new_run():
    """A random name for a training run, so that halves of different runs are never put together."""
    return secrets.token_hex(16)


class Checkpoints:
    """The last steps saved: a folder for each run, and in it a file for each step.

    A file is used only if it is whole. It is written under another name, flushed to the disk and
    then renamed, and it ends with a checksum. If a file is damaged later, both halves go back to
    an older step. The halves save one after the other, and each keeps two steps: after a crash at
    any moment there is a step that both have.

    Args:
        folder: created if it does not exist. Each half needs a folder of its own.
        keep: how many files to keep for a run, 2 or more.
    """

    def __init__(self, folder, keep=2):
        if keep < 2:
            raise ConfigError(f"keep: got {keep}, expected 2 or more, or a crash could leave no common step")
        self.folder, self.keep = pathlib.Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._looked_at = {}  # path: (its size and time, whether it was whole then)

    def latest_run(self) -> str | None:
        """The run that was saved last, or None; ConfigError if none of its files is whole."""
        runs = [path.name for path in self.folder.iterdir() if RUN_NAME.fullmatch(path.name) and self._files(path.name)]
        run = self._named_latest()
        if run not in runs:  # lost, or from before there was such a file
            run = max(runs, key=lambda name: self._path(name).stat().st_mtime_ns, default=None)
        if run:
            self.newest(run)
        return run

    def newest(self, run: str) -> int | None:
        """The last step whose file is whole; None if there are no files, ConfigError if none of them is whole."""
        steps = self.steps(run)
        if not steps and self._files(run):
            raise ConfigError(
                f"checkpoints: no file in {self._path(run)} is whole; move that folder away to go on without it, "
                "or begin a new run with resume=False"
            )
        return steps[-1] if steps else None

    def steps(self, run: str) -> list[int]:
        """The steps whose files are whole, in order."""
        return [step for step in self._files(run) if self._is_whole(self._path(run, step))]

    def save(self, run: str, step: int, state: dict) -> None:
        """Write a state of tensors, numbers, strings, lists and dicts. If that fails: OSError, and no file is left."""
        file = io.BytesIO()  # torch hides the errors of a file that it writes itself
        torch.save(state, file)
        data = file.getvalue()
        path = self._path(run, step)
        path.parent.mkdir(exist_ok=True)
        _write(path, data, TRAILER.pack(MAGIC, wire.checksum(data)))
        self._looked_at[path] = _stamp(path), True
        if self._named_latest() != run:
            _write(self.folder / LATEST, run.encode())

    def prune(self, run: str) -> None:
        """Remove all but the last `keep` steps. Call it when the other half has saved the newest step, too."""
        kept = self.steps(run)[-self.keep :]
        for step in self._files(run):
            if kept and step < kept[0]:
                self._remove(run, step)

    def discard_after(self, run: str, step: int) -> None:
        """Remove the steps after the one to which both halves went back."""
        for later in self._files(run):
            if later > step:
                self._remove(run, later)

    def load(self, run: str, step: int) -> dict:
        """The state saved for a step; ConfigError if the file is damaged."""
        path = self._path(run, step)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"checkpoint {path}: {error.strerror}") from error
        if not _matches(data):
            raise ConfigError(f"checkpoint {path}: damaged: it does not match its checksum")
        try:
            return torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:  # whole, but not one of ours
            raise ConfigError(f"checkpoint {path}: {str(error).splitlines()[0]}") from error

    def _named_latest(self):
        try:
            return (self.folder / LATEST).read_text(errors="replace")
        except OSError:
            return None

    def _files(self, run):
        names = (FILE_NAME.fullmatch(path.name) for path in self._path(run).glob("step-*.pt"))
        return sorted(int(match[1]) for match in names if match)

    def _remove(self, run, step):
        path = self._path(run, step)
        path.unlink(missing_ok=True)
        self._looked_at.pop(path, None)

    def _is_whole(self, path):
        """Whether a file matches its checksum. A file that has not changed is not read again."""
        try:
            stamp = _stamp(path)
            if self._looked_at.get(path, (None,))[0] != stamp:
                self._looked_at[path] = stamp, _matches(path.read_bytes())
                if not self._looked_at[path][1]:
                    _log.warning("checkpoint %s is damaged: not used", path)
            return self._looked_at[path][1]
        except OSError as error:
            _log.warning("checkpoint %s cannot be read: %s", path, error)
            return False

    def _path(self, run, step=None):
        if not RUN_NAME.fullmatch(run):
            raise ConfigError(f"run: got {run[:40]!r}, expected 32 hexadecimal digits")
        return self.folder / run if step is None else self.folder / run / f"step-{step:09d}.pt"


@contextlib.contextmanager
def fitting(which):
    """A context that raises ConfigError where a model or an optimizer refuses a state that is not its own."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"checkpoint of {which}: it does not fit this model or optimizer: {error}") from error


def _matches(data):
    """Whether a file's bytes are followed by their checksum."""
    body, trailer = data[: -TRAILER.size], data[-TRAILER.size :]
    return trailer == TRAILER.pack(MAGIC, wire.checksum(body))


def _stamp(path):
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _write(path, *parts):
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
