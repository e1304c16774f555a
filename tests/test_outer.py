"""Outer steps on ranks that are threads, in every exchange; promises_of_outer.py runs on real engines."""

import copy
import logging

import pytest
import torch

import gcompress
from gcompress import ConfigError, ConfigMismatchError, ExchangeError, OuterOptimizer
from gcompress.exchange.exchange import GradientExchange
from gcompress.outer.fragments import fragments_of
from tests.local_ranks import World, run_ranks

# Each exchange, and each form of memory.
COMPRESSIONS = (
    None,
    "topk:sparsity=0.9",
    "topk:sparsity=0.9; exchange=twophase",
    "polar:rate=0.5,floor=0; exchange=twophase; error_feedback=ef21",
    "quantize:bits=4; error_feedback=ef21",
    "lowrank:rank=2",
    "threshold:threshold=0.001",
    "polar:rate=1,floor=0; exchange=turns",
    "topk:sparsity=0.9; mean=senders",
)


LAYERS = torch.nn.Linear(64, 80), torch.nn.BatchNorm1d(80), torch.nn.ReLU(), torch.nn.Linear(80, 64)


def network():
    """A new one with the same weights as all others: ranks are threads, which share torch's random numbers."""
    return copy.deepcopy(torch.nn.Sequential(*LAYERS))


class Trained:
    """One rank's model, inner optimizer and outer one, which train on its own batches."""

    def __init__(self, rank, engine, compression=None, make=None, **options):
        self.rank, self.model = rank, network()
        with torch.no_grad():
            self.model[0].weight.add_(rank)  # as a careless script: rank 0's replace them
        make = make or (lambda parameters: torch.optim.AdamW(parameters, lr=0.003))
        self.inner = make(self.model.parameters())
        self.outer = OuterOptimizer(self.inner, self.model, engine, compression, **options)

    def step(self, number):
        generator = torch.Generator().manual_seed(1000 * number + self.rank)
        x = torch.randn(16, 64, generator=generator)
        self.outer.zero_grad()
        (self.model(x) - x).square().mean().backward()
        self.outer.step()

    def steps(self, start, stop):
        for number in range(start, stop):
            self.step(number)
        return self

    def tensors(self):
        return {name: each.detach().clone() for name, each in self.model.state_dict().items()}


def ranks(function, size=3, **options):
    """[function(rank, engine) of each rank]."""
    return run_ranks(World(size, **options), None, lambda rank, exchange: function(rank, exchange.engine))


def same(dicts):
    return all(torch.equal(each[name], dicts[0][name]) for each in dicts for name in dicts[0])


@pytest.mark.parametrize("in_order", [False, True], ids=["by name", "in order"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "lr": 0.7}, {"fragments": 2}], ids=str)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_after_an_exchange_all_ranks_have_the_same_bits(compression, options, in_order):
    def train(rank, engine):
        trained, seen = Trained(rank, engine, compression, every=4, **options), []
        for number in range(10):
            trained.step(number)
            seen.append({name: trained.outer.anchors[name].clone() for name in trained.outer.anchors})
        trained.outer.finish()
        return seen, trained.tensors(), trained.outer.rounds

    found = ranks(train, in_order=in_order)
    for moment in zip(*(seen for seen, _, _ in found), strict=True):
        assert same(moment)
    assert same([tensors for _, tensors, _ in found])
    assert found[0][2] == (3 if "fragments" not in options else 6)


def test_without_compression_and_momentum_the_weights_are_averaged():
    def train(rank, engine):
        alone = Trained(rank, engine, every=100).steps(0, 4)
        mine = alone.tensors()
        return mine, Trained(rank, engine, every=4).steps(0, 4).tensors()

    found = ranks(train)
    for name in ("0.weight", "1.running_mean", "3.bias"):
        mean = sum(mine[name] for mine, _ in found) / 3
        torch.testing.assert_close(found[0][1][name], mean, atol=1e-6, rtol=1e-5)


def played(weight, inner_steps, start, rank=0):
    """The weights after some steps of SGD on one rank's batches, from `weight`."""
    weight = torch.nn.Parameter(weight.detach().clone())
    inner = torch.optim.SGD([weight], lr=0.05)
    for number in range(start, start + inner_steps):
        loss_of(weight, number, rank).backward()
        inner.step()
        inner.zero_grad()
    return weight.detach()


def loss_of(weight, number, rank):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1000 * number + rank))
    return (x @ weight.T - x).square().mean()


def test_momentum_is_nesterovs_as_torch_has_it():
    def train(rank, engine):
        weight = torch.nn.Parameter(torch.zeros(40, 40))
        inner = torch.optim.SGD([weight], lr=0.05)
        outer = OuterOptimizer(inner, [("w", weight)], engine, every=3, lr=0.7, momentum=0.9)
        for number in range(12):
            outer.zero_grad()
            loss_of(weight, number, rank).backward()
            outer.step()
        return weight.detach()

    expected = torch.nn.Parameter(torch.zeros(40, 40))
    torch_sgd = torch.optim.SGD([expected], lr=0.7, momentum=0.9, nesterov=True)
    for start in (0, 3, 6, 9):
        expected.grad = expected.detach() - sum(played(expected, 3, start, rank) for rank in range(2)) / 2
        torch_sgd.step()
    torch.testing.assert_close(ranks(train, size=2)[0], expected.detach())


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_round_is_that_of_sparse_loco(decay):
    """memory <- decay memory + change; sent = C(memory); memory <- memory - sent; anchor <- anchor - mean of sent."""
    compressor = gcompress.TopK(sparsity=0.95)
    policy = "topk:sparsity=0.95" + (f"; feedback_decay={decay}" if decay else "")

    def train(rank, engine):
        weight = torch.nn.Parameter(torch.zeros(40, 40))
        outer = OuterOptimizer(torch.optim.SGD([weight], lr=0.05), [("w", weight)], engine, policy, every=2)
        for number in range(8):
            outer.zero_grad()
            loss_of(weight, number, rank).backward()
            outer.step()
        return weight.detach()

    anchor, memories = torch.zeros(40, 40), [torch.zeros(40, 40) for _ in range(2)]
    for start in (0, 2, 4, 6):
        sent = []
        for rank, memory in enumerate(memories):
            memory.mul_(decay or 0.9).add_(anchor - played(anchor, 2, start, rank))
            sent.append(compressor.decompress(*compressor.compress(memory)))
            memory.sub_(sent[-1])
        anchor = anchor - sum(sent) / 2
    torch.testing.assert_close(ranks(train, size=2)[0], anchor)


def test_the_mean_of_senders_is_over_those_that_sent_an_entry():
    def train(rank, engine):
        weight = torch.nn.Parameter(torch.zeros(1024))
        inner = torch.optim.SGD([weight], lr=1.0)
        outer = OuterOptimizer(inner, [("w", weight)], engine, "topk:sparsity=0.998; mean=senders", every=1)
        weight.grad = torch.zeros(1024)
        weight.grad[[5, 6 + rank]] = torch.tensor([-1.0 - rank, -7.0])
        outer.step()
        return weight.detach()

    def added(rank, engine):
        exchange = GradientExchange("topk:sparsity=0.998; mean=senders", engine, average=False)
        gradient = torch.zeros(1024)
        gradient[[5, 6 + rank]] = torch.tensor([1.0 + rank, 7.0])
        (total,) = exchange.start_bucket({"w": gradient})().values()
        return total

    assert ranks(added, size=3)[0][5:9].tolist() == [6.0, 21.0, 21.0, 21.0]  # sums are means times the ranks
    weight = ranks(train, size=3)[0]
    assert weight[5:9].tolist() == [2.0, 7.0, 7.0, 7.0] and int((weight != 0).sum()) == 4


@pytest.mark.parametrize("fragments", [1, 2])
def test_in_turns_each_piece_comes_from_one_rank_and_all_take_off_what_came(fragments):
    """Of 2 ranks and 2 pieces of a matrix of 128 rows: rank r sends piece r, then the other one, and so on."""

    def train(rank, engine):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(128, 128)) for _ in range(fragments)])
        outer = OuterOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), model, engine, "fp16; exchange=turns; error_feedback=true",
            every=fragments, fragments=fragments,
        )  # fmt: skip
        anchors, residuals = [], []
        for _ in range(4 * fragments):
            for parameter in model:
                parameter.grad = torch.full((128, 128), -float(2**rank))  # each rank's weights grow by that
            outer.step()
            anchors.append(outer.anchors["0"].clone())
            residuals.append(outer.exchange.state_dict()["feedback"].get("0"))
        return anchors[fragments - 1 :: fragments], residuals[fragments - 1 :: fragments]

    found = ranks(train, size=2)
    assert same([dict(enumerate(anchors)) for anchors, _ in found])
    owners = found[0][0][0][[0, 127], 0].tolist()  # which rank sent the first and the last rows in the first round
    assert sorted(owners) == [1.0, 2.0] if fragments == 1 else owners
    if fragments == 1:
        memory = torch.zeros(2, 2)  # by rank and piece
        total = torch.zeros(2)
        senders = [int(owners[0] == 2), int(owners[1] == 2)]
        for turn in range(4):
            for rank in range(2):
                memory[rank] = memory[rank] * 0.5 + 2**rank
            for piece in range(2):
                sender = (senders[piece] + turn) % 2
                total[piece] += memory[sender, piece]
                memory[:, piece] -= memory[sender, piece].clone()
            assert found[0][0][turn][[0, 127], 5].tolist() == total.tolist()
    pieces = [anchors[-1][[0, 127], 0] for anchors, _ in found]
    # From one rank in all rounds, a piece would have moved by that rank's changes: by 1 or 2 in each step.
    assert not {4.0 * fragments, 8.0 * fragments} & {*pieces[0].tolist()}


def test_in_turns_what_is_not_finite_is_seen_by_all_whoever_sends_it():
    def train(rank, engine):
        weight = torch.nn.Parameter(torch.zeros(128, 128))
        outer = OuterOptimizer(
            torch.optim.SGD([weight], lr=1.0), [("w", weight)], engine, "fp16; exchange=turns", every=1
        )
        for row in (0, 127):
            weight.grad = torch.zeros(128, 128)
            weight.grad[row, 0] = float("nan") if rank == 1 else 1.0
            with pytest.raises(ExchangeError, match="not finite"):
                outer.step()
            assert not weight.any()
        return True

    assert all(ranks(train, size=2))


def test_with_a_delay_a_rank_keeps_what_it_did_meanwhile():
    def train(rank, engine):
        weight = torch.nn.Parameter(torch.zeros(40, 40))
        outer = OuterOptimizer(torch.optim.SGD([weight], lr=0.05), [("w", weight)], engine, every=4, delay=2)
        for number in range(6):
            outer.zero_grad()
            loss_of(weight, number, rank).backward()
            outer.step()
            assert outer.rounds == (number == 5)
        return weight.detach(), outer.anchors["w"]

    found = ranks(train, size=2)
    sent = [played(torch.zeros(40, 40), 4, 0, rank) for rank in range(2)]
    anchor = sum(sent) / 2
    for rank, (weight, moved) in enumerate(found):
        torch.testing.assert_close(moved, anchor)
        torch.testing.assert_close(weight, anchor + played(sent[rank], 2, 4, rank) - sent[rank])


def test_fragments_are_whole_layers_dealt_out_in_turns():
    names = ["embedding.weight", *(f"blocks.{i}.{part}" for i in range(5) for part in ("w", "b")), "head.weight"]
    sizes = {name: 1000 if name.startswith("blocks") else 1500 for name in names}
    first, second = fragments_of(sizes, 2)
    assert {"blocks.0.w", "blocks.0.b", "blocks.2.w", "blocks.4.b"} <= set(first)
    assert {"blocks.1.w", "blocks.3.b", "embedding.weight", "head.weight"} <= set(second)
    assert sorted(first + second) == sorted(names) and first == [name for name in names if name in first]
    assert [len(each) for each in fragments_of(sizes, 12)] == [1] * 12
    with pytest.raises(ConfigError, match="fragments: got 13, expected at most the model's 12"):
        fragments_of(sizes, 13)


def test_what_ranks_agree_on_follows_the_plan_of_as_many_as_there_are_now():
    """An elastic job's new rank has a plan for the new number; those that were there must come to the same."""

    class Elastic:
        in_order, elastic, size = False, True, 3
        allgather = alltoall = allreduce = gather_texts = None

        def world_size(self):
            return self.size

        def rank(self):
            return 0

    def made(engine):
        model = torch.nn.Linear(2000, 2000)
        outer = OuterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, engine, "quantize:bits=4")
        return outer.exchange, outer._exchange

    engine, new = Elastic(), Elastic()
    new.size = 8
    exchange, means = made(engine)
    before = means.terms
    engine.size = 8
    exchange.prepare({name: entry.shape for name, entry in exchange.plan.entries.items()})
    assert means.terms == made(new)[1].terms != before


def test_configurations_that_differ_are_refused_on_every_rank():
    def train(rank, engine):
        with pytest.raises(ConfigMismatchError, match="every.*ranks .0.: .*4.*ranks .1.: .*5"):
            Trained(rank, engine, every=4 + rank)
        return True

    assert all(ranks(train, size=2))


def test_weights_that_are_not_finite_end_the_round_on_every_rank_and_reach_no_memory():
    def train(rank, engine):
        trained = Trained(rank, engine, "topk:sparsity=0.9", every=2).steps(0, 3)
        anchors, memory = copy.deepcopy(trained.outer.anchors), trained.outer.exchange.state_dict()["feedback"]
        if rank == 1:
            with torch.no_grad():
                trained.model[0].weight[3, 4] = float("nan")
        with pytest.raises(ExchangeError, match="'0.weight': some rank's values are not finite"):
            trained.step(3)
        assert same([trained.outer.anchors, anchors])
        assert same([trained.outer.exchange.state_dict()["feedback"], memory])
        assert torch.equal(trained.model[0].weight, anchors["0.weight"])
        for state in trained.inner.state.values():  # the diverged rank's moments are its own to mend
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        trained.steps(4, 6)
        return trained.tensors()

    found = ranks(train, size=2)
    assert same(found) and found[0]["0.weight"].isfinite().all()


def test_bfloat16_weights_have_float32_anchors_and_buffers_and_frozen_layers_travel_as_they_should():
    def train(rank, engine):
        model = network().to(torch.bfloat16)
        model[3].requires_grad_(False)
        inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        outer = OuterOptimizer(inner, model, engine, "topk:sparsity=0.9", every=2)
        for number in range(4):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * number + rank)).bfloat16()
            outer.zero_grad()
            model(x).float().square().mean().backward()
            outer.step()
        assert set(outer.anchors) == {
            "0.weight", "0.bias", "1.weight", "1.bias", "buffer/1.running_mean", "buffer/1.running_var"
        }  # fmt: skip
        assert all(anchor.dtype == torch.float32 for anchor in outer.anchors.values())
        assert torch.equal(model[0].weight, outer.anchors["0.weight"].bfloat16())
        assert outer.exchange.plan.entries["buffer/1.running_mean"].compressor is None
        return {name: each.clone() for name, each in model.state_dict().items()}

    assert same(ranks(train))


def test_a_loss_scale_of_the_inner_steps_does_not_reach_what_is_remembered():
    def train(rank, engine, scaled):
        weight = torch.nn.Parameter(torch.zeros(40, 40))
        inner = torch.optim.SGD([weight], lr=0.05)
        outer = OuterOptimizer(inner, [("w", weight)], engine, "topk:sparsity=0.9", every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for number in range(6):
            outer.zero_grad()
            scaler.scale(loss_of(weight, number, rank)).backward()
            scaler.step(inner)
            scaler.update()
            outer.advance()
        return outer.exchange.state_dict()["feedback"]

    plain, scaled = (ranks(lambda rank, engine, s=s: train(rank, engine, s), size=2) for s in (False, True))
    for mine, theirs in zip(plain, scaled, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_layer_unfrozen_later_is_refused_before_ranks_drift_apart():
    def train(rank, engine):
        model = network()
        model[3].requires_grad_(False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = OuterOptimizer(inner, model, engine, every=1)
        model(torch.randn(16, 64)).square().mean().backward()
        outer.step()
        model[3].requires_grad_(True)
        with pytest.raises(ConfigError, match=r"shape \(64, 80\) that was frozen"):
            outer.step()
        return True

    assert all(ranks(train, size=2))


WRONG = [
    ({"every": 0}, "every: got 0"),
    ({"every": 4, "fragments": 5}, "fragments: got 5"),
    ({"every": 4, "fragments": 2, "delay": 3}, "delay: got 3, expected an integer from 0 to 2"),
    ({"lr": 0}, "lr: got 0"),
    ({"lr": float("nan")}, "lr: got nan"),
    ({"momentum": 1}, "momentum: got 1"),
    ({"compression": "nothing"}, "compressor: got 'nothing'"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", ".")):
        ranks(lambda rank, engine: Trained(rank, engine, **options), size=1)


def test_wrong_models_and_engines_are_named():
    weight = torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ConfigError, match="engine: got int"):
        OuterOptimizer(inner, [("w", weight)], 7)
    with pytest.raises(ConfigError, match=r"lacks the optimizer's parameter of shape \(3,\)"):
        OuterOptimizer(inner, [], 7)
    with pytest.raises(ConfigError, match="got torch.complex64, expected real"):
        other = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        OuterOptimizer(torch.optim.SGD([other], lr=0.1), [("w", other)], 7)


def test_the_policys_own_decay_stays_and_buffers_make_no_warning(caplog):
    def train(rank, engine):
        trained = Trained(rank, engine, "topk; feedback_decay=1.0", every=2).steps(0, 2)
        return trained.outer.exchange.policy.feedback_decay

    with caplog.at_level(logging.WARNING):
        assert ranks(train, size=1) == [1.0]
    assert not caplog.records
