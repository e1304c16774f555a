"""Trains a small split model while one half or the other is killed at random moments; prints what came of it as JSON.

    python -m tests.split_kills FOLDER --steps 600 --kills 50 --mode labels

The halves are forked from this process, which has loaded the libraries and started nothing:
a new life begins in milliseconds. Without --kills the run that the others are compared with.
"""

import argparse
import json
import mmap
import os
import pathlib
import random
import signal
import socket
import struct
import sys
import time
import traceback

import torch
from torch import nn

from gcompress import RolledBack, split

SAVE_EVERY, BATCH, SAMPLES = 6, 16, 128
LONGEST_LIFE = 12  # steps, so that a run of 12 steps a kill is never over too soon
LONGEST_LIFE_SECONDS = 10
DEADLINE_SECONDS = 240
MODES = {
    "labels": {"up": "quantize:bits=4,rounding=stochastic", "down": "topk:sparsity=0.5"},
    "delta": {"up": "quantize:bits=3", "down": "quantize:bits=6", "delta_samples": 40, "max_batch": 20},
    "u-shaped": {"up": "mask:sparsity=0.9,bits=2", "down": "quantize:bits=4", "labels": None},
}


def model():
    """Running statistics and dropout on both sides: state that a step done twice would show in."""
    torch.manual_seed(3)
    half = [nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.ReLU()]
    return nn.Sequential(*half, nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.ReLU(), nn.Linear(24, 5))


def parts(mode):
    return split.cut(model(), *((4,) if mode != "u-shaped" else (4, 8)))


def serve(folder, mode, port):
    options = {key: value for key, value in MODES[mode].items()}
    server = split.SplitServer(
        parts(mode)[1],
        shape=(24,),
        checkpoints=folder / "server",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
        **options,
    )
    server.listen(f"127.0.0.1:{port}")
    server.wait()
    server.stop()


def train(folder, mode, port, progress, steps):
    head, _, *end = parts(mode)
    link = split.Link(f"127.0.0.1:{port}", deadline=20, patience=60)
    options = {key: value for key, value in MODES[mode].items() if key != "labels"}
    client = split.SplitClient(head, link, shape=(24,), end=end[0] if end else None, **options)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.05, momentum=0.9)
    client.keep(folder / "client", optimizer=optimizer)
    inputs = torch.randn(SAMPLES, 12, generator=torch.Generator().manual_seed(1))
    labels = inputs[:, :5].argmax(1)
    step = client.connect()
    while step < steps:
        try:
            while step < steps:
                one_step(client, optimizer, inputs, labels, step, bool(end))
                step += 1
                struct.pack_into("<q", progress, 0, step)
                if step % 100 == 0:
                    client.end_epoch()
                if step % SAVE_EVERY == 0:
                    client.save()
        except RolledBack as back:
            step = back.step
    try:
        client.finish()
    except RolledBack:  # killed between the last save and this
        client.finish()


def one_step(client, optimizer, inputs, labels, step, u_shaped):
    ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:BATCH]
    torch.manual_seed(step)  # dropout of the head
    optimizer.zero_grad()
    if u_shaped:
        loss = nn.functional.cross_entropy(client(inputs[ids]), labels[ids])
    else:
        loss = client(inputs[ids], labels[ids], ids=ids)
    loss.backward()
    optimizer.step()


def fork(role, *arguments):
    """Run a function in a forked process that ends with it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        role(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """The exit code of a child that has ended, or None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def run(folder, mode, steps, kills, seed):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    progress = mmap.mmap(-1, 8)
    rng, lost, killed_at = random.Random(seed), {"server": 0, "client": 0}, []
    start = {
        "server": lambda: fork(serve, folder, mode, port),
        "client": lambda: fork(train, folder, mode, port, progress, steps),
    }
    children = {name: begin() for name, begin in start.items()}
    due = time.monotonic() + DEADLINE_SECONDS
    try:
        while sum(lost.values()) < kills:
            killed_at.append(live_a_while(rng, progress))
            victim = rng.choice(("server", "client"))
            for name, pid in children.items():
                if (code := ended(pid)) is not None:
                    del children[name]
                    raise SystemExit(f"the {name} ended with code {code} after {lost}")
            os.kill(children[victim], signal.SIGKILL)
            os.waitpid(children[victim], 0)
            lost[victim] += 1
            children[victim] = start[victim]()
        while children:
            for name, pid in list(children.items()):
                if (code := ended(pid)) is not None:
                    del children[name]
                    if code != 0:
                        raise SystemExit(f"the {name} ended with code {code} after {lost}")
            if time.monotonic() > due:
                raise SystemExit(f"hangs at step {done(progress)}, left: {list(children)}")
            time.sleep(0.005)
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return {"kills": lost, "killed_at": killed_at, "step": done(progress)}


def live_a_while(rng, progress):
    """Until some steps later, or now and then for a short time only, which ends in a handshake; returns the step."""
    handshake = rng.random() < 0.3
    until = time.monotonic() + (rng.uniform(0.0, 0.1) if handshake else LONGEST_LIFE_SECONDS)
    last = done(progress) + rng.randint(1, LONGEST_LIFE)
    # Steps that are done again after going back count, too: the counter only shows the latest.
    while time.monotonic() < until and done(progress) < last:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.006))
    return done(progress)


def done(progress):
    return struct.unpack_from("<q", progress)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default="labels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(arguments.folder, arguments.mode, arguments.steps, arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
