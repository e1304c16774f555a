"""What the ranks of tests/test_node_engines.py run: `node_ranks.py ENGINE OUT [SCENARIO…]`, as nodes of two ranks.

ENGINE is ddp or horovod. All ranks may be on one host; then they are told that they are on nodes of TEST_LOCAL_SIZE.
Rank 0 writes {scenario: "ok" or the ranks' errors} to OUT.
"""

import dataclasses
import datetime
import functools
import logging
import os
import sys

import torch
import torch.distributed as dist

import gcompress
from gcompress import Policy
from tests.placement import place_for_horovodrun, place_for_torchrun
from tests.processes import expect_error
from tests.scenarios import run_scenarios
from tests.simulation import NodeSimulation, Simulation

LOCAL_SIZE = int(os.environ.get("TEST_LOCAL_SIZE", "2"))
NODES = int(os.environ.get("WORLD_SIZE") or os.environ.get("HOROVOD_SIZE", "4")) // LOCAL_SIZE
SCENARIOS = {"ddp": {}, "horovod": {}}  # by engine and name
RULES = [gcompress.Rule("topk:sparsity=0.9", name="0.*"), gcompress.Rule("randomk", name="2.*")]
EXCHANGED = [
    Policy("threshold:threshold=0.002"),
    Policy("quantize:bits=4", rules=RULES, exchange="twophase", min_numel=10),
    Policy("quantize:bits=4", exchange="allgather"),
]


def scenario(*engines):
    def register(function):
        for engine in engines or SCENARIOS:
            SCENARIOS[engine][function.__name__] = function
        return function

    return register


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 300), torch.nn.ReLU(), torch.nn.Linear(300, 50), torch.nn.Linear(50, 30, bias=False)]
    return torch.nn.Sequential(*layers)


class DdpRank:
    """How a script trains with DistributedDataParallel."""

    def __init__(self):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            place_for_torchrun(self.rank, LOCAL_SIZE)

    def compressed(self, model, policy):
        """(The model to call, a function that has all means in its gradients, the exchange)."""
        import gcompress.plugins.ddp

        parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.04)
        return parallel, lambda: None, gcompress.plugins.ddp.register(parallel, policy).exchange

    def gather(self, values):
        """An object of every rank."""
        found = [None] * self.size
        dist.all_gather_object(found, values)
        return found


class HorovodRank:
    """How a script trains with Horovod."""

    def __init__(self):
        import horovod.torch as hvd

        place_for_horovodrun(LOCAL_SIZE)
        from tests.patience import wait_patiently

        hvd.init()
        wait_patiently()
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()

    def compressed(self, model, policy, op=None):
        import gcompress.plugins.horovod as plugin

        base, op = torch.optim.SGD(model.parameters(), lr=0.0), op or self.hvd.Average
        optimizer = self.hvd.DistributedOptimizer(base, model.named_parameters(), compression=policy, op=op)
        return model, optimizer.synchronize, plugin.exchange(optimizer)

    def gather(self, values):
        return self.hvd.allgather_object(values)


def backward(model, step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    model.zero_grad()
    model(torch.randn(8, 40, generator=generator)).square().mean().backward()


def ranks_gradients(step, size):
    model, found = make_model(), []
    for rank in range(size):
        backward(model, step, rank)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


def check_steps(engine, policy, steps=3):
    """Steps against a simulation of all ranks; the weights stand still."""
    model = make_model()
    called, synchronize, exchange = engine.compressed(model, policy)
    plan = exchange.plan
    flat = policy.local_size == 1
    assert plan.topology[:2] == ((engine.size, 1) if flat else (NODES, LOCAL_SIZE)), plan.topology
    simulation = Simulation(plan) if flat else NodeSimulation(plan)
    for step in range(steps):
        gradients = ranks_gradients(step, engine.size)
        backward(called, step, engine.rank)
        synchronize()
        for name, p in model.named_parameters():
            own = [rank[name] for rank in gradients]
            if plan.entries[name].compressor is None:
                torch.testing.assert_close(p.grad, sum(own) / len(own))
            else:
                assert torch.equal(p.grad, simulation.mean_of(name, own)), (str(policy), step, name)
        simulation.end_step()
        exchange.applied()
    return exchange


def trained(engine, policy, steps=3):
    """The exchange after some steps."""
    called, synchronize, exchange = engine.compressed(make_model(), policy)
    for step in range(steps):
        backward(called, step, engine.rank)
        synchronize()
        exchange.applied()
    return exchange


@scenario("horovod")
def joining_ends_well(engine):
    """First of all: tokens go by the names of every optimizer that there was."""
    trained(engine, Policy("topk:sparsity=0.9", exchange="twophase"))
    engine.hvd.join()


@scenario()
def every_exchange_gives_what_a_simulation_gives(engine):
    for exchange in ("allgather", "twophase"):
        for spec in ("topk:sparsity=0.9", "quantize:bits=3,rounding=stochastic"):
            made = check_steps(engine, Policy(spec, exchange=exchange))
            sent = sum(engine.gather(float(made.report.wire_bytes)))
            plain = sum(4 * entry.numel for entry in made.plan.entries.values() if not entry.compressor)
            # Which Horovod sums itself, in a ring of all ranks.
            plain *= 2 * (NODES - 1) if isinstance(engine, DdpRank) else 2 * (engine.size - 1)
            expected = 3 * (NODES * made.plan.between_nodes_bytes() + plain)
            assert abs(sent - expected) < 50 * engine.size, (exchange, spec, sent, expected)
    for local_size in ("auto", 1):
        for each in EXCHANGED:
            check_steps(engine, dataclasses.replace(each, local_size=local_size))


@scenario()
def what_loses_nothing_gives_the_flat_mean(engine):
    for exchange in ("allgather", "twophase"):
        model, found = make_model(), []
        for local_size in ("auto", 1):
            policy = Policy("topk:sparsity=0", exchange=exchange, local_size=local_size, error_feedback=False)
            own = make_model()
            called, synchronize, made = engine.compressed(own, policy)
            assert made.plan.topology.by_nodes == (local_size == "auto")
            backward(called, 0, engine.rank)
            synchronize()
            found.append([p.grad for p in own.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert len(found[0]) == len(list(model.parameters()))


@scenario()
def a_rank_remembers_its_shares_alone(engine):
    exchange = check_steps(engine, Policy("topk:sparsity=0.9", exchange="twophase"))
    compressed = sum(entry.numel for entry in exchange.plan.entries.values() if entry.compressor)
    own = sum(residual.numel() for residual in exchange.state_dict()["feedback"].values())
    assert sum(engine.gather(own)) == NODES * compressed and own < 0.7 * compressed


@scenario()
def a_gathered_state_goes_on_flat_and_by_nodes(engine):
    """Also from the file of each rank, merged: what is missing from the mean stays the same."""
    for policy, learned in (
        ("topk:sparsity=0.9; name=2.weight -> lowrank:rank=2", {"2.weight"}),
        ("topk:sparsity=0.9; exchange=twophase; error_feedback=ef21", set()),
        ("topk:sparsity=0.9; exchange=twophase; momentum=0.9", set()),
    ):
        exchange = trained(engine, policy)
        full, merged = exchange.full_state_dict(), gcompress.merge_states(engine.gather(exchange.state_dict()))
        assert full["memories"].keys() == merged["memories"].keys() == learned
        for name, vector in full["sums"].items():
            torch.testing.assert_close(vector, merged["sums"][name], rtol=1e-5, atol=1e-6)
            assert all(torch.equal(vector, other) for other in engine.gather(vector))
        for local_size in (1, "auto"):
            _, _, other = engine.compressed(make_model(), f"{policy}; local_size={local_size}")
            other.load_state_dict(full)
            again = other.full_state_dict()
            for name, vector in full["sums"].items():
                if not name.startswith("delivered/"):  # which follows from the others
                    torch.testing.assert_close(again["sums"][name], vector, rtol=1e-4, atol=1e-6, msg=name)


@scenario()
def ranks_of_other_topologies_are_refused_on_all(engine):
    policy = Policy("topk:sparsity=0.9", local_size=1 if engine.rank == 1 else "auto")
    called, synchronize, _ = engine.compressed(make_model(), policy)

    def step():
        backward(called, 0, engine.rank)
        synchronize()

    expect_error(gcompress.ConfigMismatchError, "local_size", step)


@scenario("ddp")
def a_group_of_some_ranks_stays_flat(engine):
    import gcompress.plugins.ddp

    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    parallel = torch.nn.parallel.DistributedDataParallel(make_model(), process_group=groups[engine.rank // 2])
    exchange = gcompress.plugins.ddp.register(parallel, "topk:sparsity=0.9").exchange
    assert "some of the job's ranks" in str(exchange.plan)


@scenario("ddp")
def a_policy_that_compresses_nothing_sums_by_nodes(engine):
    model = make_model()
    called, _, exchange = engine.compressed(model, "none")
    backward(called, 0, engine.rank)
    gradients = ranks_gradients(0, engine.size)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sum(rank[name] for rank in gradients) / engine.size)
        assert all(torch.equal(p.grad, other) for other in engine.gather(p.grad))
    numel = sum(p.numel() for p in model.parameters())
    report = exchange.report
    assert abs(sum(engine.gather(report.wire_bytes)) - 2 * (NODES - 1) * 4 * numel) < 100
    assert sum(engine.gather(report.fp32_bytes)) == sum(engine.gather(report.sent_bytes)) == NODES * 4 * numel
    assert report.within_node_bytes == 4 * numel + report.sent_bytes


@scenario("horovod")
def sums_instead_of_means(engine):
    for spec in ("topk:sparsity=0", "randomk:sparsity=0.5"):
        model = make_model()
        policy = Policy(spec, error_feedback=False)
        called, synchronize, exchange = engine.compressed(model, policy, op=engine.hvd.Sum)
        simulation = NodeSimulation(exchange.plan, average=False)
        backward(called, 0, engine.rank)
        synchronize()
        gradients = ranks_gradients(0, engine.size)
        for name, p in model.named_parameters():
            if exchange.plan.entries[name].compressor:
                own = [rank[name] for rank in gradients]
                assert torch.equal(p.grad, simulation.mean_of(name, own))
                if spec == "topk:sparsity=0":
                    torch.testing.assert_close(p.grad, sum(own))


class Wide(torch.nn.Module):
    """Its parameter's gradient is its input."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1024, 2048))

    def forward(self, x):
        return self.w * x


def bytes_on_the_link(engine):
    """What leaves this node, as its end of the link counts; needs two network namespaces."""
    counter = f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes"
    # Flat, the last rank of each node alone sends to the other one, in a ring of four: 3 payloads of an all-gather,
    # where by nodes it is 1; in two phases 7 / 4 of one, since of the first each rank sends half to the other node.
    for spec, exchange, most in (("quantize:bits=4", "twophase", 4 / 7), ("topk:sparsity=0.99", "allgather", 1 / 3)):
        found = []
        for local_size in ("auto", 1):
            model = Wide()
            called, _, made = engine.compressed(model, Policy(spec, exchange=exchange, local_size=local_size))
            x, steps = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(engine.rank)), 3
            for step in range(steps + 1):  # in the first, connections are made
                if step == 1:
                    before, expected = counted(counter), made.report.wire_bytes
                called(x).sum().backward()
            sent = counted(counter) - before
            found.append(sent / steps)
            both = sum(engine.gather(made.report.wire_bytes - expected)[: 2 * (engine.rank // 2) + 2][-2:])
            assert local_size == 1 or 0.995 < sent / both < 1.1, (spec, sent, both)
        assert found[0] < 1.05 * most * found[1], (spec, found)


def counted(counter):
    dist.barrier()
    with open(counter) as file:
        return int(file.read())


def no_process_sets(engine):
    assert not trained(engine, "topk:sparsity=0.9").plan.topology.by_nodes
    expect_error(
        gcompress.ConfigError,
        "HOROVOD_DYNAMIC_PROCESS_SETS=1",
        lambda: engine.compressed(make_model(), "topk:sparsity=0.9; local_size=2"),
    )


# Those that need an environment of their own.
OTHERS = {each.__name__: each for each in (bytes_on_the_link, no_process_sets)}


def main():
    name, out, *wanted = sys.argv[1:]
    torch.set_num_threads(1)
    logging.basicConfig(level="INFO", format="%(message)s")
    engine, every = {"ddp": DdpRank, "horovod": HorovodRank}[name](), {**SCENARIOS[name], **OTHERS}
    scenarios = {key: functools.partial(every[key], engine) for key in wanted or SCENARIOS[name]}
    run_scenarios(scenarios, out, engine.rank, engine.gather)
    if name == "ddp":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
