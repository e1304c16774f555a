"""What all engines do alike: agree, wait, and say what they made; on ranks that are threads."""

import pytest
import torch

import gcompress
from gcompress.exchange import engine
from gcompress.exchange.engine import agree, wait_until
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.results import exchange
from tests.local_ranks import ThreadEngine, World, run_ranks


def agreements(*configurations, numbers=None):
    """What `agree` returns, or raises, on a rank for each configuration."""

    def run(rank, exchange):
        try:
            return agree(exchange.engine, configurations[rank], numbers)
        except gcompress.ConfigMismatchError as error:
            return error

    return run_ranks(World(len(configurations)), None, run)


def test_ranks_that_are_configured_alike_agree():
    same = {"compression": {"name": "topk"}, "step": 3}
    assert agreements(same, same) == [{"format": engine.FORMAT_VERSION, **same}] * 2


def test_a_rank_takes_what_it_leaves_out_from_the_others():
    server, worker = {"servers": 1}, {"servers": 1, "compression": "topk"}
    assert agreements(server, worker, worker) == [{"format": engine.FORMAT_VERSION, **worker}] * 3


def test_a_difference_is_told_to_every_rank_and_nothing_else_is():
    one, two, server = {"bits": 2, "step": 3}, {"bits": 4, "step": 3}, {"step": 3}
    errors = agreements(one, two, one, server, numbers=[4, 5, 6, 7])
    expected = 'bits: expected the same on all ranks, got ranks [4, 6]: {"bits": 2}; ranks [5]: {"bits": 4}'
    assert [str(error) for error in errors] == [expected] * 4


def test_a_rank_of_another_release_is_refused():
    class OfAnotherRelease(ThreadEngine):
        def gather_texts(self, text):
            return super().gather_texts(text.replace(f'"format": {engine.FORMAT_VERSION}', '"format": 1'))

    def run(rank, exchange):
        ranks = OfAnotherRelease(exchange.engine.world, rank) if rank else exchange.engine
        with pytest.raises(gcompress.ConfigMismatchError, match="^format: "):
            agree(ranks, {"compression": "topk"})

    run_ranks(World(2), None, run)


def test_waiting_ends_with_what_was_waited_for(monkeypatch):
    wait_until(iter([False, False, True]).__next__, "three looks")
    monkeypatch.setenv("GCOMPRESS_TIMEOUT", "0.01")
    with pytest.raises(gcompress.ExchangeError, match="^the other ranks: no answer within 0.01 s$"):
        wait_until(lambda: False, "the other ranks")


def test_an_exchange_is_found_where_a_plugin_put_it():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    with pytest.raises(gcompress.ConfigError, match="got SGD"):
        exchange(optimizer)
    optimizer._gcompress = GradientExchange(None)
    assert exchange(optimizer) is optimizer._gcompress
