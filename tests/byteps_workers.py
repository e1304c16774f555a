"""What the workers of tests/test_byteps.py run, through gcompress.plugins.byteps.launch.

Each scenario trains a few steps on real BytePS workers and servers; worker 0 writes {scenario:
"ok" or the error} to OUT. What comes back is compared with a simulation of all workers and of
the server in this process, from the compressors and error feedback of the library: BytePS's
C++ side has to give the same bits.
"""

import json
import os
import signal
import sys

import byteps.torch as bps
import gcompress.plugins.byteps as gcompress_bps
import torch
from gcompress.plugins.byteps.push_pull import partition_lengths

import gcompress
from gcompress import Eden, MaskSparse, Policy, Quantize, RandomK, Rule, TopK
from gcompress.feedback import ErrorFeedback
from tests.processes import expect_error
from tests.scenarios import Scenarios, failure_of

SCENARIOS = scenario = Scenarios()


def make_model(tag):
    """A model with parameters' names of its own: BytePS keeps what it knows of a name for good."""
    torch.manual_seed(0)
    layers = {"a": torch.nn.Linear(40, 60), "b": torch.nn.Linear(60, 50, bias=False)}
    return torch.nn.ModuleDict({tag: torch.nn.ModuleDict(layers)})


def backward(model, tag, step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    hidden = torch.relu(model[tag]["a"](torch.randn(8, 40, generator=generator)))
    model[tag]["b"](hidden).square().mean().backward()


def expected_means(policy, tag, steps):
    """Every step's mean, as workers and one server with the library's compressors would have it."""
    memories = {side: ErrorFeedback() for side in [*range(bps.size()), "server"]}

    def passed(side, name, values):
        compressor = policy.compressor_for(name, values.numel())
        if compressor is None:
            return values
        if policy.feedback_for(compressor):
            return compressor.decompress(*memories[side].compress(name, values, compressor))
        return compressor.decompress(*compressor.compress(values))

    for step in range(steps):
        total = {}
        for rank in range(bps.size()):
            model = make_model(tag)
            backward(model, tag, step, rank)
            for name, p in model.named_parameters():
                sent = passed(rank, name, p.grad.view(-1)).view(p.shape)  # BytePS knows no shapes
                total[name] = total[name] + sent if name in total else sent.clone()
        yield {
            name: passed("server", name, value.view(-1)).view(value.shape) / bps.size() for name, value in total.items()
        }


def check_steps(tag, compression, steps=4):
    policy = gcompress.as_policy(compression)
    model = make_model(tag)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gcompress_bps.DistributedOptimizer(optimizer, model.named_parameters(), compression)
    for step, expected in enumerate(expected_means(policy, tag, steps)):
        optimizer.zero_grad()
        backward(model, tag, step, bps.rank())
        optimizer.synchronize()
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, expected[name]), (step, name, (p.grad - expected[name]).abs().max())
        with optimizer.skip_synchronize():
            optimizer.step()
    return gcompress_bps.exchange(optimizer).report


@scenario
def mask():
    report = check_steps("mask", MaskSparse(sparsity=0.95, bits=2))
    compressor = MaskSparse(sparsity=0.95, bits=2)
    # One byte of each says whether the last result was applied.
    per_step = compressor.nbytes(2400) + compressor.nbytes(3000) + 2 + 4 * 60
    assert (report.steps, report.last_step_bytes, report.sent_bytes) == (4, per_step, 4 * per_step), report
    assert report.pulled_bytes == report.sent_bytes


@scenario
def every_native_method():
    for number, spec in enumerate(
        [
            "quantize:bits=4",
            "quantize:bits=1",
            "quantize:bits=3,bucket=64",
            "quantize:bits=8,bucket=0",
            "topk:sparsity=0.9",
            "topk:sparsity=0.999",
            "topk:sparsity=0.5,index=bitmap",
            "topk:sparsity=0.9,index=fixed",
            "mask:sparsity=0.9,bits=3",
            "mask:sparsity=0.9,bits=2,levels=lloyd",
            "mask:sparsity=0.9,bits=2,signed=false",
            "sign",
            "sign:bucket=128",
            "onebit",
            "fp16",
            "fp8",
            "mxfp4",
            "bf16",
        ]
    ):
        check_steps(f"method{number}", spec, steps=2)


@scenario
def methods_called_in_python():
    for number, spec in enumerate(
        ["polar:rate=0.5", "polar:rate=2", "ternary:rounding=nearest", "chain:(topk:sparsity=0.9),(quantize:bits=4)"]
    ):
        check_steps(f"python{number}", spec, steps=2)


@scenario
def without_feedback():
    check_steps("plain", Policy(Quantize(bits=3), error_feedback=False))


@scenario
def chosen_per_tensor():
    rules = [Rule("topk:sparsity=0.9", name="*.a.weight"), Rule("none", name="*.b.*")]
    report = check_steps("rules", Policy("quantize:bits=4", rules=rules))
    assert report.last_step_bytes == TopK(sparsity=0.9).nbytes(2400) + 1 + 4 * 60 + 4 * 3000


@scenario
def many_partitions():
    """A tensor of several partitions, the last one short, and payloads drawn at random."""
    check_partitions("parts", Quantize(bits=8, rounding="stochastic"))


@scenario
def many_partitions_called_in_python():
    check_partitions("rotated", Eden(bits=8))


def check_partitions(name, compressor):
    p = torch.nn.Parameter(torch.zeros(70_001))
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer = gcompress_bps.DistributedOptimizer(optimizer, [(name, p)], compressor)
    for step in range(5):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        common = torch.randn(70_001, generator=generator)
        (p * (common * (1 + bps.rank()))).sum().backward()
        optimizer.synchronize()
        torch.testing.assert_close(p.grad, common * (1 + bps.size()) / 2, atol=0.2, rtol=0)
        with optimizer.skip_synchronize():
            optimizer.step()
    lengths = partition_lengths(70_001)
    assert len(lengths) > 2 and sum(lengths) == 70_001
    report = gcompress_bps.exchange(optimizer).report
    told = 0 if compressor.unbiased else len(lengths)  # with feedback, a byte of each says what was applied
    assert report.last_step_bytes == sum(map(compressor.nbytes, lengths)) + told


@scenario
def replicas_stay_the_same():
    """Uneven workers: what a fast one pushes must not reach what a slow one still pulls."""
    import time

    p = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer = gcompress_bps.DistributedOptimizer(optimizer, [("replica", p)], "quantize:bits=4")
    for step in range(60):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + bps.rank())
        (p * torch.randn(50_000, generator=generator)).sum().backward()
        if step % 7 == bps.rank():
            time.sleep(0.01)
        optimizer.step()
    total = bps.push_pull(p.detach().double(), average=False, name="replica.sum")
    assert torch.equal(total, p.detach().double() * bps.size())


@scenario
def randomk_payloads_are_summed_by_the_servers():
    p = torch.nn.Parameter(torch.zeros(5000))
    compression = gcompress_bps.Compression(Policy(RandomK(sparsity=0.5), error_feedback=True))
    optimizer = gcompress_bps.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("summed", p)], compression)
    total = torch.zeros(5000)
    for step in range(40):
        optimizer.zero_grad()
        if step == 0:
            (p * torch.arange(5000.0) * (1 + bps.rank())).sum().backward()
        else:
            p.sum().mul(0.0).backward()
        optimizer.synchronize()
        total += p.grad
        with optimizer.skip_synchronize():
            optimizer.step()
    torch.testing.assert_close(total, torch.arange(5000.0) * (1 + bps.size()) / 2, atol=1e-2, rtol=1e-5)
    assert gcompress_bps.exchange(optimizer).report.last_step_bytes == 4 * 2500


@scenario
def non_finite_is_seen_and_forgotten():
    p = torch.nn.Parameter(torch.zeros(5000))
    optimizer = gcompress_bps.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("poison", p)], "topk:sparsity=0.5")
    for step in range(3):
        optimizer.zero_grad()
        scale = float("nan") if step == 1 and bps.rank() == 1 else 1.0
        (p * torch.arange(5000.0) * scale).sum().backward()
        optimizer.synchronize()
        assert bool(p.grad.isfinite().all()) == (step != 1)
        with optimizer.skip_synchronize():
            p.grad.zero_()
            optimizer.step()


@scenario
def stock_compression_is_counted():
    for tag, compression, size in (("none", None, 4), ("fp16", bps.Compression.fp16, 2)):
        p = torch.nn.Parameter(torch.ones(3000))
        optimizer = gcompress_bps.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [(tag, p)], compression)
        (p * (1 + bps.rank())).sum().backward()
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3000,), 1 - (1 + bps.size()) / 2))
        assert gcompress_bps.exchange(optimizer).report.sent_bytes == size * 3000


@scenario
def misuse():
    def optimizer_of(p, compression):
        return gcompress_bps.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("misuse", p)], compression)

    p = torch.nn.Parameter(torch.ones(3000))
    expect_error(gcompress.ConfigError, "makes 3000 entries larger", lambda: optimizer_of(p, "topk:sparsity=0.0"))
    expect_error(gcompress.ConfigError, "fixed size", lambda: optimizer_of(p, "threshold"))
    expect_error(gcompress.ConfigError, "warmup_steps", lambda: optimizer_of(p, Policy("topk", warmup_steps=10)))
    expect_error(gcompress.ConfigError, "torch.float64", lambda: optimizer_of(torch.nn.Parameter(p.double()), "topk"))
    expect_error(gcompress.ConfigError, "payloads add up", lambda: gcompress_bps.Compression("topk"))
    expect_error(gcompress.ConfigError, "SGD", lambda: gcompress_bps.exchange(torch.optim.SGD([p], lr=1.0)))


# Scenarios that end the job; each is run alone.


def killed_worker():
    train("quantize:bits=4", lambda step: step == 3 and bps.rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))


def failing_worker():
    def fail(step):
        if step == 3 and bps.rank() == 1:
            raise ValueError("this worker has had enough")

    train("quantize:bits=4", fail)


def hanging_worker():
    train("quantize:bits=4", lambda step: step == 3 and bps.rank() == 1 and signal.pause())


def train(compression, before_step=lambda step: None, steps=1000):
    model = make_model("trained")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gcompress_bps.DistributedOptimizer(optimizer, model.named_parameters(), compression)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, "trained", step, bps.rank())
        before_step(step)
        optimizer.step()


def main():
    out, names = sys.argv[1], sys.argv[2:]
    gcompress_bps.init()
    if len(names) == 1 and names[0] not in SCENARIOS:
        try:
            globals()[names[0]]()
        except Exception as error:
            with open(f"{out}.{bps.rank()}", "w") as file:
                json.dump([type(error).__name__, str(error)], file)
            raise
        return
    for name in names or SCENARIOS:
        outcome = failure_of(SCENARIOS[name], f"worker {bps.rank()}") or "ok"
        with open(f"{out}.{bps.rank()}", "a") as file:
            file.write(json.dumps([name, outcome]) + "\n")


if __name__ == "__main__":
    main()
