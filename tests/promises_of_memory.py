"""What residuals that decay and EF21's estimates promise, on every engine; see promises.py."""

import torch

from gcompress import ConfigError, Policy, TopK
from tests.promises import LEARNING_RATE, batch, make_model, promise, refused, sgd, train, weights

STEPS = 6


class Given(torch.nn.Module):
    """Its parameter's gradient is its input."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2048))

    def forward(self, x):
        return self.w * x


def gradient(step, rank):
    return torch.randn(2048, generator=torch.Generator().manual_seed(100 * step + rank))


def by_hand(compressor, decay, size, second, local_size=1):
    """The sum of all means that are delivered; second: whether a mean is encoded again, with memory of its own.

    local_size: how many ranks encode their mean together.
    """
    size //= local_size

    def mean_gradient(step, node):
        return sum(gradient(step, local_size * node + local) for local in range(local_size)) / local_size

    memories, memory, total = [torch.zeros(2048) for _ in range(size)], torch.zeros(2048), torch.zeros(2048)

    def sent(remembered, values):
        remembered.mul_(decay).add_(values)
        decoded = compressor.decompress(*compressor.compress(remembered))
        remembered.sub_(decoded)
        return decoded

    for step in range(STEPS):
        mean = sum(sent(each, mean_gradient(step, node)) for node, each in enumerate(memories)) / size
        total += sent(memory, mean) if second else mean
    return total


@promise()
def residuals_decay_by_the_policys_factor(new):
    """On ranks, owners and servers alike; a decay of 1 is the plain residual."""
    compressor = TopK(sparsity=0.9)
    ways = ("allgather", "twophase") if new.trainer.engine in ("horovod", "ddp") else ("auto",)
    for way in ways:
        for decay in (0.5, 1.0):
            with new(Given(), Policy(compressor, feedback_decay=decay, exchange=way), sgd) as trainer:
                for step in range(STEPS):
                    trainer.optimizer.zero_grad()
                    trainer.call(gradient(step, trainer.rank)).sum().backward()
                    trainer.synchronize()
                    trainer.step()
                second = way != "allgather"
                expected = by_hand(compressor, decay, trainer.size, second, trainer.local_size)
                torch.testing.assert_close(-trainer.model.w.detach() / LEARNING_RATE, expected, atol=1e-4, rtol=1e-4)


@promise("horovod", "ddp", "mpi")
def what_ef21_delivers_is_the_mean_of_the_ranks_estimates(new):
    """But for what an owner's or a server's second encoding still owes; a step that is skipped moves nothing."""
    found = ["quantize:bits=3; error_feedback=ef21"]
    if new.trainer.engine != "mpi":
        found += ["topk:sparsity=0.9; error_feedback=ef21; exchange=twophase", "lowrank:rank=2; error_feedback=ef21"]
    for policy in found:
        with new(make_model(), policy) as trainer:
            train(trainer, steps=4)
            before = weights(trainer)
            trainer.optimizer.zero_grad()
            trainer.loss(batch(4, trainer.rank)).backward()
            trainer.synchronize()
            trainer.step()
            memory, after = trainer.memory(), weights(trainer)
            for name, p in trainer.model.named_parameters():
                keys = f"feedback/delivered/{name}", f"feedback/delivered/{name}/0"
                delivered = next((memory[key] for key in keys if key in memory), None)
                if delivered is None:  # too small to be compressed
                    continue
                applied = (before[name] - after[name]).view(-1) / LEARNING_RATE
                torch.testing.assert_close(applied, delivered, atol=1e-5, rtol=1e-4)
                assert trainer.same(delivered), policy
                residual = next(value for key, value in memory.items() if key.startswith(f"feedback/residual/{name}"))
                estimates = -trainer.mean(residual)
                owed = torch.zeros(p.numel())
                for key, value in memory.items():
                    if key.startswith(f"owner_feedback/{name}["):
                        start, stop = map(int, key.rpartition("[")[2][:-1].split(":"))
                        owed[start:stop] = value
                owed = trainer.mean(owed + trainer.residuals_of_servers(name, p.numel())) * trainer.size
                torch.testing.assert_close(delivered + owed, estimates, atol=1e-4, rtol=1e-4)


@promise("horovod", "ddp", "mpi")
def ef21_follows_a_gradient_that_stays(new):
    """What is delivered comes to be the mean itself, however coarse the compressor."""
    with new(Given(), "topk:sparsity=0.9; error_feedback=ef21", sgd) as trainer:
        for _ in range(40):
            before = trainer.model.w.detach().clone()
            trainer.optimizer.zero_grad()
            trainer.call(gradient(0, trainer.rank)).sum().backward()
            trainer.synchronize()
            trainer.step()
        last = (before - trainer.model.w.detach()) / LEARNING_RATE
        mean = sum(gradient(0, rank) for rank in range(trainer.size)) / trainer.size
        torch.testing.assert_close(last, mean, atol=1e-3, rtol=1e-3)


@promise("byteps")
def residuals_that_are_kept_in_another_form_are_refused(new):
    with refused(ConfigError, "residual: got 'int8'"):
        new(make_model(), "topk:sparsity=0.9; residual=int8")


@promise("mpi")
def the_packed_memory_of_workers_is_merged(new):
    """Every worker takes the mean of all residuals, packed again."""
    with new(make_model(), "topk:sparsity=0.9; residual=int8") as trainer:
        train(trainer, steps=3)
        before = trainer.exchange._codec._feedback.tensors()["residual"]
        means = {name: trainer.mean(before[name]) for name in sorted(before)}  # all ranks in one order
        trainer.exchange.load_state_dict(trainer.state_of_all())
        after = trainer.exchange._codec._feedback.tensors()["residual"]
        assert means.keys() == after.keys()
        for name, mean in means.items():
            assert (after[name] - mean).abs().max() <= 1.01 * 2 / 254 * mean.abs().max(), name
        train(trainer, steps=1)
