"""Items coded by one call (exchange/together.py) and one by one (exchange/pieces.py): the same bytes and memory."""

import functools
import threading

import pytest
import torch

from gcompress import PayloadError, Policy, backends, from_spec
from gcompress.backends import calls
from gcompress.compressors.polar import whole
from gcompress.exchange import together
from gcompress.exchange.packed_together import PackedTogether
from gcompress.exchange.pieces import Item, OneByOne
from gcompress.feedback import ErrorFeedback
from gcompress.residual_types import PACKED
from tests.compressors import SPECS
from tests.local_ranks import World, run_ranks

ISAS = backends.available_backends()[1:]
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
ONE_CALL = set("quantize binmean sign onebit bf16 fp16 fp8 mxfp4 qsgd natural ternary topk mask eden polar".split())
RANKS = 3


def items_of(compressor):
    """Pieces of tensors of odd sizes, one of them a matrix, not in the order of their entries."""
    of = [("a", 1024, 3001), ("b", 0, 7), ("a", 0, 1024), ("c", 0, 5130), ("d", 0, 1)]
    shapes = [torch.Size((54, 95) if name == "c" else (stop - start,)) for name, start, stop in of]
    return [Item(*each, shape, compressor) for each, shape in zip(of, shapes, strict=True)]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    values = {name: torch.randn(n, generator=generator) for name, n in (("a", 3001), ("b", 7), ("c", 5130), ("d", 1))}
    if step == 1:
        values["c"][77] = float("inf")
    return values


def seed_of(step, item):
    return 7 * step + item.start


def coded(items, coder, residual="float32"):
    """All that a coder makes in some steps, as one list of tensors."""
    memory, owner, made = ErrorFeedback(residual=residual), ErrorFeedback(residual=residual), []
    for step in range(4):
        values, seed = gradients(step), functools.partial(seed_of, step)
        payload = coder.encode(values, lambda item: memory if item.name != "b" else None, seed)
        rows = list(torch.stack([payload, payload, coder.encode(values, lambda item: None, seed)]))
        sums, means = ({name: torch.full_like(x, 9.0) for name, x in values.items()} for _ in range(2))
        coder.decode_sum(rows, 1 / RANKS, sums)
        total, keyed = torch.empty(5130), lambda item: f"{item.name}{item.start}"
        mean = coder.mean(rows, 1 / RANKS, total, lambda item, _: owner, keyed, seed)
        coder.decode(mean, means)
        made += [payload, mean, *sums.values(), *means.values()]
        made += [each.clone() for of in (memory, owner) for each in of.tensors()["residual"].values()]
    return [each.view(torch.uint8) for each in made]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.split(":")[0] in ONE_CALL])
def test_one_call_makes_what_single_calls_make(spec):
    items = items_of(from_spec(spec))
    for isa in ISAS:
        with backends.use_backend(isa):
            found = coded(items, together.Together(items, together.calls_of(items, RANKS), RANKS))
            expected = coded(items, OneByOne(items))
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), (spec, isa)


@pytest.mark.parametrize("residual", PACKED)
@pytest.mark.parametrize("spec", ["quantize:bits=4", "topk", "mask", "quantize:bits=2,rounding=stochastic", "polar"])
def test_one_call_with_packed_residuals_makes_what_single_calls_make(spec, residual):
    items = items_of(from_spec(spec))
    for isa in ISAS:
        unpacked = []
        with backends.use_backend(isa):
            coder = PackedTogether(items, together.calls_of(items, RANKS), RANKS)
            coder._fill = lambda *all, fill=coder._fill, log=unpacked: (log.append(1), fill(*all))
            found = coded(items, coder, residual)
            expected = coded(items, OneByOne(items), residual)
        assert len(unpacked) == 4 + 2 * 3  # what nobody remembers; both sides after the first step
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), isa


@pytest.mark.parametrize("spec", SPECS)
def test_which_methods_can(spec):
    items = items_of(from_spec(spec))
    assert (together.calls_of(items, RANKS) is not None) == (spec.split(":")[0] in ONE_CALL)


@pytest.mark.parametrize("residual", ["float32", "bf16"])
def test_what_needs_a_larger_workspace_is_done_one_by_one(residual, monkeypatch):
    items = items_of(from_spec("polar:rate=1"))
    expected = coded(items, OneByOne(items), residual)
    monkeypatch.setattr(whole, "ENCODER_ROOM", 1 << 10)
    monkeypatch.setattr(whole, "DECODER_ROOM", 1 << 10)
    monkeypatch.setattr(calls, "_local", threading.local())
    made = PackedTogether if residual in PACKED else together.Together
    found = coded(items, made(items, together.calls_of(items, RANKS), RANKS), residual)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_bad_payload_is_named():
    items = items_of(from_spec("topk:sparsity=0.9"))
    coder = together.Together(items, together.calls_of(items, RANKS), RANKS)
    good = coder.encode(gradients(0), lambda item: None, lambda item: 0)
    bad = good.clone()
    bad[items[0].nbytes + items[1].nbytes :][: items[2].nbytes] = 255
    rows = list(torch.stack([good, good, bad]))
    places = gradients(0)
    with pytest.raises(PayloadError, match="gradient 'a' from rank 2"):
        coder.decode_sum(rows, 1.0, places)
    with pytest.raises(PayloadError, match="gradient 'a' from rank 2"):
        coder.mean(rows, 1.0, torch.empty(5130), lambda *_: None, lambda item: item.name, lambda item: 0)
    with pytest.raises(PayloadError):
        coder.decode(bad, places)


@pytest.mark.parametrize("exchange", ["allgather", "twophase"])
def test_names_that_come_later_travel_alone(exchange):
    """The buckets of a plan stay what they are when a parameter that it does not have comes in the middle of a step."""

    def run(rank, ranks):
        ranks.prepare({name: torch.Size((5000,)) for name in ("a", "b")})
        first = ranks.start("b", torch.full((5000,), float(rank)))
        late = ranks.start("late", torch.full((5000,), 2.0 * rank))
        second = ranks.start("a", torch.full((5000,), 4.0 * rank))
        assert ranks.plan.entries["a"].bucket == ranks.plan.entries["b"].bucket
        return [float(each()[0]) for each in (first, second, late)]

    policy = Policy("bf16", exchange=exchange, min_numel=0)
    assert run_ranks(World(2), policy, run) == [[0.5, 2.0, 1.0]] * 2


def test_an_owner_remembers_over_steps_in_which_no_rank_had_a_gradient():
    policy = Policy("quantize:bits=2", exchange="twophase", min_numel=0)

    def run(rank, ranks):
        found = []
        for absent in (False, True):
            gradient = torch.zeros(9000) if absent else torch.randn(9000, generator=torch.Generator().manual_seed(rank))
            ranks.start("a", gradient, absent=absent)()
            ranks.end_step()
            found.append({key: each.clone() for key, each in ranks.owner_feedback.state_dict().items()})
        return found

    for before, after in run_ranks(World(2), policy, run):
        assert before and all(bool(each.any()) for each in before.values())
        assert all(torch.equal(each, after[key]) for key, each in before.items())


def test_ranks_that_come_get_their_share():
    """The same names and compressors by another plan, as in an elastic job."""
    policy, known = Policy("bf16", exchange="twophase", min_numel=0), {}

    def run(rank, ranks):
        if rank in known:
            known[rank].engine, ranks = ranks.engine, known[rank]
        known[rank] = ranks
        mean = ranks.start("a", torch.full((90_000,), float(rank)))()
        ranks.end_step()
        return sorted({float(each) for each in mean})

    assert run_ranks(World(2), policy, run) == [[0.5]] * 2
    assert run_ranks(World(3), policy, run) == [[1.0]] * 3
