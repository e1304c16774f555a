"""EF21's memory on ranks that are threads: in every exchange, for means and sums, and for other numbers of ranks."""

import pytest
import torch

from gcompress import from_spec
from gcompress.exchange.exchange import GradientExchange
from tests.local_ranks import World, run_ranks

POLICIES = (
    "topk:sparsity=0.9; error_feedback=ef21; exchange=allgather",
    "topk:sparsity=0.9; error_feedback=ef21; exchange=twophase",
    "quantize:bits=3; error_feedback=ef21; exchange=twophase",
    "lowrank:rank=2; error_feedback=ef21",
)
SHAPE = (160, 100)


def gradient(step, rank):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * step + rank))


def exchanged(exchange, step, rank):
    (result,) = exchange.start_bucket({"w": gradient(step, rank)})().values()
    exchange.end_step()
    return result.reshape(-1)


def ranks(policy, average, function, size):
    """[function(rank, exchange) of each rank]."""

    def run(rank, threads):
        exchange = GradientExchange(policy, threads.engine, average=average)
        exchange.prepare({"w": torch.Size(SHAPE)})
        return function(rank, exchange)

    return run_ranks(World(size), None, run)


def check_delivered(found, average):
    """What is delivered and what the owners still owe is the mean (or sum) of the estimates, the same on all ranks."""
    delivered = [state["feedback"]["delivered"]["w"] for _, state in found]
    for result, state in found:
        assert torch.equal(result, state["feedback"]["delivered"]["w"]) and torch.equal(result, delivered[0])
    owed = torch.zeros(SHAPE).view(-1)
    for _, state in found:
        for key, residual in state["owner_feedback"].items():
            start, stop = map(int, key.partition("[")[2][:-1].split(":"))
            owed[start:stop] = residual
    estimates = -sum(state["feedback"]["residual"]["w"] for _, state in found)
    assert estimates.norm() > 1
    torch.testing.assert_close(delivered[0] + owed, estimates / (len(found) if average else 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_delivered_is_the_mean_of_the_estimates(policy, average):
    def train(rank, exchange):
        results = [exchanged(exchange, step, rank) for step in range(4)]
        return results[-1].clone(), exchange.state_dict()

    check_delivered(ranks(policy, average, train, 3), average)


@pytest.mark.parametrize("after", [2, 5])
@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_so_when_other_ranks_go_on(policy, average, after):
    def begun(rank, exchange):
        for step in range(3):
            exchanged(exchange, step, rank)
        return exchange.full_state_dict()

    state = ranks(policy, average, begun, 3)[0]

    def resumed(rank, exchange):
        exchange.load_state_dict(state)
        return exchanged(exchange, 3, rank).clone(), exchange.state_dict()

    check_delivered(ranks(policy, average, resumed, after), average)


def test_an_estimate_moves_by_what_was_sent():
    def train(rank, exchange):
        for step in range(3):
            exchanged(exchange, step, rank)
        return exchange.state_dict()["feedback"]["residual"]["w"]

    compressor = from_spec("topk:sparsity=0.9")
    for rank, residual in enumerate(ranks(POLICIES[0], True, train, 2)):
        estimate = torch.zeros(SHAPE)
        for step in range(3):
            estimate += compressor.decompress(*compressor.compress(gradient(step, rank) - estimate))
        torch.testing.assert_close(-residual.view(SHAPE), estimate)
