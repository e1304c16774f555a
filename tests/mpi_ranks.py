"""What the ranks of tests/test_mpi.py run: `mpirun -np N python mpi_ranks.py OUT SCENARIO…`.

Each scenario makes a Job; its servers serve and its workers check. Rank 0 writes {scenario:
"ok" or the error} to OUT. What a worker must get is simulated in its own process, from
compressors and error feedback alone.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from unittest import mock

import gcompress.plugins.mpi as servers
import torch

import gcompress
from gcompress import MaskSparse, Policy, Quantize, TopK
from gcompress.exchange import engine
from gcompress.feedback import ErrorFeedback
from tests.processes import expect_error
from tests.scenarios import Scenarios, run_scenarios

SCENARIOS = scenario = Scenarios()  # of workers
OF_ALL = of_all = Scenarios()  # of servers, too
SERVERS = 2


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 50, bias=False))


def make_optimizer(job, model, compression, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return servers.DistributedOptimizer(optimizer, model.named_parameters(), job, compression, **options)


def backward(model, step, worker):
    generator = torch.Generator().manual_seed(1000 * step + worker)
    model(torch.randn(8, 40, generator=generator)).square().mean().backward()


def local_gradients(step, worker):
    """What a worker computes in a step, from a model of its own (weights never change here)."""
    model = make_model()
    backward(model, step, worker)
    return {name: p.grad for name, p in model.named_parameters()}


def expected_means(policy, partitions, workers, steps):
    memories = {side: ErrorFeedback() for side in [*range(workers), "server"]}

    def passed(side, part, values):
        if part.compressor is None:
            return values
        payload, ctx = (
            memories[side].compress(f"{part.name}{part.start}", values, part.compressor)
            if policy.uses_feedback
            else part.compressor.compress(values)
        )
        return part.compressor.decompress(payload, ctx)

    for step in range(steps):
        gradients = [local_gradients(step, worker) for worker in range(workers)]
        means = {name: torch.empty(g.numel()) for name, g in gradients[0].items()}
        for part in partitions:
            own = slice(part.start, part.start + part.numel)
            total = None
            for worker in range(workers):
                values = passed(worker, part, gradients[worker][part.name].view(-1)[own])
                total = values.clone() if total is None else total + values
            means[part.name][own] = passed("server", part, total * (1.0 / workers))
        yield {name: mean.view(gradients[0][name].shape) for name, mean in means.items()}


def check_steps(job, policy, steps=3, **options):
    """Real optimizer steps against the simulation, to the bit."""
    policy = gcompress.as_policy(policy)
    model = make_model()
    optimizer = make_optimizer(job, model, policy, **options)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    partitions = servers.exchange(optimizer).partitions
    for step, expected in enumerate(expected_means(policy, partitions, job.size, steps)):
        optimizer.zero_grad()
        backward(model, step, job.rank)
        optimizer.synchronize()
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, expected[name]), (step, name, (p.grad - expected[name]).abs().max())
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), start[name] - expected[name])
            p.data.copy_(start[name])  # the simulation's weights stand still
    return optimizer


@scenario
def mask_with_feedback(job):
    report = servers.exchange(check_steps(job, MaskSparse(sparsity=0.95, bits=2))).report
    compressor = MaskSparse(sparsity=0.95, bits=2)
    per_step = compressor.nbytes(2400) + compressor.nbytes(3000) + 4 * 60
    assert (report.steps, report.last_step_bytes, report.sent_bytes) == (3, per_step, 3 * per_step), report
    assert report.pulled_bytes == report.wire_bytes == report.sent_bytes
    assert report.fp32_bytes == 3 * 4 * (2400 + 3000 + 60), report


@scenario
def partitions_smaller_than_tensors(job):
    optimizer = check_steps(job, TopK(sparsity=0.9), partition_bytes=4 * 500)
    partitions = servers.exchange(optimizer).partitions
    assert len(partitions) == 5 + 1 + 6 and {part.server for part in partitions} == set(range(SERVERS))


@scenario
def a_worker_that_leaves_amid_an_exchange_waits_for_its_answers(job):
    """MPI would write them into memory that is given back."""
    worker = servers.Worker(job, {"w": 3000}, "topk:sparsity=0.9")
    if job.rank > 0:  # the answers cannot come before worker 0 is about to leave
        job.workers.recv(source=0)
    worker.push_pull("w", torch.randn(3000))
    for rank in range(1, job.size) if job.rank == 0 else ():
        job.workers.send(None, dest=rank)
    requests = [request for request, _ in worker._asked.values()]
    job.close()
    assert requests and all(request == servers.job.MPI.REQUEST_NULL for request in requests)


@scenario
def quantize_without_feedback(job):
    check_steps(job, Policy(Quantize(bits=4), min_numel=0, error_feedback=False))


@scenario
def nothing_compressed(job):
    check_steps(job, Policy("topk", min_numel=10**9))


@scenario
def any_order_of_gradients_and_stalls(job):
    """Workers push in orders of their own and at paces of their own; one never uses half of the parameters."""
    names = [f"p{number}" for number in range(12)]
    worker = servers.Worker(job, dict.fromkeys(names, 3000), "quantize:bits=8")
    shuffle = random.Random(job.rank)
    for step in range(8):
        shuffle.shuffle(names)
        finish = {}
        for name in names:
            if shuffle.random() < 0.1:
                time.sleep(0.005)
            finish[name] = worker.push_pull(name, torch.full((3000,), float(step + job.rank)))
        shuffle.shuffle(names)
        expected = step + (job.size - 1) / 2
        for name in names:
            torch.testing.assert_close(finish[name](), torch.full((3000,), expected), atol=0.05, rtol=0)


@scenario
def unused_parameters_and_accumulation(job):
    model = make_model()
    optimizer = make_optimizer(job, model, None, backward_passes_per_step=2)
    own = model[0] if job.rank == 0 else model
    for _ in range(2):
        for _ in range(2):
            own(torch.ones(1, 40)).sum().backward()
        optimizer.synchronize()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        gathered = [g for g in job.sum([model[2].weight.grad.sum().item()])]
        assert abs(gathered[0] - job.size * model[2].weight.grad.sum().item()) < 1e-3
        optimizer.step()
        optimizer.zero_grad()
    own(torch.ones(1, 40)).sum().backward()
    own(torch.ones(1, 40)).sum().backward()
    expect_error(gcompress.ConfigError, "backward_passes", lambda: own(torch.ones(1, 40)).sum().backward())


@scenario
def sums_of_numbers(job):
    expect_error(gcompress.ConfigError, "sum", lambda: job.sum([1]))
    servers.Worker(job, {"w": 5})
    for count in (1, 1000, 0):
        told = job.sum([0.1 * job.rank] * count)
        assert told == [sum(0.1 * rank for rank in range(job.size))] * count, told


@scenario
def momentum_on_the_servers(job):
    """Plain SGD with the servers' momentum is SGD with momentum on one process, for what is not compressed."""
    model, other = make_model(), make_model()
    optimizer = make_optimizer(job, model, None, momentum=0.9)
    reference = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step, 7)  # the same on all workers
        optimizer.step()
        reference.zero_grad()
        backward(other, step, 7)
        reference.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@scenario
def bounded_staleness(job):
    """Workers at different paces; after rounds of zeros each has got the sum of all that was pushed."""
    worker = servers.Worker(job, {"w": 5000}, "topk:sparsity=0.9", staleness=3)
    total, pushed = torch.zeros(5000), torch.zeros(5000)
    for step in range(60):
        values = torch.zeros(5000)
        if step < 5:
            values = torch.randn(5000, generator=torch.Generator().manual_seed(10 * step + job.rank))
            for other in range(job.size):
                generator = torch.Generator().manual_seed(10 * step + other)
                pushed += torch.randn(5000, generator=generator) / job.size
            time.sleep(0.01 * job.rank)
        total += worker.push_pull("w", values)()
    torch.testing.assert_close(total, pushed, atol=1e-3, rtol=0)


@scenario
def types_and_shapes(job):
    sizes = {"half": 3000, "double": 3000, "scalar": 1, "empty": 0, "bfloat": 2048}
    worker = servers.Worker(job, sizes, "quantize:bits=8")
    for name, dtype in (("half", torch.float16), ("double", torch.float64), ("bfloat", torch.bfloat16)):
        tensor = torch.full((sizes[name] // 4, 4), 1.0 + job.rank, dtype=dtype)
        mean = worker.push_pull(name, tensor.t())()
        assert mean.dtype == dtype and mean.shape == tensor.t().shape
        torch.testing.assert_close(mean, torch.full_like(mean, (job.size + 1) / 2), atol=0.02, rtol=0)
    assert worker.push_pull("scalar", torch.tensor(float(job.rank)))().item() == (job.size - 1) / 2
    assert worker.push_pull("empty", torch.zeros(0))().shape == (0,)


@scenario
def large_tensors_and_broadcast(job):
    state = {"w": torch.full((3, 700_001), float(job.rank)), "count": torch.tensor(job.rank)}
    job.broadcast(state)
    assert not state["w"].any() and state["count"] == 0
    worker = servers.Worker(job, {"w": 3_000_000}, None, partition_bytes=1 << 20)
    mean = worker.push_pull("w", torch.full((3_000_000,), float(job.rank)))()
    torch.testing.assert_close(mean, torch.full_like(mean, (job.size - 1) / 2))


@scenario
def payloads_of_variable_size(job):
    check_steps(job, "threshold")


@scenario
def non_finite_is_seen_and_forgotten(job):
    model = make_model()
    optimizer = make_optimizer(job, model, MaskSparse(sparsity=0.9, bits=2))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, job.rank)
        optimizer.synchronize()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        before = {name: t.clone() for name, t in servers.exchange(optimizer).state_dict()["feedback"].items()}
        optimizer.zero_grad()
        poison = float("nan") if job.rank == 1 else 1.0
        (model(torch.randn(8, 40)).square().mean() * poison).backward()
        optimizer.synchronize()
        assert not any(p.grad.isfinite().all() for p in (model[0].weight, model[2].weight))
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
        after = servers.exchange(optimizer).state_dict()["feedback"]
        if job.rank == 1:
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(t.isfinite().all() for t in after.values())


@scenario
def state_of_workers_and_servers(job):
    """What follows a restart is what would have followed without: residuals on both sides, momentum, seeds."""
    options = {"momentum": 0.9, "partition_bytes": 4000}
    worker = servers.Worker(job, {"w": 3000, "v": 10}, "quantize:bits=2,rounding=stochastic", **options)

    def steps(numbers):
        means = []
        for step in numbers:
            seed = torch.Generator().manual_seed(10 * step + job.rank)
            means += [worker.push_pull(name, torch.randn(n, generator=seed)) for name, n in (("w", 3000), ("v", 10))]
            means = [mean() if callable(mean) else mean for mean in means]
            worker.end_step()
        return means

    steps(range(2))
    state = worker.state_dict()
    expected = steps(range(2, 5))
    assert not torch.equal(expected[0], steps(range(2, 5))[0])
    worker.load_state_dict(state)
    assert worker.report.steps == 2 and len(state["servers"]) == (4 if job.rank == 0 else 0)
    assert all(map(torch.equal, expected, steps(range(2, 5))))
    expect_error(gcompress.ConfigError, "policy", lambda: worker.load_state_dict({**state, "policy": None}))
    other = {**state, "partition_numel": 7}
    expect_error(gcompress.ConfigError, "partition_bytes", lambda: worker.load_state_dict(other))
    worker._staleness = 1  # what a job with it has; one job has one worker
    if job.rank == 0:
        expect_error(gcompress.ConfigError, "staleness", lambda: worker.load_state_dict(state))
    worker.push("w", torch.zeros(3000))
    expect_error(gcompress.ExchangeError, "on their way", worker.state_dict)
    finish = worker.pull("w")
    expect_error(gcompress.ExchangeError, "on their way", worker.state_dict)
    finish()


@scenario
def misuse(job):
    worker = servers.Worker(job, {"w": 3000})
    expect_error(gcompress.ConfigError, "connection already", lambda: servers.Worker(job, {"w": 3000}))
    expect_error(gcompress.ConfigError, "expected one of", lambda: worker.push("v", torch.zeros(3000)))
    expect_error(gcompress.ConfigError, "got 7 entries", lambda: worker.push("w", torch.zeros(7)))
    expect_error(gcompress.ExchangeError, "pulled before", lambda: worker.pull("w"))
    worker.push("w", torch.ones(3000))
    expect_error(gcompress.ExchangeError, "pushed again", lambda: worker.push("w", torch.zeros(3000)))
    assert torch.equal(worker.pull("w")(), torch.ones(3000))
    expect_error(gcompress.ConfigError, "server ranks only", job.serve)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expect_error(gcompress.ConfigError, "at least one worker", lambda: servers.Job(99))
    expect_error(gcompress.ConfigError, "--with-ft ulfm", lambda: servers.Job(1, "continue"))
    wrong = lambda: servers.DistributedOptimizer(optimizer, model[0].named_parameters(), job)  # noqa: E731
    expect_error(gcompress.ConfigError, "of which 1 that the optimizer steps are missing", wrong)
    expect_error(gcompress.ConfigError, "SGD", lambda: servers.exchange(optimizer))


@scenario
def a_worker_that_has_fewer_steps_leaves(job):
    """The others' means are over those that are left."""
    train(job, steps=3 + 2 * job.rank)


@of_all
def a_server_of_another_release_is_refused_everywhere():
    """On every rank, which then make other jobs."""
    job = servers.Job(SERVERS)
    other = int(job.is_server and job.rank == 0)
    with mock.patch.object(engine, "FORMAT_VERSION", engine.FORMAT_VERSION + other):
        try:
            train(job)
        except gcompress.ConfigMismatchError as error:
            assert str(error).startswith("format: ") and "ranks [0, 1, 2, 4]" in str(error), error
        else:
            raise AssertionError("expected ConfigMismatchError")
    job.close()


# Scenarios that end badly, or should; each is run alone.


def job_of_three(on_failure="end"):
    """Three workers; all others serve."""
    return servers.Job(servers.job.MPI.COMM_WORLD.size - 3, on_failure)


def train(job, compression="topk:sparsity=0.9", steps=5, **options):
    if job.is_server:
        return job.serve()
    model = make_model()
    optimizer = make_optimizer(job, model, compression, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, job.rank)
        optimizer.step()
    return model


def killed_worker(on_failure="end", steps=60):
    """Worker 1 dies in its fourth step, between a push and its pull; the others take all their steps."""
    job = job_of_three(on_failure)
    if job.is_server:
        return job.serve()
    worker = servers.Worker(job, {"w": 5000}, "quantize:bits=8")
    for step in range(steps):
        worker.push("w", torch.full((5000,), float(job.rank)))
        if job.rank == 1 and step == 3:
            worker.job.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        mean = worker.pull("w")()
    # Quantized: within a step of the mean of those that are left.
    assert abs(mean.mean().item() - (0 + 2) / 2) < 0.05, mean.mean()
    told = job.sum([1.0, job.rank])
    assert told == [2.0, 2.0], told


def killed_worker_continue():
    killed_worker("continue")


def killed_worker_stale():
    """The same under bounded staleness, where nobody waits for the dead one at first."""
    job = job_of_three("continue")
    if job.is_server:
        return job.serve()
    worker = servers.Worker(job, {"w": 5000}, "quantize:bits=8", staleness=2)
    for step in range(40):
        if job.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        worker.push_pull("w", torch.ones(5000))()


def killed_at_sum():
    """Worker 1 dies while the others wait for its numbers."""
    job = job_of_three("continue")
    if job.is_server:
        return job.serve()
    servers.Worker(job, {"w": 5})
    assert job.sum([1.0, job.rank]) == [3.0, 3.0]
    if job.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert job.sum([1.0, job.rank]) == [2.0, 2.0]


def killed_server():
    job = job_of_three("continue")
    if job.is_server and job.rank == 0:
        # It agrees, then it is gone.
        engine.agree(job.all_ranks, job.settings)
        os.kill(os.getpid(), signal.SIGKILL)
    train(job, steps=1000)


def failing_worker():
    """An exception on one worker, which the others must not wait for."""
    job = job_of_three("continue")
    if job.is_server:
        return job.serve()
    worker = servers.Worker(job, {"w": 5000})
    for step in range(10):
        if job.rank == 1 and step == 3:
            raise ValueError("this worker has had enough")
        worker.push_pull("w", torch.ones(5000))()


def hanging_worker(on_failure="end"):
    job = job_of_three(on_failure)
    if job.is_server:
        return job.serve()
    worker = servers.Worker(job, {"w": 5000})
    for step in range(10):
        if job.rank == 1 and step == 3:
            hang()
        worker.push_pull("w", torch.ones(5000))()


def hang():
    while True:
        time.sleep(1)


def hanging_worker_continue():
    hanging_worker("continue")


def in_a_job(function):
    """Run a scenario on the workers of a new Job, which its servers serve."""
    job = servers.Job(SERVERS)
    if job.is_server:
        return job.serve()
    try:
        function(job)
    except Exception:
        if job.connection is None:  # the servers wait for it
            traceback.print_exc()
            servers.job.MPI.COMM_WORLD.Abort(1)
        raise
    finally:
        job.close()


def write_outcome(outcome):
    path = f"{sys.argv[1]}.{servers.job.MPI.COMM_WORLD.rank}"
    with open(f"{path}.part", "w") as file:
        json.dump(outcome, file)
    os.replace(f"{path}.part", path)  # the launcher may end this rank amid it


def main():
    out, names = sys.argv[1], sys.argv[2:]
    if len(names) == 1 and names[0] not in {**SCENARIOS, **OF_ALL}:
        try:
            globals()[names[0]]()
            write_outcome("finished")
        except Exception as error:
            write_outcome([type(error).__name__, str(error)])
            raise
        return
    world = servers.job.MPI.COMM_WORLD
    every = {**{name: functools.partial(in_a_job, function) for name, function in SCENARIOS.items()}, **OF_ALL}
    run_scenarios({name: every[name] for name in names or every}, out, world.rank, world.allgather)


if __name__ == "__main__":
    main()
