"""What every rank remembers, as files in a checkpoint's folder: one of each rank.

A run of as many ranks reads each its own and goes on to the bit; only that file has to lie on its machine. A run
of another number of ranks reads all of them, merged (`gcompress.merge_states`): what all were owed together is kept.
"""

from __future__ import annotations

import os
import pathlib
import re
import tempfile
from collections.abc import Iterable

import torch

from ..errors import ConfigError
from .saved_state import merge_states


def write_rank_file(folder: str | os.PathLike, state: dict, name: str = "gcompress") -> pathlib.Path:
    """Write a rank's `state_dict()`; every rank calls it, at the same step. A half-written file is never seen.

    Files under this name that another number of ranks left in the folder are removed.

    Args:
        folder: of the checkpoint; made if need be.
        name: the file's, before its rank; for several states in one folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(name, state["rank"], state["world_size"])
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    for size, files in rank_files(folder, name).items():
        for other in files.values() if size != state["world_size"] else ():
            other.unlink(missing_ok=True)
    return path


def read_rank_file(folder: str | os.PathLike, rank: int, world_size: int, name: str = "gcompress") -> dict | None:
    """This rank's own state, or all ranks' merged where their number was another; None if there is no file.

    Raises:
        ConfigError: a file that is needed is missing or damaged, or the files are of several runs.
    """
    found = rank_files(folder, name)
    if not found:
        return None
    if len(found) > 1:
        sizes = " and ".join(map(str, sorted(found)))
        raise ConfigError(f"checkpoint {folder}: got {name}'s files of {sizes} ranks, expected those of one run")
    (size, files), *_ = found.items()
    if size == world_size and rank in files:
        return _read(files[rank])
    missing = [rank] if size == world_size else sorted(set(range(size)) - set(files))
    if missing:
        raise ConfigError(
            f"checkpoint {folder}: got no {_file_name(name, missing[0], size)}, expected one file of each of the "
            f"{size} rank(s) that saved it"
            + ("" if size == world_size else f", since {world_size} rank(s) go on from them")
        )
    return merge_states(_read(files[other]) for other in sorted(files))


def merged_or_own(states: Iterable[dict], rank: int, world_size: int) -> dict:
    """Of the states of all ranks, in their order: this rank's, or all merged for another number of ranks."""
    states = list(states)
    return states[rank] if len(states) == world_size else merge_states(states)


def rank_files(folder: str | os.PathLike, name: str = "gcompress") -> dict[int, dict[int, pathlib.Path]]:
    """{number of ranks: {rank: file}} of what a checkpoint's folder has."""
    found: dict[int, dict[int, pathlib.Path]] = {}
    pattern = re.compile(rf"{re.escape(name)}-rank-(\d+)-of-(\d+)\.pt")
    for path in pathlib.Path(folder).iterdir() if os.path.isdir(folder) else ():
        match = pattern.fullmatch(path.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    return found


def _file_name(name, rank, world_size):
    return f"{name}-rank-{rank}-of-{world_size}.pt"


def _read(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of a file that is cut or is something else
        raise ConfigError(f"checkpoint: {path} cannot be read, expected what this library wrote: {error}") from error
