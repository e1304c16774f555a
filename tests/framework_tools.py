"""What the scenarios of frameworks share: a model, its batches, and a hand-written loop of DistributedDataParallel."""

import contextlib
import logging
import pathlib
import tempfile

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

from gcompress import Policy, Rule
from tests.scenarios import Scenarios

SCENARIOS = of_two = Scenarios()  # on two ranks
ALONE = of_one = Scenarios()
LR, BATCHES, CLIP = 0.1, 3, 0.05  # of each rank in an epoch; a norm that gradients exceed
POLICY = Policy(
    "topk:sparsity=0.9", exchange="twophase", rules=[Rule("quantize:bits=3,rounding=stochastic", name="net.2.*")]
)


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8)
    )


class Net(torch.nn.Module):
    """Computes its loss itself, so that frameworks have nothing to add."""

    def __init__(self):
        super().__init__()
        self.net = layers()

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.net(x), labels)}


class Batches(torch.utils.data.Dataset):
    """Samples of all ranks' batches, of eight, in order: batch 0 is rank 0's, batch 1 rank 1's, and so on."""

    def __init__(self, batches=BATCHES):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(8 * batches * ranks_and_rank()[0], 20, generator=generator)
        self.labels = self.x[:, :8].sin() * 2

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


def batches_of_rank():
    """A rank's own batches of an epoch."""
    ranks, rank = ranks_and_rank()
    return list(torch.utils.data.DataLoader(Batches(), batch_size=8))[rank::ranks]


def ranks_and_rank():
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def loop(policy=POLICY, epochs=2, accumulate=1, clip=None, dtype=None, scaler=None):
    """Train by hand; returns (the weights, the GradientState)."""
    parallel = torch.nn.parallel.DistributedDataParallel(Net())
    state = ddp.register(parallel, policy)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LR)
    batches = batches_of_rank() * epochs
    for number, batch in enumerate(batches, 1):
        last = number % accumulate == 0
        with contextlib.nullcontext() if last else parallel.no_sync():
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = parallel(**batch)["loss"] / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
        if last:
            if scaler:
                scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(parallel.parameters(), clip)
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
            optimizer.zero_grad()
    assert scaler or state.exchange.steps == len(batches) // accumulate
    return weights_of(parallel.module), state


def weights_of(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def same_sums(full, states, ranks=2):
    """A full state must hold the sums of the ranks' residuals, to rounding, in the weight that a rank now has."""
    for name in states[0]["feedback"]:
        expected = sum(state["feedback"][name].view(-1).double() for state in states) * ranks / len(states)
        torch.testing.assert_close(full["sums"][f"residual/{name}"].double(), expected, atol=1e-6, rtol=1e-5)
        assert expected.any()


@contextlib.contextmanager
def shared_folder():
    """A folder that all ranks know."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        yield pathlib.Path(folder[0])
        dist.barrier()


@contextlib.contextmanager
def warnings_of(module):
    """The messages that a module of the library logs as warnings."""
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger(module).addHandler(handler)
    yield found
    logging.getLogger(module).removeHandler(handler)
