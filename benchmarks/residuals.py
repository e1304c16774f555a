#!/usr/bin/env python3
"""What each way of keeping residuals costs in bytes, time and accuracy, in one run on one core.

    python benchmarks/residuals.py                        # every type and method, 4 layers of 1024 x 1024, 4 ranks
    python benchmarks/residuals.py --billion int8         # a step of a model of 1 billion entries on two processes

held    bytes an entry that are allocated between steps, beside the gradients; what is unpacked at a time is in `work`.
open    the same between the exchange and the optimizer's step, when what is proposed is held, too.
work    bytes an entry of memory that all tensors share.
time    one rank's step as in exchange_path.py, in processor time, over that of float32: the median of --repeat steps,
        taken in turns.
small   the same for 300 tensors of --small entries.
error   how far what was delivered in 50 steps is from the sum of the gradients, which drift, over the same of float32.

--billion lets two processes exchange the gradients of 15 tensors of 2^26 entries (weights and gradients bfloat16) by
torch's gloo and step; it prints the peak memory of each.
"""

import argparse
import gc
import os
import resource
import statistics
import sys
import time

import torch
import torch.distributed as dist
from exchange_path import Mirror, layers

from gcompress import Policy
from gcompress.exchange.exchange import GradientExchange
from gcompress.residual_types import RESIDUALS

METHODS = [
    "topk:sparsity=0.99@allgather",
    "mask:sparsity=0.99,bits=2@twophase",
    "quantize:bits=4@twophase",
    "polar:rate=0.25@twophase",
]
SMALL_TENSORS, DRIFT_STEPS = 300, 50


class Peers(Mirror):
    """A Mirror whose `spent` is processor time: that of one machine which others use, too."""

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in ("allgather", "alltoall", "allreduce"):
            return found

        def timed(*arguments):
            start, before = time.process_time(), self.spent
            result = found(*arguments)
            self.spent = before + time.process_time() - start
            return result

        return timed


class Steps:
    """One rank's steps with a method and a residual type."""

    def __init__(self, method, residual, gradients, ranks):
        spec, _, way = method.partition("@")
        self.engine, self.values = Peers(ranks), gradients
        self.gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        policy = Policy(spec, exchange=way or "auto", min_numel=0, error_feedback=True, residual=residual)
        self.exchange = GradientExchange(policy, self.engine)
        self.exchange.prepare({name: gradient.shape for name, gradient in gradients.items()})

    def step(self, settle=True):
        """Exchange all gradients once; returns the seconds of processor time of this rank's work."""
        for name, values in self.values.items():
            self.gradients[name].copy_(values)
        self.engine.spent, start = 0.0, time.process_time()
        for finish in [self.exchange.start(name, gradient) for name, gradient in self.gradients.items()]:
            finish()
        if settle:
            self.settle()
        return time.process_time() - start - self.engine.spent

    def settle(self):
        self.exchange.applied(list(self.gradients))
        self.exchange.end_step()


def allocated():
    """{address: bytes} of the memory of all living tensors."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def bytes_held(method, residual, gradients, ranks):
    """(between steps, until a step is applied, to work in): bytes an entry."""
    numel, before = sum(each.numel() for each in gradients.values()), set(allocated())
    steps = Steps(method, residual, gradients, ranks)
    for _ in range(2):
        steps.step()
    steps.step(settle=False)
    own = {each.untyped_storage().data_ptr() for each in steps.gradients.values()}
    feedbacks = (steps.exchange.feedback, steps.exchange.owner_feedback)
    scratches = [steps.exchange._ways._scratch, *(each._scratch for each in feedbacks)]
    scratches += [memory._scratch for each in feedbacks for memory in each.memories.values() if not memory.in_place]
    work = {each._room.untyped_storage().data_ptr(): 4 * each._room.numel() for each in scratches}

    def others():
        return sum(size for place, size in allocated().items() if place not in before | own | work.keys()) / numel

    open_bytes = others()
    steps.settle()
    return others(), open_bytes, sum(work.values()) / numel


def time_ratios(method, gradients, ranks, repeat):
    """{type: time over float32's}, each step of one followed by that of the next."""
    runs = {residual: Steps(method, residual, gradients, ranks) for residual in RESIDUALS}
    for run in runs.values():
        run.step(), run.step()
    seconds = {residual: [] for residual in RESIDUALS}
    for _ in range(repeat):
        for residual, run in runs.items():
            seconds[residual].append(run.step())
    return {
        residual: statistics.median(each) / statistics.median(seconds["float32"]) for residual, each in seconds.items()
    }


def drift_error(method, residual, numel=1 << 18):
    """Of the sum of what is delivered, relative to that of gradients that drift."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(numel, generator=generator))
    mean = torch.randn(numel, generator=generator) * scale
    given, got = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    steps = Steps(method, residual, {"w": mean}, 1)
    for _ in range(DRIFT_STEPS):
        mean = 0.98 * mean + 0.2 * scale * torch.randn(numel, generator=generator)
        steps.values = {"w": mean + scale * torch.randn(numel, generator=generator)}
        given += steps.values["w"]
        steps.step()
        got += steps.gradients["w"]
    return float((given - got).norm() / given.norm())


def report(arguments):
    """Print the table."""
    generator = torch.Generator().manual_seed(1)
    gradients = layers(arguments.layers, arguments.side, torch.device("cpu"))
    small = {f"s{number}": torch.randn(arguments.small, generator=generator) for number in range(SMALL_TENSORS)}
    print(f"{arguments.ranks} ranks, {arguments.layers} layers of {arguments.side} x {arguments.side}")
    print(
        f"{'method':36s} {'residual':9s} "
        + " ".join(f"{each:>6s}" for each in "held open work time small error".split())
    )
    for method in arguments.methods:
        large = time_ratios(method, gradients, arguments.ranks, arguments.repeat)
        many = time_ratios(method, small, arguments.ranks, arguments.repeat)
        exact = drift_error(method, "float32")
        for residual in RESIDUALS:
            held = bytes_held(method, residual, gradients, arguments.ranks)
            error = drift_error(method, residual) / exact
            figures = (*held, large[residual], many[residual], error)
            print(f"{method:36s} {residual:9s} " + " ".join(f"{each:6.3f}" for each in figures), flush=True)


def billion(residual, rank, tensors=15, numel=1 << 26):
    """One rank's two steps of a model that large."""
    from gcompress.plugins import ddp

    dist.init_process_group("gloo", rank=rank, world_size=2)
    exchange = GradientExchange(f"topk:sparsity=0.999; residual={residual}", ddp.engine())
    weights = {f"w{number}": torch.zeros(numel, dtype=torch.bfloat16) for number in range(tensors)}
    gradients = {name: torch.empty(numel, dtype=torch.bfloat16) for name in weights}
    exchange.prepare({name: weight.shape for name, weight in weights.items()})
    for step in range(2):
        start = time.perf_counter()
        for number, gradient in enumerate(gradients.values()):
            gradient.normal_(generator=torch.Generator().manual_seed(1000 * step + 2 * number + rank))
        for name, gradient in gradients.items():  # each a bucket of its own, as DistributedDataParallel forms them
            weights[name].sub_(exchange.start_bucket({name: gradient})()[name], alpha=0.1)
        exchange.end_step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        moved = sum(int(weight.count_nonzero()) for weight in weights.values())
        print(
            f"rank {rank}, step {step}: {tensors * numel:,} entries, {residual}, {time.perf_counter() - start:.0f} s, "
            f"peak {peak:.2f} GiB, {moved:,} weights moved, planned {exchange.plan.memory_bytes() / 2**30:.2f} GiB "
            f"+ {exchange.plan.scratch_bytes() / 2**30:.2f} GiB",
            flush=True,
        )
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=METHODS, help="SPEC or SPEC@EXCHANGE")
    parser.add_argument("--ranks", type=int, default=4, help="how many there are (default 4)")
    parser.add_argument("--layers", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--side", type=int, default=1024, help="of a layer's matrix (default 1024)")
    parser.add_argument("--small", type=int, default=2048, help="entries of a small tensor (default 2048)")
    parser.add_argument("--repeat", type=int, default=9, help="steps of which the median counts (default 9)")
    parser.add_argument("--billion", choices=RESIDUALS, help="a step of a large model with this residual")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.billion is None:
        report(arguments)
        return 0
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29571"))
    torch.multiprocessing.spawn(_billion, (arguments.billion,), nprocs=2)
    return 0


def _billion(rank, residual):
    torch.set_num_threads(1)
    billion(residual, rank)


if __name__ == "__main__":
    sys.exit(main())
