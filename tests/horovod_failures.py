"""Horovod jobs that must end with an error: `horovodrun -np N python horovod_failures.py OUT NAME`.

The rest of what tests/test_horovod.py runs. Every rank that can writes [error type, message] to OUT.RANK.
"""

import json
import os
import signal
import sys

import gcompress.plugins.horovod
import horovod.torch as hvd
import torch

import gcompress
from gcompress import Policy, TopK
from tests.horovod_ranks import backward, make_model, make_optimizer


def steps_before_the_end(compression, steps=5):
    model = make_model()
    optimizer = make_optimizer(model, compression)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return model, optimizer


def join_while_others_train():
    model, optimizer = steps_before_the_end(TopK(sparsity=0.9))
    if hvd.rank() == 0:
        hvd.join()
    optimizer.zero_grad()
    backward(model, 9)
    optimizer.step()


def join_while_others_train_in_two_phases():
    model, optimizer = steps_before_the_end(Policy(TopK(sparsity=0.9), exchange="twophase"))
    if hvd.rank() == 0:
        hvd.join()
    optimizer.zero_grad()
    backward(model, 9)
    optimizer.step()


def join_while_others_take_outer_steps():
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = gcompress.plugins.horovod.engine()
    outer = gcompress.OuterOptimizer(inner, model, engine, "topk:sparsity=0.9", every=2)
    for step in range(4 if hvd.rank() == 0 else 6):
        outer.zero_grad()
        backward(model, step)
        outer.step()
    hvd.join()


def join_while_others_train_something_uncompressed():
    model, optimizer = steps_before_the_end("none; name=0.weight -> topk:sparsity=0.9")  # the last of a backward pass
    if hvd.rank() == 0:
        hvd.join()
    optimizer.zero_grad()
    backward(model, 9)
    optimizer.step()


def killed_rank():
    model, optimizer = steps_before_the_end(TopK(sparsity=0.9))
    for step in range(100000):
        optimizer.zero_grad()
        backward(model, step)
        if hvd.rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # gradients are under way
        optimizer.step()


def main():
    out, name = sys.argv[1:]
    hvd.init()
    try:
        globals()[name]()
    except Exception as error:
        with open(f"{out}.{hvd.rank()}", "w") as file:
            json.dump([type(error).__name__, str(error)], file)
        raise


if __name__ == "__main__":
    main()
