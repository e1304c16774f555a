"""Text for train_lm.py that every machine has: the sources of Python's standard library, or a file of one's own.

Which sequences a rank draws in a step is a function of the seed, the rank and the step: a resumed run needs no
generator's state, and runs that exchange in other ways see the same text.
"""

import os
import pathlib
import sysconfig
import zlib
from typing import NamedTuple

import numpy as np
import torch

# Folders of the standard library without its own text: packages of others, tests, tables of characters.
LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idle_test", "lib-dynload", "site-packages", "test", "tests"}
HELD_OUT = 20  # one of this many files, or parts of one file, is for validation
LARGEST = 64 * 2**20  # bytes of text that are read at most


class Text(NamedTuple):
    """Bytes to train on and bytes to validate with, uint8, 1-D."""

    train: np.ndarray
    validation: np.ndarray

    def checksum(self):
        """A number that differs for another text."""
        return zlib.crc32(self.validation, zlib.crc32(self.train))


def standard_library(root=None):
    """The files of the standard library, (name, path), in an order that is the same on every machine."""
    root = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in LEFT_OUT]
        paths = [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def split_by_file(files, largest):
    """The Text of files; a file's name says which part it belongs to, so that other files do not change that."""
    parts, size = {True: [], False: []}, 0
    for name, path in files:
        content = path.read_bytes()[: largest - size]
        size += len(content)
        parts[zlib.crc32(name.encode()) % HELD_OUT == 0].append(content)
    return Text(*(np.frombuffer(b"".join(parts[held_out]), np.uint8) for held_out in (False, True)))


def split_in_parts(content, largest):
    """The Text of one file: the last part is for validation."""
    content = np.frombuffer(content[:largest], np.uint8)
    cut = len(content) - len(content) // HELD_OUT
    return Text(content[:cut], content[cut:])


def load(path, context, largest=LARGEST):
    """The text to train on.

    Args:
        path: a file of any bytes; None: the standard library of the running Python.
        context: both parts must have more bytes than this.
        largest: the most bytes that are read.

    Raises:
        ValueError, OSError: it is too short, or cannot be read.
    """
    if path is None:
        text, name = split_by_file(standard_library(), largest), "the standard library's sources"
    else:
        with open(path, "rb") as file:
            text, name = split_in_parts(file.read(largest), largest), str(path)
    for part, content in text._asdict().items():
        if len(content) < context + 2:
            raise ValueError(f"{name}: {len(content)} bytes for {part}, expected more than --context {context} + 1")
    return text


def cut_out(content, starts, length):
    """Sequences of `length` bytes that begin at these places, int64 of shape (starts, length)."""
    return torch.from_numpy(content[starts[:, None] + np.arange(length)].astype(np.int64))


def training_batch(text, context, batch, seed, rank, step):
    """A rank's sequences of a step, int64 of shape (batch, context + 1)."""
    starts = np.random.default_rng([seed, rank, step]).integers(0, len(text.train) - context, batch)
    return cut_out(text.train, starts, context + 1)


def validation_share(text, context, sequences, rank, world_size):
    """A rank's share of one fixed set of sequences, evenly spaced, int64 of shape (its share, context + 1)."""
    starts = np.linspace(0, len(text.validation) - context - 1, sequences).astype(np.int64)
    return cut_out(text.validation, starts[rank::world_size], context + 1)
