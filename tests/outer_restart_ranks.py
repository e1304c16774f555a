"""What tests/test_outer_restart.py starts twice: `torchrun … -m tests.outer_restart_ranks FOLDER`.

Rank 1 kills itself in the middle of a round, the first time; then all go on from the last full state.
"""

import os
import pathlib
import signal
import sys

import gcompress.plugins.ddp
import torch
import torch.distributed as dist

import gcompress

EVERY, KILLED_AT, LAST = 3, 7, 12


def main():
    folder = pathlib.Path(sys.argv[1])
    dist.init_process_group("gloo")
    saved = folder / "state.pt"
    rank, again = dist.get_rank(), saved.exists()
    dist.barrier()
    torch.manual_seed(100 * rank + again)  # of weights and batches: each rank has others
    model = torch.nn.Linear(200, 60)
    engine = gcompress.plugins.ddp.engine()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    outer = gcompress.OuterOptimizer(inner, model, engine, "topk:sparsity=0.9", every=EVERY, momentum=0.5)
    if again:
        outer.load_state_dict(torch.load(saved, weights_only=True))
    begun = outer.steps
    while outer.steps < LAST:
        if outer.steps == KILLED_AT and not again and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        outer.zero_grad()
        model(torch.randn(8, 200)).square().mean().backward()
        outer.step()
        if outer.steps % EVERY == 0:
            state = outer.full_state_dict()
            if rank == 0:
                torch.save(state, folder / "partial.pt")
                (folder / "partial.pt").rename(saved)
    torch.save({"begun": begun, "weights": model.state_dict()}, folder / f"end-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
