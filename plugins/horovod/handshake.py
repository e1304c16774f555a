"""The ranks agree on their configuration before the first gradient is applied."""

import time

import horovod.torch as hvd
import torch

from gcompress.errors import ExchangeError
from gcompress.exchange import engine
from gcompress.exchange.engine import timeout_seconds

POLL_SECONDS = 1e-4


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


def gather_texts(text, name, process_set, what):
    """The ranks' texts, in their order."""
    payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    handles = [
        hvd.allgather_async(torch.tensor([payload.numel()]), name=f"{name}.length", process_set=process_set),
        hvd.allgather_async(payload, name=name, process_set=process_set),
    ]
    lengths, gathered = wait_or_raise(handles, what)
    return [bytes(part.tolist()).decode() for part in gathered.split(lengths.tolist())]


def check_configurations(configuration, name, process_set):
    """All-gather a JSON-able configuration; ConfigMismatchError on every rank if it is not the same on all."""
    what = f"{name}: agreeing on the configuration (is gcompress.plugins.horovod imported on every rank?)"
    texts = gather_texts(engine.text_of(configuration), name, process_set, what)
    engine.compare(texts, process_set.ranks)
