"""The ranks agree on their configuration before the first gradient is applied."""

import json
import os
import time

import horovod.torch as hvd
import torch

from gcompress.errors import ConfigMismatchError, ExchangeError

# Raised by every change of the payloads' format: ranks with different releases must not decode each other.
FORMAT_VERSION = 1
POLL_SECONDS = 1e-4


def timeout_seconds():
    """How long a rank waits for the others before it ends with an error (GCOMPRESS_TIMEOUT, default 300)."""
    return float(os.environ.get("GCOMPRESS_TIMEOUT", "300"))


def patient_synchronize(handle):
    """`hvd.synchronize`, sleeping between polls.

    Horovod's own wait spins: with more ranks than cores it takes the core from those that
    still compute.
    """
    while not hvd.poll(handle):
        time.sleep(POLL_SECONDS)
    return hvd.synchronize(handle)


def wait_or_raise(handles, what):
    """Wait for Horovod handles; ExchangeError when other ranks do not take part in time."""
    deadline = time.monotonic() + timeout_seconds()
    for handle in handles:
        while not hvd.poll(handle):
            if time.monotonic() > deadline:
                raise ExchangeError(f"{what}: no answer from every rank within {timeout_seconds():g} s")
            time.sleep(POLL_SECONDS)
    return [hvd.synchronize(handle) for handle in handles]


def check_configurations(configuration, name, process_set):
    """All-gather a JSON-able configuration; ConfigMismatchError on every rank if it is not the same on all."""
    own = json.dumps({"format": FORMAT_VERSION, **configuration}, sort_keys=True).encode()
    payload = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    lengths = torch.tensor([payload.numel()])
    handles = [
        hvd.allgather_async(lengths, name=f"{name}.length", process_set=process_set),
        hvd.allgather_async(payload, name=name, process_set=process_set),
    ]
    what = f"{name}: agreeing on the configuration (is gcompress.plugins.horovod imported on every rank?)"
    lengths, gathered = wait_or_raise(handles, what)
    texts = [bytes(part.tolist()).decode() for part in gathered.split(lengths.tolist())]
    ranks = process_set.ranks or range(len(texts))
    groups = {}
    for rank, text in zip(ranks, texts, strict=True):
        groups.setdefault(text, []).append(rank)
    if len(groups) > 1:
        found = "; ".join(f"ranks {ranks}: {text}" for text, ranks in groups.items())
        raise ConfigMismatchError(f"compression: expected one configuration on all ranks, got {found}")
