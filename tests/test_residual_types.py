"""Residuals in fewer bytes, or on the host: float32's laws within the type's error, its promises to the bit."""

import copy
import gc
import io
import json
import math

import pytest
import torch

from gcompress import ConfigError, PayloadError, Policy, as_policy, backends, from_spec, merge_states
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.parameter_server import ParameterServer
from gcompress.exchange.partition import PartitionCodec, memory_name, partition
from gcompress.feedback import ErrorFeedback, new_memory
from gcompress.residual_types import PACKED, RESIDUALS, PackedMemory, held_nbytes, saved_nbytes
from tests.local_ranks import World, run_ranks
from tests.nested import same
from tests.test_feedback import OneRank
from tests.test_memory import SHAPES, gradients

POLICIES = [
    "topk:sparsity=0.9; exchange=allgather",
    "topk:sparsity=0.9; exchange=twophase",
    "mask:sparsity=0.9,bits=2; exchange=twophase; feedback_decay=0.7",
    "topk:sparsity=0.9; exchange=twophase; momentum=0.9; clip=30.0",
    "polar:rate=0.5; exchange=allgather",
    "threshold:threshold=0.5",
    "lowrank:rank=2; exchange=summed",
    "quantize:bits=3; exchange=turns",
    "quantize:bits=2,rounding=stochastic; error_feedback=true; exchange=twophase",
]
# The largest error of one rounding, as a part of the largest magnitude of what is kept.
STEP = {"float32": 2**-22, "bf16": 2**-7, "int8": 2 / 254, "cpu": 2**-22}


def exchanged(exchange, step, rank, settle=True):
    """The results of a step, in which ranks have gradients of their own."""
    finish = {name: exchange.start(name, gradient) for name, gradient in gradients(step, rank).items()}
    found = {name: each().clone() for name, each in finish.items()}
    exchange.end_step()
    if settle:
        exchange.applied()
    return found


def watched(exchange):
    """An exchange that is told what is applied."""
    exchange.prepare(SHAPES)
    exchange.watch({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()})
    return exchange


def with_type(policy, residual):
    return as_policy(f"{policy}; residual={residual}")


def test_a_policy_names_a_type():
    for residual in RESIDUALS:
        policy = as_policy(f"topk:sparsity=0.99; residual={residual}")
        assert policy.residual == residual and as_policy(str(policy)) == policy
        assert as_policy(json.loads(json.dumps(policy.to_dict()))) == policy
        assert new_memory(policy).memories["residual"].in_place == (residual not in PACKED)
    assert "residual" not in str(as_policy("topk; residual=float32"))
    for wrong, text in (
        ("topk; residual=fp8", "residual: got 'fp8', expected"),
        ("topk; residual=8", "residual: got 8"),
        ("topk; residual=int8; error_feedback=ef21", "residual.*estimate"),
        ("topk; residual=bf16; error_feedback=ef21", "residual.*estimate"),
        ("topk; residual=cpu; error_feedback=false", "residual.*nothing to keep"),
    ):
        with pytest.raises(ConfigError, match=text):
            as_policy(wrong)
    assert as_policy("topk; residual=cpu; error_feedback=ef21").residual == "cpu"


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("policy", [each for each in POLICIES if "momentum" not in each and "decay" not in each])
def test_what_was_delivered_and_what_is_kept_is_what_was_given(policy, residual):
    """Over ranks and owners; each rounding may err by the type's step."""
    steps, size = 12, 3

    def run(rank, exchange):
        exchange.prepare(SHAPES)
        got = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        largest = dict.fromkeys(SHAPES, 0.0)
        for step in range(steps):
            for name, mean in exchanged(exchange, step, rank).items():
                got[name] += mean
                largest[name] = max(largest[name], float(exchange.feedback.residual(name).abs().max()))
        return got, exchange.feedback.tensors(), exchange.owner_feedback.tensors()["residual"], largest

    ranks = run_ranks(World(size), with_type(policy, residual), run)
    for name in SHAPES:
        given = sum(gradients(step, rank)[name] for step in range(steps) for rank in range(size)) / size
        kept = sum(tensors["residual"][name] for _, tensors, _, _ in ranks) / size
        largest = max(each[name] for *_, each in ranks)
        for _, _, pieces, _ in ranks:
            for key, piece in pieces.items():
                start, stop = map(int, key.rpartition("[")[2][:-1].split(":"))
                if key.startswith(f"{name}["):
                    kept[start:stop] += piece
                    largest = max(largest, 2 * float(piece.abs().max()))
        error = (ranks[0][0][name].view(-1) + kept - given.view(-1)).abs()
        limit = 1e-4 + steps * 2 * largest * STEP[residual]
        assert error.max() < limit, (name, float(error.max()), limit)
        assert error.max() < 1e-4 or residual in PACKED
        # Roundings are unbiased: their sum stays far below what it could be, in the mean of many entries.
        mean = (ranks[0][0][name].view(-1) + kept - given.view(-1)).mean().abs()
        assert mean < limit / 3 / math.sqrt(given.numel()) * 3, (name, float(mean))


@pytest.mark.parametrize("residual", PACKED)
def test_rounding_is_unbiased(residual):
    """The mean over many roundings, by counts and by ranks, of entries large and small beside each other."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, generator=generator) * torch.exp2(-4 * torch.rand(3000, generator=generator))
    for by_count in (False, True):
        memory, total, often = PackedMemory(PACKED[residual], True), torch.zeros(3000, dtype=torch.float64), 400
        for number in range(often):
            memory.salt = 0 if by_count else number
            if not by_count:
                memory.load({})
            memory.put("w", values.clone())
            total += memory.get("w")
        spans = [part.max() - part.min() for part in values.split(256)]
        grid = torch.cat([(span / 254).repeat(256) for span in spans])[:3000]
        step = values.abs() * 2**-7 if residual == "bf16" else grid
        error = (total / often - values).abs()
        assert bool((error < 3 * step / math.sqrt(often)).all())  # six standard deviations of half a step
        assert error.max() > 0


@pytest.mark.parametrize("residual", PACKED)
def test_small_residuals_are_not_lost_beside_large_ones(residual):
    """What rounding to nearest would never add: less than half the distance to a neighbour, every time."""
    memory, values = PackedMemory(PACKED[residual], True), torch.ones(4096)
    values[::64] = 2.0  # so that the others are no end of a grid
    values[1::64] = -2.0
    memory.put("w", values)
    for _ in range(100):
        memory.add("w", torch.full((4096,), 2.0**-10))
    assert abs(float((memory.get("w") - values).mean()) - 100 * 2.0**-10) < 0.01


def test_ranks_round_differently():
    found = []
    for rank in range(2):
        memory = PackedMemory(PACKED["int8"], True)
        memory.salt = rank
        memory.put("w", torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        found.append(memory.get("w"))
    assert not torch.equal(*found)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("policy", POLICIES)
def test_steps_that_are_not_applied_leave_no_trace(policy, residual):
    def run(rank, exchange, skip):
        watched(exchange)
        found = []
        for step in range(5):
            if skip and step in (1, 3):
                exchanged(exchange, 50 + step, rank, settle=False)
                exchange.discard()
            if skip and step == 4:
                state = exchange.state_dict()
                exchanged(exchange, 70, rank, settle=False)
                assert same(state["feedback"], exchange.state_dict()["feedback"])
                exchange.discard()
            found.append(exchanged(exchange, step, rank))
        state = exchange.state_dict()
        return found, {key: state[key] for key in ("feedback", "owner_feedback", "steps")}

    one, other = (
        run_ranks(World(3), with_type(policy, residual), lambda rank, exchange, skip=skip: run(rank, exchange, skip))
        for skip in (False, True)
    )
    for (means, state), (expected, expected_state) in zip(one, other, strict=True):
        assert same(means, expected) and same(state, expected_state)


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_goes_on_to_the_bit(policy, residual):
    def run(rank, exchange, states=None):
        watched(exchange)
        if states is None:
            for step in range(3):
                exchanged(exchange, step, rank)
            states = [None] * 3
            states[rank] = saved_and_read(exchange.state_dict())
        else:
            exchange.load_state_dict(states[rank])
            assert same(exchange.state_dict()["feedback"], states[rank]["feedback"])
        return states[rank], [exchanged(exchange, step, rank) for step in (3, 4)], exchange.state_dict()

    chosen = with_type(policy, residual)
    first = run_ranks(World(3), chosen, run)
    states = [state for state, _, _ in first]
    second = run_ranks(World(3), chosen, lambda rank, exchange: run(rank, exchange, states))
    for (_, means, state), (_, expected, other) in zip(second, first, strict=True):
        assert same(means, expected)
        assert same(state["feedback"], other["feedback"]) and same(state["owner_feedback"], other["owner_feedback"])


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[3]])
def test_states_of_all_ranks_are_sums_that_any_number_of_ranks_take_over(policy, size, residual):
    chosen = with_type(policy, residual)

    def run(rank, exchange, merged=None):
        exchange.prepare(SHAPES)
        if merged is None:
            for step in range(3):
                exchanged(exchange, step, rank)
        else:
            exchange.load_state_dict(merged)
        return exchange.state_dict(), exchange.full_state_dict()

    before = run_ranks(World(4), chosen, run)
    merged, summed = merge_states(copy.deepcopy([state for state, _ in before])), before[0][1]["sums"]
    after = run_ranks(World(size), chosen, lambda rank, exchange: run(rank, exchange, merged))[0][1]["sums"]
    for key, vector in summed.items():
        assert vector.dtype == torch.float32 and vector.abs().max() > 0
        torch.testing.assert_close(merged["sums"][key], vector, atol=1e-5, rtol=1e-5)
        expected = vector if key.startswith("owner") else vector / 4 * size
        limit = 1e-5 + 2 * size * STEP[residual] * float(expected.abs().max())
        assert (after[key] - expected).abs().max() < limit, key


@pytest.mark.parametrize("residual", PACKED)
def test_wrong_states_are_refused_and_change_nothing(residual):
    exchange = watched(GradientExchange(with_type(POLICIES[1], residual), OneRank()))
    exchanged(exchange, 0, 0)
    state, before = exchange.state_dict(), exchange.state_dict()
    good = state["feedback"]["a"]
    huge, negative, of_steps, steps = good.clone(), good.clone(), good.clone(), good.clone()
    huge[:8] = torch.tensor([2**40]).view(torch.uint8)
    negative[8:16] = torch.tensor([-1]).view(torch.uint8)
    of_steps[16:20] = torch.tensor([float("nan")]).view(torch.uint8)
    steps[16:20] = torch.tensor([-1.0 if residual == "int8" else float("inf")]).view(torch.uint8)
    other = PackedMemory(PACKED[residual], True)
    other.put("a", torch.ones(999))
    for wrong in (
        torch.zeros(1200), good[:-1], good[:7], torch.stack([good, good]), good.to(torch.int32),
        torch.cat([good, good[:1]]), huge, negative, of_steps, steps, other.saved()["a"], 7, None,
    ):  # fmt: skip
        for key, name in (("feedback", "a"), ("owner_feedback", next(iter(state["owner_feedback"])))):
            if key == "feedback" or wrong is not good:
                with pytest.raises(ConfigError, match="residual"):
                    exchange.load_state_dict({**state, key: {**state[key], name: wrong}})
    for key in ("feedback", "owner_feedback"):
        for wrong in ({"x": good}, 7):
            with pytest.raises(ConfigError):
                exchange.load_state_dict({**state, key: wrong})
    with pytest.raises(ConfigError, match="policy"):
        watched(GradientExchange(POLICIES[1], OneRank())).load_state_dict(state)
    assert same(before["feedback"], exchange.state_dict()["feedback"])
    exchange.load_state_dict(state)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_memory_takes_what_the_plan_says(residual):
    """And twice that before a step is applied; on four ranks, of which each owns its pieces."""
    for policy in POLICIES[:4]:

        def held(memories):
            tensors = [
                each for memory in memories for part in (memory._values, memory._proposed) for each in part.values()
            ]
            return sum((getattr(each, "payload", each)).nbytes for each in tensors)

        def run(rank, exchange):
            watched(exchange)
            memories = [*exchange.feedback.memories.values(), *exchange.owner_feedback.memories.values()]
            exchanged(exchange, 0, rank)
            exchanged(exchange, 1, rank, settle=False)
            before = held(memories)
            exchange.applied()
            scratches = {id(each._scratch): each._scratch for each in memories if hasattr(each, "_scratch")}
            scratch = sum(each._room.nbytes for each in scratches.values())
            return before, held(memories), scratch, exchange.plan, exchange.owned_pieces()

        ranks = run_ranks(World(4), with_type(policy, residual), run)
        plan = ranks[0][3]
        for before, after, scratch, _, owned in ranks:
            assert before == 2 * after
            largest = max(owned.values(), default=0)
            assert scratch == (4 * (21000 + largest) if residual in PACKED else 0)
        assert abs(sum(after for _, after, *_ in ranks) / 4 - plan.memory_bytes()) <= len(SHAPES)
        assert f"{plan.memory_bytes():,} bytes per rank" in str(plan)
        if residual in PACKED:
            assert f"{plan.scratch_bytes():,} to unpack it" in str(plan)
            assert plan.scratch_bytes() == max(scratch for _, _, scratch, _, _ in ranks)


@pytest.fixture
def living():
    """A function of what the tensors' memory takes that came since it was there, in bytes."""
    gc.collect()
    gc.freeze()

    def count():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    yield count
    gc.unfreeze()


@pytest.mark.parametrize("residual, most", [("int8", 1.1), ("bf16", 2.1), ("float32", 8.3)])
@pytest.mark.parametrize("policy", ["topk:sparsity=0.9; exchange=allgather", "lowrank:rank=2; momentum=0.9"])
def test_bytes_an_entry_on_living_tensors(living, policy, residual, most):
    """All that an exchange keeps between steps; twice as much of packed memory until a step is applied."""
    numel, number, kinds = 1 << 16, 16, 2 if "momentum" in policy else 1
    mine = {f"w{index}": torch.randn(256, 256) for index in range(number)}
    given = living()
    exchange = GradientExchange(with_type(policy, residual), OneRank())
    exchange.engine.allreduce = lambda name, lane, tensor, op: OneRank().allgather(name, lane, tensor.clone(), None)
    exchange.prepare({name: gradient.shape for name, gradient in mine.items()})
    exchange.watch({name: torch.nn.Parameter(torch.empty(256, 256, device="meta")) for name in mine})
    room = 4 * numel * (1 if "allgather" in policy and residual in PACKED else 0)
    memories = 8 * 256 * 4 * number if "lowrank" in policy else 0  # bases
    for step in range(3):
        finish = [exchange.start(name, gradient.clone()) for name, gradient in mine.items()]
        for each in finish:
            each()
        del finish, each
        exchange.end_step()
        proposed = living() - given - room - memories
        assert proposed <= max(2, kinds * (1 + (residual in PACKED))) * most * number * numel + 4096
        exchange.applied()
        held = living() - given - room - memories
        assert held <= kinds * most * number * numel + 4096, (step, held / number / numel)
        assert held >= kinds * 0.9 * (4 if residual == "float32" else most / 1.1) * number * numel


@pytest.mark.parametrize("residual", PACKED)
@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[3], POLICIES[6]])
def test_all_backends_keep_the_same_bytes(policy, residual):
    def run(rank, exchange):
        exchange.prepare(SHAPES)
        for step in range(3):
            exchanged(exchange, step, rank)
        state = exchange.state_dict()
        return {key: state[key] for key in ("feedback", "owner_feedback")}

    found = []
    for backend in backends.available_backends():
        with backends.use_backend(backend):
            found.append(run_ranks(World(2), with_type(policy, residual), run))
    assert all(same(each[rank], found[0][rank]) for each in found for rank in range(2))


@pytest.mark.parametrize("residual", PACKED)
@pytest.mark.parametrize("feedback", ["momentum=0.5", "feedback_decay=0.5", "warmup_steps=0"])
def test_what_is_not_finite_is_not_kept_and_zeros_stay_zeros(residual, feedback):
    memory = new_memory(as_policy(f"topk:sparsity=0.9; residual={residual}; {feedback}"), at_once=False)
    compressor, gradient = from_spec("topk:sparsity=0.9"), torch.randn(3000)
    gradient[512:1024] = 0
    gradient[5:9] = -0.0
    memory.compress("w", gradient, compressor)
    memory.apply()
    assert not memory.residual("w")[512:1024].any() and not memory.residual("w")[5:9].any()
    before = memory.state_dict()
    for value in (float("nan"), float("inf")):
        poisoned = gradient.clone()
        poisoned[17] = value
        assert not compressor.decompress(*memory.compress("w", poisoned, compressor)).isfinite().all()
        memory.apply()
        assert same(memory.state_dict(), before)
    with pytest.raises(ConfigError, match="got 7 entries, expected 3000"):
        memory.compress("w", torch.zeros(7), compressor)
    with pytest.raises(ConfigError, match="got 7 entries, expected 3000"):
        memory.corrected("w", torch.zeros(7))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_servers_memory_goes_on_to_the_bit(residual):
    policy = as_policy(f"quantize:bits=2; residual={residual}")
    parts = partition({"w": 5000}, policy, 1, 3000)

    def fleet():
        codecs = [PartitionCodec(parts, policy, side) for side in ("server", "worker 0")]
        return ParameterServer(codecs[0], 0, range(1), momentum=0.5), codecs[1]

    def rounds(server, worker, first, last):
        answers = []
        for step in range(first, last):
            for key, part in enumerate(parts):
                values = torch.randn(part.numel, generator=torch.Generator().manual_seed(10 * step + key))
                server.push(0, key, worker.encode(key, values, step))
                ((_, _, answer),) = server.pull(0, key)
                answers.append(answer)
            worker.settle(range(len(parts)), True)
        return answers

    whole, worker = fleet()
    expected = rounds(whole, worker, 0, 5)[3 * len(parts) :]
    (before, early), (after, late) = fleet(), fleet()
    rounds(before, early, 0, 3)
    late.load(late.checked(saved_and_read(early.state_dict())))
    for key, part in enumerate(parts):
        memory = before.memory(key)
        assert memory.numel() == 24 + saved_nbytes(residual, part.numel) + 4 * part.numel
        after.load_memory(key, memory)
        with pytest.raises(PayloadError, match="memory of 'w'"):
            after.load_memory(key, memory[:-1])
        broken = memory.clone()
        broken[24 : 24 + 32] = 255
        with pytest.raises(PayloadError, match="memory of 'w'"):
            after.load_memory(key, broken)
        after.load_memory(key, memory)
    assert all(torch.equal(*pair) for pair in zip(rounds(after, late, 3, 5), expected, strict=True))
    assert memory_name(parts[0]) in early.state_dict()


def test_bytes_of_a_vector():
    for numel in (1, 255, 256, 257, 100_000):
        assert held_nbytes("float32", numel) == held_nbytes("cpu", numel) == 4 * numel
        assert held_nbytes("bf16", numel) == 2 * numel
        for residual in PACKED:
            memory = PackedMemory(PACKED[residual], True)
            memory.put("w", torch.ones(numel))
            assert memory._values["w"].payload.numel() == held_nbytes(residual, numel)
            assert memory.saved()["w"].numel() == saved_nbytes(residual, numel)
    assert held_nbytes("int8", 1 << 20) < 1.021 * (1 << 20)
    assert not ErrorFeedback(residual="int8").together and ErrorFeedback(residual="cpu").together
    assert Policy("topk").residual == "float32"
