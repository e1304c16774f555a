"""States of outer steps, on ranks that are threads: resumed to the bit, by other numbers of ranks, and refused."""

import copy
import io

import pytest
import torch

from gcompress import ConfigError, ConfigMismatchError
from tests.test_outer import COMPRESSIONS, Trained, network, ranks, same

STATES = [{"every": 4}, {"every": 4, "momentum": 0.5}, {"every": 4, "fragments": 2, "delay": 2}]


@pytest.mark.parametrize("stop", [5, 8, 10])
@pytest.mark.parametrize("options", STATES, ids=str)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_resumed_run_goes_on_to_the_bit(compression, options, stop):
    def whole(rank, engine):
        return Trained(rank, engine, compression, **options).steps(0, 15).tensors()

    def begun(rank, engine):
        trained = Trained(rank, engine, compression, **options).steps(0, stop)
        file = io.BytesIO()
        torch.save((trained.model.state_dict(), trained.outer.state_dict()), file)
        return file.getvalue()

    def resumed(rank, engine):
        trained = Trained(rank, engine, compression, **options)
        model, outer = torch.load(io.BytesIO(files[rank]), weights_only=True)
        trained.model.load_state_dict(model)
        trained.outer.load_state_dict(outer)
        return trained.steps(stop, 15).tensors()

    expected, files = ranks(whole, in_order=True), ranks(begun, in_order=True)
    for mine, theirs in zip(ranks(resumed, in_order=True), expected, strict=True):
        assert same([mine, theirs])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("after", [2, 4], ids=["fewer ranks", "more ranks"])
def test_other_numbers_of_ranks_go_on_from_the_anchors(compression, after):
    options = {"every": 4, "momentum": 0.5}

    def begun(rank, engine):
        trained = Trained(rank, engine, compression, **options).steps(0, 8)
        return trained.outer.full_state_dict(), trained.tensors()

    def resumed(rank, engine):
        trained = Trained(rank, engine, compression, **options)
        trained.outer.load_state_dict(copy.deepcopy(states[0][0]))
        start = trained.tensors()
        return start, trained.steps(8, 12).tensors()

    states = ranks(begun, size=3)
    found = ranks(resumed, size=after)
    parameters = [name for name, _ in network().named_parameters()]
    assert all(torch.equal(found[0][0][name], states[0][1][name]) for name in parameters)
    assert same([start for start, _ in found]) and same([end for _, end in found])


def test_a_full_state_has_what_is_under_way_as_if_it_had_come():
    def train(rank, engine):
        trained = Trained(rank, engine, "topk:sparsity=0.9", every=4, delay=2, momentum=0.5).steps(0, 9)
        state = trained.outer.full_state_dict()
        assert trained.outer.rounds == 1
        trained.steps(9, 10)
        assert same([state["anchors"], trained.outer.anchors]) and same([state["velocities"], trained.outer.velocities])
        return state["counts"][1], trained.outer.rounds

    assert ranks(train, size=2) == [(2, 2)] * 2


def test_ranks_that_loaded_other_anchors_or_moments_are_refused():
    def begun(rank, engine):
        trained = Trained(rank, engine, every=2)
        states = [trained.steps(0, 2).outer.state_dict(), trained.steps(2, 4).outer.state_dict()]
        return states

    states = ranks(begun, size=2)

    def resumed(rank, engine):
        trained = Trained(rank, engine, every=2)
        trained.outer.load_state_dict(states[rank][rank])
        trained.steps(4, 6)

    with pytest.raises(ConfigMismatchError, match="anchors, steps"):
        ranks(resumed, size=2)


def test_what_is_no_state_of_this_run_is_refused_before_anything_changes():
    def train(rank, engine):
        trained = Trained(rank, engine, "topk", every=2, delay=1).steps(0, 2)
        state, before = trained.outer.state_dict(), trained.tensors()
        wrong = [7, {}, {**state, "settings": {**state["settings"], "every": 3}}]
        wrong.append({**state, "anchors": {**state["anchors"], "0.weight": torch.zeros(3)}})
        wrong.append({**state, "anchors": {name: state["anchors"][name] for name in ("0.weight", "0.bias")}})
        wrong.append({**state, "anchors": {**state["anchors"], "0.bias": torch.full((80,), float("nan"))}})
        wrong.append({**state, "exchange": {**state["exchange"], "rank": 5}})
        wrong.append({**state, "counts": [-1, 2, 3]})
        current = state["under_way"]
        wrong += [{**state, "under_way": {**current, **change}} for change in ({"fragment": 1}, {"due": None})]
        wrong += [{**state, "under_way": each} for each in ({"fragment": 0}, {**current, "change": None}, [7])]
        wrong.append({**state, "under_way": {**current, "sent": {}}})
        for each in wrong:
            with pytest.raises(ConfigError):
                trained.outer.load_state_dict(each)
        assert same([trained.tensors(), before])
        return True

    ranks(train, size=1)
