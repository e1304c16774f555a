"""How train.py and train_lm.py begin on every rank: find the engine, share the cores, and refuse all together."""

import argparse
import contextlib
import os
import pathlib
import sys

import torch

import gcompress
import training_engines
from command_line import Refusal

PROGRAM = pathlib.Path(sys.argv[0]).name
LONGEST_MESSAGE = 1000  # bytes


def start_engine():
    """The engine that --engine names or whose launcher started this process."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", choices=training_engines.ENGINES, default=training_engines.launched_by())
    engine = training_engines.ENGINES[parser.parse_known_args()[0].engine]
    try:
        return engine()
    except ImportError as error:
        sys.exit(f"{PROGRAM}: error: {error}; `{engine.install}` installs what {engine.name} needs")


def share_cores(engine):
    """Ranks that share a machine share its cores; with a thread per core each, they would wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // engine.local_size))


@contextlib.contextmanager
def refused_together(engine):
    """End all ranks with exit code 2 and one sentence from rank 0 if any rank refuses within the block.

    A rank that ended alone would leave the others waiting in their next operation. Blocks must not contain
    operations of the engine, for the same reason.
    """
    message = ""
    try:
        yield
    except (Refusal, gcompress.ConfigError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
    rows = torch.zeros(engine.size, LONGEST_MESSAGE)
    encoded = message.encode()[:LONGEST_MESSAGE]
    rows[engine.rank, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.float32)
    rows = torch.tensor(engine.sum(rows.view(-1).tolist())).view(engine.size, LONGEST_MESSAGE).to(torch.uint8)
    messages = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    if any(messages):
        if engine.rank == 0:
            print(f"{PROGRAM}: error: {next(filter(None, messages))}", file=sys.stderr, flush=True)
        # The launcher terminates the other ranks once one has failed: none may end before the sentence is
        # out, and then all at once.
        engine.sum([0.0])
        engine.abort()
