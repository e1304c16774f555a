"""Error feedback: nothing is lost, nothing poisons it, it can be saved."""

import io

import pytest
import torch

from gcompress import ConfigError, MaskSparse, Policy, Quantize, TopK, as_policy
from gcompress.exchange.exchange import GradientExchange
from gcompress.exchange.pieces import Item, OneByOne
from gcompress.feedback import ErrorFeedback


@pytest.mark.parametrize(
    "compressor", [TopK(sparsity=0.9), MaskSparse(sparsity=0.9, bits=2), Quantize(bits=2)], ids=str
)
def test_what_was_not_sent_is_in_the_residual(compressor):
    memory, sent, given = ErrorFeedback(), torch.zeros(50, 40), torch.zeros(50, 40)
    for step in range(20):
        gradient = torch.randn(50, 40, generator=torch.Generator().manual_seed(step))
        given += gradient
        sent += compressor.decompress(*memory.compress("w", gradient, compressor))
        torch.testing.assert_close(sent + memory.residual("w").view(50, 40), given, atol=1e-4, rtol=1e-4)


def test_a_non_finite_gradient_is_passed_on_and_forgotten():
    memory, compressor = ErrorFeedback(), TopK(sparsity=0.9)
    memory.compress("w", torch.randn(1000), compressor)
    before = memory.residual("w").clone()
    for value in (float("nan"), float("inf")):
        poisoned = torch.randn(1000)
        poisoned[17] = value
        assert not compressor.decompress(*memory.compress("w", poisoned, compressor)).isfinite().all()
        assert torch.equal(memory.residual("w"), before)
    assert compressor.decompress(*memory.compress("w", torch.randn(1000), compressor)).isfinite().all()


def test_finite_gradients_beyond_float32_stay_finite():
    memory, compressor = ErrorFeedback(), TopK(sparsity=0.9)
    gradient = torch.full((1000,), 1e300, dtype=torch.float64)
    decoded = compressor.decompress(*memory.compress("w", gradient, compressor))
    assert decoded.isfinite().all() and memory.residual("w").isfinite().all()


def test_state_is_saved_without_pickled_objects():
    memory, compressor = ErrorFeedback(), TopK(sparsity=0.9)
    memory.compress("w", torch.randn(1000, dtype=torch.float64), compressor)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = ErrorFeedback()
    other.load_state_dict(torch.load(file, weights_only=True))
    gradient = torch.randn(1000)
    assert torch.equal(memory.compress("w", gradient, compressor)[0], other.compress("w", gradient, compressor)[0])
    with pytest.raises(ConfigError, match="residual 'w'"):
        other.load_state_dict({"w": torch.zeros(3, 3)})
    with pytest.raises(ConfigError, match="got 7 entries, expected 1000"):
        memory.compress("w", torch.zeros(7), compressor)


def test_policies_are_read_from_everything_that_configures_one():
    policy = Policy(TopK(sparsity=0.9), min_numel=10, error_feedback=False)
    assert as_policy(policy.to_dict()) == policy == as_policy(policy)
    assert as_policy("topk:sparsity=0.9") == as_policy(TopK(sparsity=0.9)) == as_policy(TopK(sparsity=0.9).to_dict())
    assert policy.compressor_for("w", 9) is None and policy.compressor_for("w", 10) == TopK(sparsity=0.9)
    assert Policy("topk").uses_feedback and not Policy("quantize:rounding=stochastic").uses_feedback
    assert as_policy({"compressor": "topk:sparsity=0.9", "min_numel": 10, "error_feedback": False}) == policy
    for wrong in ({"compressor": {"name": "topk"}, "size": 3}, {"compressor": 7}, {"bits": 3}, 3):
        with pytest.raises(ConfigError):
            as_policy(wrong)
    with pytest.raises(ConfigError, match="min_numel"):
        Policy("topk", min_numel=-1)


class OneRank:
    """An engine of a single rank: all that is exchanged comes back."""

    in_order = False

    def world_size(self):
        return 1

    def rank(self):
        return 0

    def allgather(self, name, lane, payload, sizes):
        return Arrived(payload)

    def alltoall(self, name, lane, payload, to, back):
        return Arrived(payload)


class Arrived:
    def __init__(self, payload):
        self.payload = payload

    def ready(self):
        return True

    def wait(self):
        return self.payload


def test_an_exchange_counts_what_it_hands_over_and_continues_its_count():
    exchange = GradientExchange("topk:sparsity=0.9", OneRank())
    gradient = torch.randn(2000, dtype=torch.float16)
    mean = exchange.start("w", gradient)()
    exchange.end_step()
    assert mean.dtype == torch.float16 and int((mean != 0).sum()) == 200
    assert exchange.report.sent_bytes == TopK(sparsity=0.9).nbytes(2000) == exchange.report.last_step_bytes
    assert exchange.report.ratio == 8000 / exchange.report.sent_bytes
    other = GradientExchange("topk:sparsity=0.9", OneRank())
    other.load_state_dict(exchange.state_dict())
    assert other.report == exchange.report
    assert torch.equal(other.start("w", gradient)(), exchange.start("w", gradient)())
    with pytest.raises(ConfigError, match="policy"):
        GradientExchange("topk:sparsity=0.8", OneRank()).load_state_dict(exchange.state_dict())


def test_gathered_bytes_of_another_model_are_refused_by_name():
    from gcompress import PayloadError

    exchange = GradientExchange("topk:sparsity=0.9", OneRank())
    exchange.engine.allgather = lambda name, lane, payload, sizes: Arrived(payload[:-1])
    with pytest.raises(PayloadError, match="layer.weight.*same model"):
        exchange.start("layer.weight", torch.randn(2000))()
    good = TopK(sparsity=0.9).compress(torch.randn(2000))[0]
    with pytest.raises(PayloadError, match="'layer.weight' from rank 1"):
        item = Item("layer.weight", 0, 2000, torch.Size((2000,)), TopK(sparsity=0.9))
        OneByOne([item]).decode_sum([good, torch.zeros_like(good)], 1.0, {"layer.weight": torch.empty(2000)})
