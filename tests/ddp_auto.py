"""Scenarios of compression="auto" on real ranks: measured over Gloo, the same on all, kept by saved states."""

import logging

import torch
import torch.distributed as dist
from gcompress.plugins import ddp

import gcompress
from gcompress.forecast.decide import CANDIDATES, decide
from tests.ddp_tools import backward, make_model, same_on_all_ranks, scenario, wrapped
from tests.processes import expect_error


def told(policy):
    """Every rank's policy."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(policy))
    return found


@scenario
def auto_is_decided_once_and_alike():
    expected = {"auto": None, "auto:link=100kbit": "polar:rate=0.25", "auto:link=1tbit; name=2.* -> none": None}
    for text, chosen in expected.items():
        messages = []
        handler = logging.Handler()
        handler.emit = messages.append
        logger = logging.getLogger("gcompress.forecast.decide")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        model, state = wrapped(make_model(), text)
        logger.removeHandler(handler)
        policies = told(state.exchange.policy)
        assert len(set(policies)) == 1 and policies[0].partition(";")[0] in CANDIDATES, policies
        assert len(messages) == (dist.get_rank() == 0)
        assert chosen is None or policies[0] == chosen
        assert policies[0].partition(";")[2] == text.partition(";")[2]
        for step in range(2):
            backward(model, step, dist.get_rank())
            assert all(same_on_all_ranks(p.grad) for p in model.parameters())
        assert told(state.exchange.policy) == policies
        assert gcompress.as_policy(state.state_dict()["policy"]) == state.exchange.policy


@scenario
def auto_goes_on_with_what_was_saved():
    model, state = wrapped(make_model(), "auto:link=100kbit")
    backward(model, 0, dist.get_rank())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    saved = state.full_state_dict()
    waiting = ddp.GradientState("auto:link=1tbit")  # there is no model yet: the state waits with it
    waiting.load_state_dict(saved)
    again = torch.nn.parallel.DistributedDataParallel(make_model())
    waiting.bind(again)
    again.register_comm_hook(waiting, ddp.compress)
    assert set(told(waiting.exchange.policy)) == {"polar:rate=0.25"}
    backward(again, 1, dist.get_rank())
    assert all(same_on_all_ranks(p.grad) for p in again.parameters())


@scenario
def auto_beside_another_configuration_is_refused():
    rank = dist.get_rank()
    policy = gcompress.as_policy(f"auto:link={1 + (rank == 1)}gbit")
    engine = ddp.engine()
    shapes = {name: p.shape for name, p in make_model().named_parameters()}
    expect_error(gcompress.ConfigMismatchError, "2gbit", lambda: decide(policy, engine, shapes))
