"""What the ranks of tests/test_fsdp.py run: `torchrun … fsdp_ranks.py OUT SCENARIO…`.

Each scenario trains a few steps with FSDP2 or HSDP on Gloo and checks on every rank; rank 0 writes
{scenario: "ok" or the errors} to OUT. Those of what is remembered are in fsdp_memory.py.
"""

import contextlib
import datetime
import functools
import json
import sys
import tempfile
import zlib
from unittest import mock

import torch
import torch.distributed as dist
from gcompress.plugins import ddp, fsdp
from gcompress.plugins.ddp.process_group import ProcessGroupEngine
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import gcompress
import tests.fsdp_memory  # noqa: F401 - its scenarios
from gcompress import Policy
from gcompress.exchange.plan import Plan
from gcompress.exchange.reduce_scatter import ScatterPlan
from gcompress.feedback import ErrorFeedback
from tests.ddp_ranks import check_steps
from tests.ddp_tools import rank_and_gather
from tests.fsdp_models import (
    SCENARIOS,
    applied,
    batch,
    equal,
    gathered,
    local,
    make_model,
    mesh_of,
    meshes,
    refused,
    scenario,
    sharded,
    train,
    weights_of,
    whole,
)
from tests.scenarios import run_scenarios
from tests.simulation import Simulation

MASK = "mask:sparsity=0.9,bits=2"


def torchs_own(pair, steps=4, **options):
    """Weights that torch's FSDP2, or native HSDP, trains."""
    model = sharded(pair[0], **options)
    return train(model, torch.optim.SGD(model.parameters(), lr=0.5), steps)


def close(one, other, **tolerance):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **tolerance or {"atol": 1e-6, "rtol": 1e-5})


@scenario
def what_loses_nothing_trains_as_torch_does():
    for pair in meshes():
        expected = torchs_own(pair)
        for policy in ("none", "topk:sparsity=0", "none; name=0.* -> topk:sparsity=0", "topk:sparsity=0; min_numel=0"):
            model, state, optimizer = applied(pair, policy)
            close(expected, train(model, optimizer))
            assert state.report.steps == 4 and state.exchange.steps == (0 if policy == "none" else 4), policy
        for reshard in (True, False):
            for weights in ("none", "topk:sparsity=0; min_numel=0") if pair[0].ndim == 1 else ():
                model, state, optimizer = applied(pair, "none", weights=weights, reshard_after_forward=reshard)
                close(expected, train(model, optimizer))


@scenario
def hsdp_adds_two_replicas_as_torch_does_to_the_bit():
    pair = meshes()[1]
    model, _, optimizer = applied(pair, "none")
    assert equal(train(model, optimizer), torchs_own(pair))


@scenario
def every_option_of_torch_that_reads_a_gradient_at_once():
    """Types that are converted, factors that are divided by, gradients that lie on the host."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    both = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    host = CPUOffloadPolicy(pin_memory=False)
    tried = [{"mp_policy": mixed}, {"mp_policy": both}, {"offload_policy": host}]
    for pair in meshes():
        for options in tried:
            expected = torchs_own(pair, **options)
            model, _, optimizer = applied(pair, "topk:sparsity=0; min_numel=0", **options)
            coarse = options.get("mp_policy") is both  # replicas' means come to bfloat16 after other roundings
            close(expected, train(model, optimizer), atol=2e-3 if coarse else 2e-5, rtol=1e-2 if coarse else 1e-4)
        model, _, optimizer = applied(pair, "none")
        expected = sharded(pair[0])
        if pair[0].ndim == 1:  # of which Gloo has none
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(2.0)
            trained = torch.optim.SGD(expected.parameters(), lr=0.5 * dist.get_world_size() / 2)
            close(train(expected, trained), train(model, optimizer))
    for pair in meshes():  # a sum, divided by a factor for all ranks
        found = []
        for model in (sharded(pair[0]), applied(pair, "none")[0]):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
                    module.set_gradient_divide_factor(8.0)
            found.append(train(model, torch.optim.SGD(model.parameters(), lr=0.5)))
        close(*found)


@scenario
def hsdp_of_one_shard_is_ddp_to_the_bit():
    size = dist.get_world_size()
    pair = mesh_of(size, 1), mesh_of(size, 1)["shard"]
    for exchange in ("allgather", "twophase"):
        policy = Policy(MASK, min_numel=0, exchange=exchange)
        parallel = torch.nn.parallel.DistributedDataParallel(make_model())
        state = ddp.register(parallel, policy)
        expected = train(parallel, torch.optim.SGD(parallel.parameters(), lr=0.5))
        model, sharded_state, optimizer = applied(pair, policy)
        found = train(model, optimizer)
        assert equal({f"module.{name}": p for name, p in found.items()}, expected), exchange
        assert equal(state.state_dict()["feedback"], sharded_state.state_dict()["feedback"])
        assert sharded_state.report.sent_bytes == state.exchange.report.sent_bytes


def gradients_of(alone, step, ranks):
    """[{name: gradient} of each rank], computed in this process."""
    found = []
    for rank in ranks:
        alone.zero_grad()
        alone(batch(step, rank)).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in alone.named_parameters()})
    return found


@scenario
def hsdp_is_what_a_simulation_of_all_ranks_gives_to_the_bit():
    rank, shards = dist.get_rank(), dist.get_world_size() // 2
    for spec in (MASK, "quantize:bits=2,rounding=stochastic", "randomk:sparsity=0.75", "topk:sparsity=0.8"):
        for exchange in ("summed",) if spec.startswith("randomk") else ("allgather", "twophase"):
            policy = Policy(spec, min_numel=100, exchange=exchange, error_feedback=True)
            model, state, _ = applied(meshes()[1], policy)
            alone, shapes = make_model(), {n: local(p).shape for n, p in model.named_parameters() if local(p).numel()}
            simulation = Simulation(Plan(policy, shapes, 2))
            for step in range(3):
                every, own = gradients_of(alone, step, range(2 * shards)), []
                for replica in range(2):
                    members = every[replica * shards : (replica + 1) * shards]
                    mean = {name: sum(each[name] for each in members) / shards for name in members[0]}
                    own.append({name: cut(mean[name], rank % shards, shards) for name in shapes})
                plain = [name for name, entry in simulation.plan.entries.items() if entry.compressor is None]
                averages = {name: sum(replica.pop(name) for replica in own) / 2 for name in plain}
                expected = {**simulation.means(own), **averages}
                model.zero_grad()
                model(batch(step)).square().mean().backward()
                for name, p in model.named_parameters():
                    if name not in expected:
                        continue
                    exact = simulation.plan.entries[name].exchange not in ("summed", "allreduce")
                    found = local(p.grad)
                    assert (
                        torch.equal(found, expected[name])
                        if exact
                        else torch.allclose(found, expected[name], atol=1e-6)
                    ), (spec, exchange, step, name)
                state.exchange.applied()


def cut(tensor, number, count):
    chunks = tensor.chunk(count)
    return chunks[number] if number < len(chunks) else tensor[:0]


class ScatterSimulation:
    """The rows of one owner in successive steps, from compressors and every rank's error feedback."""

    def __init__(self, plan):
        self.plan, self.memories, self.step = plan, [ErrorFeedback() for _ in range(plan.world_size)], 0

    def rows(self, name, gradients, owner):
        entry, size = self.plan.entries[name], self.plan.world_size
        total = torch.zeros(0)
        for rank, gradient in enumerate(gradients):
            remembers = entry.compressor is not None
            values = self.memories[rank].corrected(name, gradient) if remembers else gradient.reshape(-1)
            decoded = values.clone()
            for piece in entry.pieces if remembers else ():
                seed = zlib.crc32("/".join(map(str, (name, self.step, rank, piece.start))).encode())
                part = values[piece.start : piece.stop].view(entry.shape_of(piece))
                payload, ctx = entry.compressor.compress(part, seed=seed)
                decoded[piece.start : piece.stop] = entry.compressor.decompress(payload, ctx).view(-1)
            if remembers:
                self.memories[rank].keep(name, values, decoded)
            total = decoded if rank == 0 else total + decoded
        return cut((total * (1.0 / size)).view(entry.shape), owner, size)


@scenario
def fsdp2_is_what_a_simulation_of_all_ranks_gives_to_the_bit():
    size, rank = dist.get_world_size(), dist.get_rank()
    for spec in (MASK, "quantize:bits=2,rounding=stochastic", "polar:rate=2", "topk:sparsity=0.8"):
        policy = Policy(spec, min_numel=100, error_feedback=True)
        model, state, _ = applied(meshes()[0], policy)
        alone = make_model()
        simulation = ScatterSimulation(ScatterPlan(policy, {n: p.shape for n, p in alone.named_parameters()}, size))
        for step in range(3):
            every = gradients_of(alone, step, range(size))
            model.zero_grad()
            model(batch(step)).square().mean().backward()
            for name, p in model.named_parameters():
                expected = simulation.rows(name, [each[name] for each in every], rank)
                assert torch.equal(local(p.grad), expected), (spec, step, name)
            state.exchange.applied()
            simulation.step += 1
        for name, residual in state.state_dict()["feedback"].items():
            assert torch.equal(residual, simulation.memories[rank].residual(name)), (spec, name)


@scenario
def what_is_counted_is_what_is_handed_over():
    """By the engine's own count, by the compressors' sizes, and by the plan."""
    for pair in meshes():
        model, state, optimizer = applied(
            pair, Policy(MASK, min_numel=100), weights=MASK if pair[0].ndim == 1 else None
        )
        engine, sent = state.exchange.engine, []
        with contextlib.ExitStack() as stack:
            for method in ("allgather", "alltoall", "allreduce"):
                stack.enter_context(mock.patch.object(engine, method, counting(getattr(engine, method), sent)))
            train(model, optimizer, steps=3)
        assert fsdp.exchange(state) is state.exchange and state.report is state.exchange.report
        entries = state.exchange.plan.entries.values()
        if pair[0].ndim == 1:
            step = sum(entry.nbytes_of(piece) for entry in entries for piece in entry.pieces)
        else:
            step = sum(e.compressor.nbytes(e.numel) if e.compressor else 4 * e.numel for e in entries)
        assert state.report.sent_bytes == 3 * step and state.report.last_step_bytes == step
        assert sum(sent) == state.report.sent_bytes + state.weights_report.sent_bytes
        wire = sum(gathered(state.report.wire_bytes)) / dist.get_world_size()
        planned = 3 * sum(state.exchange.plan.wire_bytes().values())
        assert abs(wire - planned) <= 0.1 * planned or pair[0].ndim == 2, (wire, planned)
        assert state.report.fp32_bytes == 3 * 4 * sum(entry.numel for entry in entries)


def counting(method, sent):
    """A method of an engine that notes how many bytes it is given."""

    def noting(name, lane, tensor, *arguments):
        sent.append(tensor.numel() * tensor.element_size())
        return method(name, lane, tensor, *arguments)

    return noting


@scenario
def no_hook_waits_until_the_pass_ends():
    """On Gloo's subgroups, too: results are pending while layers are still differentiated."""
    for pair in meshes():
        model, state, optimizer = applied(pair, Policy(MASK, min_numel=0, exchange="twophase"))
        assert not state.exchange.engine._at_once
        pending = []
        note = functools.partial(_note_pending, state, pending)
        first = model[0].register_full_backward_pre_hook(note)
        train(model, optimizer, steps=2)
        first.remove()
        assert all(count >= 2 for count in pending) and len(pending) == 2, pending
        assert not state._passes._pending
        model(batch(9)).square().mean().backward()  # is added to gradients that are there
        assert not state._passes._pending


def _note_pending(state, pending, *_):
    pending.append(len(state._passes._pending))


@scenario
def optimizers_that_step_within_the_backward_pass():
    for pair in meshes():
        results = []
        for policy in (None, "topk:sparsity=0; min_numel=0"):
            model = sharded(pair[0]) if policy is None else applied(pair, policy)[0]
            for p in model.parameters():
                each = torch.optim.SGD([p], lr=0.5)
                p.register_post_accumulate_grad_hook(lambda p, each=each: (each.step(), each.zero_grad()))
            for step in range(3):
                model(batch(step)).square().mean().backward()
            results.append(weights_of(model))
        close(*results)


@scenario
def rules_see_the_names_and_the_shapes_of_shards():
    policy = f"{MASK}; min_numel=700; name=2.* -> polar:rate=2; name=3.weight -> none"
    _, state, _ = applied(meshes()[1], policy)
    found = {
        name: (entry.compressor and entry.compressor.name, tuple(entry.shape)) for name, entry in entries_of(state)
    }
    shard = dist.get_rank() % 2
    assert found["0.weight"] == ("mask", ((31, 30)[shard], 40)) and found["0.bias"][0] is None
    assert found["2.weight"] == ("polar", (25, 61)) and found["3.weight"][0] is None
    _, state, _ = applied(meshes()[0], policy)
    pieces = [
        entry.shape_of(piece) for name, entry in entries_of(state) if name == "0.weight" for piece in entry.pieces
    ]
    assert pieces == [(16, 40), (16, 40), (16, 40), (13, 40)]


@scenario
def what_a_step_does_and_loses_is_seen_and_changes_no_bit():
    """Times, traces and errors; each rank's error is that of what it sends."""
    for pair in meshes():
        for policy in (MASK, f"{MASK}; residual=int8"):
            model, state, optimizer = applied(pair, policy)
            expected = train(model, optimizer, steps=3)
            model, state, optimizer = applied(pair, policy)
            state.exchange.measure_errors(1)
            with tempfile.TemporaryDirectory() as folder, state.exchange.trace(f"{folder}/t.json") as trace:
                assert equal(train(model, optimizer, steps=3), expected)
                trace.close()
                events = json.loads(trace.path.read_text())
            wire = [event for event in events if event.get("cat") == "wire"]
            assert sum(event["args"]["bytes"] for event in wire) == state.report.sent_bytes
            names = {name for name, entry in entries_of(state) if entry.compressor}
            assert names and names <= {name for event in wire for name in event["args"]["parameters"]}
            assert set(state.report.errors) == names and all(0 < e < 1 for e in state.report.errors.values())
            seconds = state.report.times.total
            assert min(seconds.encode, seconds.wire, seconds.decode) > 0


@scenario
def auto_is_decided_by_those_that_exchange():
    for pair in meshes():
        model, state, optimizer = applied(pair, "auto:link=1mbit")
        chosen = gathered((dist.get_process_group_ranks(state.exchange.engine.group), str(state.exchange.policy)))
        assert not state.exchange.policy.undecided
        assert all(policy == str(state.exchange.policy) for ranks, policy in chosen if dist.get_rank() in ranks)
        train(model, optimizer, steps=2)
        assert state.exchange.steps == 2 and state.report.ratio > 4


def entries_of(state):
    return state.exchange.plan.entries.items()


@scenario
def ddp_on_some_of_the_ranks_has_lanes_that_all_ranks_make():
    half = dist.get_world_size() // 2
    groups = [dist.new_group(range(half)), dist.new_group(range(half, 2 * half))]
    mine = dist.get_rank() // half
    ranks, policy = range(mine * half, (mine + 1) * half), Policy("topk:sparsity=0.9", exchange="twophase")
    state = check_steps(policy, ranks=ranks, process_group=groups[mine], every_rank=True)
    assert not state.exchange.engine._at_once and state.exchange.engine.world_size() == half
    overlapping = dist.new_group([0, 3])
    with refused(gcompress.ConfigError, "share no rank"):
        ProcessGroupEngine(overlapping if dist.get_rank() == 0 else groups[mine], every_rank=True)


@scenario
def what_the_hooks_cannot_serve_is_refused():
    error, (one, two) = gcompress.ConfigError, (mesh for mesh, _ in meshes())
    with refused(error, "fully_shard was applied"):
        fsdp.apply(make_model(), MASK, one)
    with refused(error, 'mesh=mesh["shard"]'):
        fsdp.apply(sharded(two), MASK, two)
    with refused(error, "the mesh's last dimension"):
        fsdp.apply(sharded(two["shard"]), MASK, one)
    with refused(error, "mesh: got int"):
        fsdp.apply(sharded(one), MASK, 4)
    with refused(error, "weights: got a policy with a mesh of replicas"):
        fsdp.apply(sharded(two["shard"]), MASK, two, weights=MASK)
    for policy in ("threshold:threshold=0.1", f"{MASK}; exchange=allgather", f"{MASK}; error_feedback=ef21"):
        with refused(error, "expected"):
            fsdp.apply(sharded(one), policy, one)
    model, state, _ = applied(meshes()[1], MASK)
    with refused(error, "of its own already"):
        fsdp.apply(model, MASK, two)
    model.set_requires_all_reduce(False)
    with refused(error, "set_requires_gradient_sync(False)"):
        model(batch(0)).sum().backward()
    other = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    fully_shard(other, mesh=one, shard_placement_fn=lambda p: Shard(1))
    with refused(error, "along another dimension"):
        fsdp.apply(other, MASK, one)
    parallel = torch.nn.Linear(8, 8, bias=False)
    placed = DTensor.from_local(parallel.weight.detach(), two["replicate"], [Replicate()], run_check=False)
    parallel.weight = torch.nn.Parameter(placed)
    with refused(error, "tensor parallel"):
        fsdp.apply(fully_shard(parallel, mesh=two["shard"]), MASK, two)


@scenario
def what_differs_between_ranks_ends_all_of_them():
    rank = dist.get_rank()
    for pair in meshes():
        with refused(gcompress.ConfigMismatchError, "compression"):
            applied(pair, "topk:sparsity=0.9" if rank == 3 else MASK)
        with refused(gcompress.ConfigMismatchError, "model"):
            applied(pair, MASK, torch.nn.Sequential(torch.nn.Linear(40, 8 if rank == 2 else 6)))
        model, state, optimizer = applied(pair, MASK)
        train(model, optimizer, steps=1)
        saved = state.state_dict()
        state.load_state_dict({**saved, "steps": 5 if rank == 1 else 1})
        with refused(gcompress.ConfigMismatchError, "step"):
            train(model, optimizer, steps=1)
    with refused(gcompress.ConfigMismatchError, "weights"):
        applied(meshes()[0], MASK, weights=MASK if rank == 0 else None)


@scenario
def norms_are_clipped_as_of_dtensors():
    for pair in meshes():
        model, _, _ = applied(pair, "topk:sparsity=0; min_numel=0")
        model(batch(0)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        alone = make_model()
        every = gradients_of(alone, 0, range(dist.get_world_size()))
        mean = [sum(each[name] for each in every) / len(every) for name in every[0]]
        torch.testing.assert_close(whole(norm), torch.cat([each.view(-1) for each in mean]).norm(), rtol=1e-4, atol=0)
        assert float(torch.cat([whole(p.grad).view(-1) for p in model.parameters()]).norm()) < 1.01e-3


def main():
    out, names = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    run_scenarios({name: SCENARIOS[name] for name in names or SCENARIOS}, out, *rank_and_gather())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
