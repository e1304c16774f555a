"""What the ranks of tests/test_elastic.py run under `horovodrun`: `python -m tests.elastic_ranks FOLDER`.

Three ranks train with two-phase top-k. One kills itself, so that two go on from the last
commit; then those ask for a third, and with it train to the end. Whoever enters a world, or
commits, writes its residuals to FOLDER.
"""

import os
import pathlib
import signal
import sys

import gcompress.plugins.horovod as gcompress_hvd
import horovod.torch as hvd
import torch

from gcompress import Policy
from tests.patience import wait_patiently

FOLDER = pathlib.Path(sys.argv[1])
KILLED_AT, ENLARGED_AT, LAST = 4, 8, 14


def record(kind, state, exchange):
    """This rank's residuals, in a file that appears at once."""
    residuals = {"step": state.step, "rank": hvd.rank(), "size": hvd.size(), **exchange.state_dict()}
    partial = FOLDER / f"partial-{os.getpid()}"
    torch.save(residuals, partial)
    partial.rename(FOLDER / f"{kind}{state.step}-{hvd.size()}-{os.getpid()}.pt")


def main():
    hvd.init()
    wait_patiently()
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 60)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=Policy("topk:sparsity=0.9", exchange="twophase"),
    )
    exchange = gcompress_hvd.exchange(optimizer)
    torch.manual_seed(os.getpid())  # of batches: each rank sees others

    @hvd.elastic.run
    def train(state):
        record("enter", state, exchange)
        while state.step < LAST:
            optimizer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            if hvd.size() == 3 and state.step == KILLED_AT and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                os.kill(os.getpid(), signal.SIGKILL)  # its gradients are under way
            optimizer.step()
            assert exchange.steps == state.step + 1
            weights = hvd.allgather(model.weight.detach().view(1, -1), name="weights")
            assert (weights == weights[0]).all(), "ranks hold different models"
            state.step += 1
            if hvd.size() == 2 and hvd.rank() == 0 and state.step >= ENLARGED_AT:
                (FOLDER / "enlarge").touch()
            if hvd.size() == 2 and state.step > ENLARGED_AT:
                state.step = ENLARGED_AT  # until the third rank is there, not to the end
                exchange.steps = ENLARGED_AT
            if state.step % 2 == 0:
                record("commit", state, exchange)
                state.commit()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
    record("end", type("State", (), {"step": LAST}), exchange)


if __name__ == "__main__":
    main()
