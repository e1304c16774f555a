#!/usr/bin/env python3
"""Two processes or more exchange a megabyte through torch.distributed; rank 0 prints what it took.

torchrun --nproc-per-node 2 tools/check_exchange.py
"""

import sys
import time

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

from gcompress.exchange.exchange import GradientExchange

SPEC, NUMEL, ROUNDS = "quantize:bits=4", 2**18, 5


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    gradients = [torch.randn(NUMEL, generator=torch.Generator().manual_seed(each)) for each in range(size)]
    mean = sum(gradients) / size
    exchange = GradientExchange(SPEC, ddp.engine())
    exchange.prepare({"gradient": mean.shape})
    seconds = []
    for _ in range(ROUNDS):
        values = gradients[rank].clone()
        dist.barrier()
        start = time.perf_counter()
        result = exchange.start("gradient", values)()
        seconds.append(time.perf_counter() - start)
        exchange.end_step()
    everyone = [torch.empty(NUMEL) for _ in range(size)]
    dist.all_gather(everyone, result)
    if not all(torch.equal(each, result) for each in everyone):
        sys.exit("the ranks came to different results")
    if rank == 0:
        error = float((result - mean).norm() / mean.norm())
        print(
            f"{4 * NUMEL:,} bytes of float32 between {size} processes by {SPEC}: {exchange.report.last_step_bytes:,} "
            f"bytes each, {1e3 * min(seconds):.1f} ms, error {error:.3f}, the same bits on all"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
