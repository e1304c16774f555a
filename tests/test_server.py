"""Parameter servers without a network: rounds, staleness, momentum, and workers that go."""

import random

import pytest
import torch

from gcompress import ConfigError, ExchangeError, PayloadError, Policy
from gcompress.exchange.parameter_server import ParameterServer
from gcompress.exchange.partition import PartitionCodec, partition
from gcompress.feedback import ErrorFeedback

SIZES = {"a.weight": 5000, "a.bias": 60, "b.weight": 2100}
SPECS = ["topk:sparsity=0.9", "quantize:bits=3,bucket=64", "mask:sparsity=0.9,bits=2", "quantize:rounding=stochastic"]


def gradient(name, worker, step):
    seed = 1000 * step + 10 * worker + sorted(SIZES).index(name)
    return torch.randn(SIZES[name], generator=torch.Generator().manual_seed(seed))


class Fleet:
    """Workers and servers in one process; messages wait in a bag and arrive in any order that MPI allows."""

    def __init__(self, policy, workers=3, servers=2, seed=0, partition_numel=2048, **options):
        self.parts = partition(SIZES, policy, servers, partition_numel)
        self.codecs = [PartitionCodec(self.parts, policy, f"worker {worker}") for worker in range(workers)]
        self.staleness = options.get("staleness", 0)
        self.skipped = set()  # (worker, its step) whose results are not applied
        self.applied = [0] * workers  # steps
        self.servers = [
            ParameterServer(PartitionCodec(self.parts, policy, "server"), server, range(workers), **options)
            for server in range(servers)
        ]
        self.random = random.Random(seed)
        self.step = [0] * workers
        self.got = [{} for _ in range(workers)]  # {key: its latest answer}
        self.totals = [{name: torch.zeros(numel) for name, numel in SIZES.items()} for _ in range(workers)]
        self.queues = {}  # (worker, key): messages in order
        self.alive = set(range(workers))
        self.handed = []  # (what was answered, a copy of it): an engine may still be sending it

    def start(self, worker, gradients=gradient):
        """One step's pushes and pulls of a worker."""
        self.got[worker].clear()
        applied, keys = (worker, self.step[worker] - 1) not in self.skipped, range(len(self.parts))
        self.codecs[worker].settle(keys, applied)
        self.applied[worker] += applied and self.step[worker] > 0
        for key, part in enumerate(self.parts):
            values = gradients(part.name, worker, self.step[worker])[part.start : part.start + part.numel]
            payload = self.codecs[worker].encode(key, values, self.applied[worker])
            assert payload.numel() == part.nbytes
            self.queues.setdefault((worker, key), []).extend([("push", payload, applied), ("pull",)])
        if self.staleness:  # delivered, whatever becomes of the step
            self.codecs[worker].settle(keys, True)
        self.step[worker] += 1

    def deliver(self):
        """Let one random waiting message arrive; returns whether there was one."""
        ready = [where for where, queue in self.queues.items() if queue and where[0] in self.alive]
        if not ready:
            return False
        worker, key = where = self.random.choice(ready)
        kind, *message = self.queues[where].pop(0)
        answers = getattr(self.servers[self.parts[key].server], kind)(worker, key, *message)
        self.take(answers)
        return True

    def take(self, answers):
        for worker, key, payload in answers:
            assert worker in self.alive and key not in self.got[worker]
            self.got[worker][key] = payload
            self.handed.append((payload, payload.clone()))
            part = self.parts[key]
            values = torch.zeros(part.numel)
            self.codecs[worker].decode(key, payload, values)
            if (worker, self.step[worker] - 1) in self.skipped:
                continue
            self.totals[worker][part.name][part.start : part.start + part.numel] += values

    def remove(self, worker):
        self.alive.discard(worker)
        for server in self.servers:
            self.take(server.remove(worker))

    def done(self, worker):
        return len(self.got[worker]) == len(self.parts)

    def run(self, steps, gradients=gradient):
        """Every live worker takes `steps` steps at its own pace."""
        goal = {worker: self.step[worker] + steps for worker in self.alive}
        for worker in sorted(self.alive):
            self.start(worker, gradients)
        while self.deliver():
            for worker in sorted(self.alive):
                if self.done(worker) and self.step[worker] < goal[worker]:
                    self.start(worker, gradients)
        assert all(self.done(worker) for worker in self.alive), [server.missing() for server in self.servers]
        assert all(torch.equal(payload, copy) for payload, copy in self.handed)
        self.handed.clear()


def simulated(policy, parts, workers, steps, momentum=0.0):
    """The sum over steps of what synchronous workers get, from compressors and memories alone."""
    memories = {worker: ErrorFeedback() for worker in [*workers, "server"]}
    velocity, totals = {}, {name: torch.zeros(numel) for name, numel in SIZES.items()}

    def passed(side, key, values):
        compressor = parts[key].compressor
        if compressor is None:
            return values
        if policy.uses_feedback:
            return compressor.decompress(*memories[side].compress(str(key), values, compressor))
        return compressor.decompress(*compressor.compress(values))

    for step in range(steps):
        for key, part in enumerate(parts):
            own = slice(part.start, part.start + part.numel)
            received = [passed(worker, key, gradient(part.name, worker, step)[own]) for worker in workers]
            mean = received[0].clone()
            for values in received[1:]:
                mean += values
            mean *= 1.0 / len(workers)
            if momentum:
                mean = velocity[key] = mean + velocity[key] * momentum if key in velocity else mean
            totals[part.name][own] += passed("server", key, mean)
    return totals


def test_partitions_cover_every_entry_once_and_share_the_bytes_evenly():
    sizes = {f"layer{i}": numel for i, numel in enumerate([1, 7, 300_000, 2_000_001, 64, 1 << 21, 90_000])}
    for servers in (1, 2, 3, 5):
        parts = partition(sizes, Policy("topk:sparsity=0.99"), servers, 1 << 17)
        for name, numel in sizes.items():
            own = [part for part in parts if part.name == name]
            assert [part.start for part in own] == list(range(0, numel, 1 << 17))
            assert sum(part.numel for part in own) == numel
        loads = [sum(part.nbytes for part in parts if part.server == server) for server in range(servers)]
        assert max(loads) < 1.1 * min(loads)
    assert all(part.compressor is None and part.nbytes == 4 * part.numel for part in partition(sizes, None, 2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spec", SPECS[:3])
def test_synchronous_rounds_are_the_simulated_mean_to_the_bit_in_any_order(spec, momentum):
    policy = Policy(spec)
    for seed in range(3):
        fleet = Fleet(policy, seed=seed, momentum=momentum)
        fleet.run(4)
        expected = simulated(policy, fleet.parts, range(3), 4, momentum)
        for totals in fleet.totals:
            for name in SIZES:
                assert torch.equal(totals[name], expected[name]), (seed, name)


@pytest.mark.parametrize("spec", SPECS)
def test_a_fast_worker_never_changes_what_a_slow_one_gets(spec):
    fleet = Fleet(Policy(spec), workers=2, servers=1)
    for worker in (0, 1):
        fleet.start(worker)
    slow = {key: [] for key in range(len(fleet.parts))}
    # Worker 1's pulls are held back: worker 0 goes on to push the next round.
    for key in slow:
        fleet.take(fleet.servers[0].push(1, key, fleet.queues[1, key].pop(0)[1]))
        slow[key] = fleet.queues.pop((1, key))
    while fleet.deliver():
        pass
    assert fleet.done(0)
    first = dict(fleet.got[0])
    fleet.start(0, lambda name, worker, step: torch.full((SIZES[name],), 100.0))
    while fleet.deliver():
        pass
    assert not fleet.got[0]  # round 2 waits for worker 1
    for key in slow:
        fleet.take(fleet.servers[0].pull(1, key))
    assert all(torch.equal(fleet.got[1][key], first[key]) for key in first)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spec", SPECS[:3])
def test_under_staleness_all_that_was_pushed_arrives(spec, momentum):
    """With feedback on both sides nothing is lost: later rounds of zeros drain what was held back."""
    policy = Policy(spec, min_numel=0)
    fleet = Fleet(policy, staleness=3, momentum=momentum, seed=5)
    fleet.run(4)
    fleet.run(140 if momentum else 60, lambda name, worker, step: torch.zeros(SIZES[name]))
    expected = {name: torch.zeros(numel) for name, numel in SIZES.items()}
    velocity = {name: torch.zeros(numel) for name, numel in SIZES.items()}
    for step in range(144 if momentum else 64):
        for name in SIZES:
            mean = sum(gradient(name, worker, step) for worker in range(3)) / 3 if step < 4 else 0.0
            velocity[name] = velocity[name] * momentum + mean
            expected[name] += velocity[name]
    for totals in fleet.totals:
        for name in SIZES:
            torch.testing.assert_close(totals[name], expected[name], atol=2e-2 if momentum else 2e-3, rtol=0)


def test_staleness_bounds_how_far_ahead_a_worker_gets():
    fleet = Fleet(Policy("topk:sparsity=0.9"), workers=2, staleness=2)
    for step in range(3):
        fleet.start(0)
        while fleet.deliver():
            pass
        assert fleet.done(0) == (step < 2)
    assert {worker for server in fleet.servers for worker in server.missing()} == {1}
    fleet.start(1)
    while fleet.deliver():
        pass
    assert fleet.done(0) and fleet.done(1)


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_rest_go_on_without_a_worker_that_goes(staleness):
    policy = Policy("quantize:bits=8")
    fleet = Fleet(policy, staleness=staleness, seed=3)
    fleet.run(2)
    for worker in (0, 2):
        fleet.start(worker)
    while fleet.deliver():
        pass
    if not staleness:
        assert not fleet.done(0)
        assert {worker for server in fleet.servers for worker in server.missing()} == {1}
    fleet.remove(1)
    assert fleet.done(0) and fleet.done(2)
    before = fleet.totals[0]["a.bias"].clone()  # not compressed
    fleet.run(1)
    if not staleness:
        assert all(torch.equal(fleet.got[0][key], fleet.got[2][key]) for key in fleet.got[0])
        mean = (gradient("a.bias", 0, 3) + gradient("a.bias", 2, 3)) / 2
        torch.testing.assert_close(fleet.totals[0]["a.bias"] - before, mean)
    with pytest.raises(ExchangeError, match="no such worker"):
        fleet.servers[0].pull(1, 0)


def test_what_a_dead_worker_had_pushed_counts():
    fleet = Fleet(None, workers=3, servers=1, partition_numel=1 << 20)
    for worker in range(3):
        fleet.start(worker)
    server = fleet.servers[0]
    for worker in (2, 1):  # 1 dies after it has pushed, 0 is late
        for key in range(len(fleet.parts)):
            fleet.take(server.push(worker, key, fleet.queues[worker, key].pop(0)[1]))
    fleet.remove(1)
    while fleet.deliver():
        pass
    for name in SIZES:
        expected = (gradient(name, 0, 0) + gradient(name, 1, 0) + gradient(name, 2, 0)) * (1.0 / 3)
        assert torch.equal(fleet.totals[0][name], expected)
        assert torch.equal(fleet.totals[2][name], expected)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_non_finite_gradient_is_seen_by_all_and_forgotten(staleness, momentum):
    fleet = Fleet(Policy("topk:sparsity=0.5"), staleness=staleness, momentum=momentum)
    fleet.run(1)
    poison = {"left": True}

    def poisoned(name, worker, step):
        values = gradient(name, worker, step).clone()
        if worker == 1 and poison["left"]:
            values[::7] = float("nan")
        return values

    fleet.totals = [{name: torch.zeros(numel) for name, numel in SIZES.items()} for _ in fleet.totals]
    fleet.run(1, poisoned)
    poison["left"] = False
    if staleness:  # what was pushed after a pull comes with the next one
        fleet.run(1)
    assert all(not totals[name].isfinite().all() for totals in fleet.totals for name in SIZES)
    fleet.totals = [{name: torch.zeros(numel) for name, numel in SIZES.items()} for _ in fleet.totals]
    fleet.run(1)
    assert all(totals[name].isfinite().all() for totals in fleet.totals for name in SIZES)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spec", [*SPECS, None])
def test_a_step_that_nobody_applied_leaves_no_trace(spec, momentum):
    """Steps that all workers skip, one of them poisoned: all that follows is as if they had never been."""
    policy = Policy(spec) if spec else None
    plain, skipping = (Fleet(policy, momentum=momentum, seed=seed) for seed in (1, 2))
    thrown_away = {1, 2, 4}
    kept = [step for step in range(7) if step not in thrown_away]

    def gradients(name, worker, step):
        values = gradient(name, worker, kept.index(step) if step in kept else 100 + step).clone()
        if step == 2 and worker == 1 and name == "a.weight":
            values[17] = float("nan")  # only some keys see it
        return values

    skipping.skipped = {(worker, step) for worker in range(3) for step in thrown_away}
    plain.run(4)
    skipping.run(7, gradients)
    for totals, expected in zip(skipping.totals, plain.totals, strict=True):
        assert all(torch.equal(totals[name], expected[name]) for name in SIZES)
    for key, part in enumerate(plain.parts):
        memories = [fleet.servers[part.server].memory(key) for fleet in (plain, skipping)]
        assert torch.equal(*memories)


def test_loading_the_memory_of_a_beginning_forgets_what_came_after():
    fleet, fresh = (Fleet(Policy("topk:sparsity=0.9"), momentum=0.9) for _ in range(2))
    fleet.run(2)
    for key, part in enumerate(fleet.parts):
        beginning = fresh.servers[part.server].memory(key)
        fleet.servers[part.server].load_memory(key, beginning)
        assert torch.equal(fleet.servers[part.server].memory(key), beginning)


def test_workers_that_do_not_step_alike_are_named():
    fleet = Fleet(Policy("topk:sparsity=0.9"), seed=3)
    fleet.skipped = {(2, 0)}
    with pytest.raises(ExchangeError, match="worker [01] applied the last result, worker 2 did not"):
        fleet.run(2)


def test_under_staleness_what_was_not_applied_is_sent_again():
    """A worker that skips steps gets all in the end, as those that skip none do."""
    fleet = Fleet(Policy("topk:sparsity=0.5"), staleness=2, seed=5)
    fleet.skipped = {(1, 2), (1, 3), (0, 5)}
    fleet.run(8)
    fleet.run(40, lambda name, worker, step: torch.zeros(SIZES[name]))
    for name in SIZES:
        pushed = sum(gradient(name, worker, step) for worker in range(3) for step in range(8)) / 3
        for totals in fleet.totals:
            torch.testing.assert_close(totals[name], pushed, atol=1e-4, rtol=0)


def test_a_key_that_no_worker_has_a_gradient_for_waits():
    policy = Policy("topk:sparsity=0.9")
    parts = partition({"w": 5000}, policy, 1, 1 << 20)
    codec, server = (
        PartitionCodec(parts, policy, "worker"),
        ParameterServer(PartitionCodec(parts, policy, "server"), 0, range(2)),
    )
    nothing = torch.empty(0, dtype=torch.uint8)
    for worker in range(2):
        server.push(worker, 0, codec.encode(0, torch.randn(5000), 0))
    for worker in range(2):
        server.pull(worker, 0)
    before = server.memory(0)[24:]
    for worker in range(2):
        server.push(worker, 0, nothing)
    ((_, _, answer),) = server.pull(0, 0)
    decoded = torch.ones(5000)
    codec.decode(0, answer, decoded)
    assert not decoded.any() and torch.equal(server.memory(0)[24:], before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spec", [*SPECS, None])
def test_a_restart_with_the_saved_memory_goes_on_to_the_bit(spec, momentum):
    policy = Policy(spec) if spec else None
    whole, before, after = (Fleet(policy, momentum=momentum) for _ in range(3))
    whole.run(5)
    before.run(3)
    after.totals, after.step, after.applied = before.totals, before.step, [2] * 3
    for codec, saved in zip(after.codecs, before.codecs, strict=True):
        saved.settle(range(len(before.parts)), True)
        codec.load(codec.checked(saved.state_dict()))
    for key, part in enumerate(before.parts):
        after.servers[part.server].load_memory(key, before.servers[part.server].memory(key))
    after.run(2)
    for totals, expected in zip(after.totals, whole.totals, strict=True):
        for name in SIZES:
            assert torch.equal(totals[name], expected[name]), name
    server, key = after.servers[after.parts[0].server], 0
    with pytest.raises(PayloadError, match=r"memory of 'a\.weight'"):
        server.load_memory(key, server.memory(key)[:-1])
    stale = Fleet(policy, staleness=1).servers[after.parts[0].server]
    for misuse in (lambda: stale.memory(key), lambda: stale.load_memory(key, server.memory(key))):
        with pytest.raises(ConfigError, match="staleness"):
            misuse()


def test_misuse_is_refused_by_name():
    policy = Policy("topk:sparsity=0.9")
    parts = partition(SIZES, policy, 1, 1 << 20)
    codec = PartitionCodec(parts, policy, "server")
    for wrong in ({"momentum": 1.0}, {"momentum": True}, {"staleness": -1}, {"staleness": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ParameterServer(codec, 0, range(2), **wrong)
    with pytest.raises(ConfigError, match="servers"):
        partition(SIZES, policy, 0)
    server = ParameterServer(codec, 0, range(2))
    payload = codec.encode(0, torch.zeros(5000), 0)
    with pytest.raises(ExchangeError, match=r"'a\.weight'.*pulled before"):
        server.pull(0, 0)
    server.push(0, 0, payload)
    with pytest.raises(ExchangeError, match=r"'a\.weight'.*pushed again"):
        server.push(0, 0, payload)
    with pytest.raises(ExchangeError, match="no such key"):
        server.push(0, 17, payload)
    with pytest.raises(PayloadError, match=r"'a\.weight'"):
        server.push(1, 0, payload[:-1])
    with pytest.raises(PayloadError, match=r"'a\.bias'.*expected 240"):
        codec.decode(1, payload[:7], torch.zeros(60))
    with pytest.raises(ConfigError, match=r"'a\.weight'.*got 3 entries"):
        codec.encode(0, torch.zeros(3), 0)
