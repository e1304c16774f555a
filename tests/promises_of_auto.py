"""What every engine promises of compression="auto"; see promises.py."""

import torch

import gcompress
from tests.promises import equal, make_model, promise, train

LONGEST = 200  # characters of a policy's text


def text_of(policy):
    """A policy's text as a tensor to compare between ranks."""
    return torch.tensor(list(str(policy).ljust(LONGEST).encode()), dtype=torch.float32)


@promise()
def auto_is_one_compressor_for_all_ranks(new):
    """Slow links take polar; what was chosen trains as it does under its own name, and states have that."""
    with new(make_model(), "auto:link=100kbit") as trainer:
        chosen = trainer.exchange.policy
        assert not chosen.undecided and trainer.same(text_of(chosen))
        assert chosen.compressor.name == "polar", chosen
        weights, _ = train(trainer, steps=3)
        if trainer.remembers:
            assert gcompress.as_policy(trainer.exchange.state_dict()["policy"]) == chosen
    with new(make_model(), chosen) as trainer:
        named, _ = train(trainer, steps=3)
    assert equal(named, weights)
