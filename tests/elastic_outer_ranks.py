"""What the ranks of tests/test_elastic.py run with outer steps: `python -m tests.elastic_outer_ranks FOLDER`.

Three ranks train. One kills itself in the middle of a round, so that two go on from the last commit; then those ask
for a third, and with it train to the end. Whoever commits or ends writes its anchors and residuals to FOLDER.
"""

import os
import pathlib
import signal
import sys

import gcompress.plugins.horovod as gcompress_hvd
import horovod.torch as hvd
import torch

import gcompress
from tests.patience import wait_patiently

FOLDER = pathlib.Path(sys.argv[1])
EVERY, KILLED_AT, ENLARGED_AT, LAST = 3, 7, 12, 21


def record(kind, outer):
    """What this rank has, in a file that appears at once."""
    found = {"rank": hvd.rank(), "size": hvd.size(), "weights": outer.anchors, **outer.exchange.state_dict()}
    partial = FOLDER / f"partial-{os.getpid()}"
    torch.save(found, partial)
    partial.rename(FOLDER / f"{kind}{outer.steps}-{hvd.size()}-{os.getpid()}.pt")


def main():
    hvd.init()
    wait_patiently()
    torch.manual_seed(os.getpid())  # of weights and batches: each rank has others
    model = torch.nn.Linear(300, 60)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"every": EVERY, "momentum": 0.5}
    outer = gcompress.OuterOptimizer(inner, model, gcompress_hvd.engine(), "topk; exchange=twophase", **options)

    @hvd.elastic.run
    def train(state):
        record("enter", outer)
        while outer.steps < LAST:
            outer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            if hvd.size() == 3 and outer.steps == KILLED_AT and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                os.kill(os.getpid(), signal.SIGKILL)
            outer.step()
            if outer.steps % EVERY == 0:
                weights = hvd.allgather(model.weight.detach().view(1, -1), name="weights")
                assert (weights == weights[0]).all(), "ranks hold different models"
                record("commit", outer)
                state.commit()
            if hvd.size() == 2 and hvd.rank() == 0 and outer.steps >= ENLARGED_AT:
                (FOLDER / "enlarge").touch()
            if hvd.size() == 2 and outer.steps >= LAST - EVERY:
                outer.counts = [ENLARGED_AT, *outer.counts[1:]]  # until the third rank is there, not to the end

    train(hvd.elastic.TorchState(model=model, outer=outer))
    record("end", outer)


if __name__ == "__main__":
    main()
