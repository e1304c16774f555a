"""Policies: rules by size, name and role, warm-up, and one form to write them in."""

import json

import pytest
import torch

from gcompress import ConfigError, MaskSparse, Policy, Quantize, Rule, TopK, as_policy, parameter_groups
from gcompress.feedback import MomentumCorrection, eased
from gcompress.policy import check_momentum

POLICIES = [
    Policy("topk:sparsity=0.9"),
    Policy("none", rules=[Rule("quantize:bits=8", min_numel=10_000)]),
    Policy(TopK(sparsity=0.999), min_numel=4096, momentum=0.9, clip=2.5, warmup_steps=400),
    Policy("mask", error_feedback=False, exchange="allgather"),
    Policy(
        "quantize:bits=4",
        rules=[
            Rule(None, name="*.bias"),
            Rule(MaskSparse(sparsity=0.9, bits=2, signed=False), role="activation"),
            Rule("topk:sparsity=0.99", name="classifier.*", min_numel=100, max_numel=10**6),
        ],
    ),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_survives_its_string_and_json(policy):
    assert as_policy(str(policy)) == policy
    assert as_policy(json.loads(json.dumps(policy.to_dict()))) == policy
    assert str(as_policy(str(policy))) == str(policy)
    assert hash(as_policy(str(policy))) == hash(policy)


def test_the_first_rule_that_matches_decides_and_else_the_size():
    policy = POLICIES[-1]
    assert policy.compressor_for("features.0.bias", 10**6) is None
    assert policy.compressor_for("classifier.1.weight", 100) == TopK(sparsity=0.99)
    assert policy.compressor_for("classifier.1.weight", 99) is None
    assert policy.compressor_for("classifier.1.weight", 10**6 + 1) == Quantize(bits=4)
    assert policy.compressor_for("features.0.weight", 5000) == Quantize(bits=4)
    assert policy.compressor_for("features.0.weight", 5000, role="activation").signed is False
    assert policy.compressor_for("classifier.1.weight", 0) is None
    assert POLICIES[1].compressor_for("w", 9999) is None and POLICIES[1].compressor_for("w", 10_000)
    assert policy.compressor_for(None, 5000) == Quantize(bits=4)


@pytest.mark.parametrize(
    "value, words",
    [
        ("topk; sparsity=0.9", "'sparsity'"),
        ("topk; min_numel", "option=value"),
        ("topk; min_numel=3; min_numel=4", "option=value"),
        ("topk; role=weights -> none", "role: got 'weights'"),
        ("topk; shape=3 -> none", "'shape'"),
        ("topk; name=* -> polka", "'polka'"),
        ("topk; momentum=1.0", "momentum: got 1.0"),
        ("topk; momentum=much", "momentum: got 'much'"),
        ("topk; clip=0", "clip: got 0"),
        ("topk; warmup_steps=-1", "warmup_steps: got -1"),
        ("topk; min_numel=9, max_numel=3 -> none", "max_numel: got 3"),
        ("topk; error_feedback=false; momentum=0.9", "momentum: got 0.9"),
        ("topk; exchange=summed", "'summed'"),
        ({"compressor": "topk", "rules": "all"}, "rules: got 'all'"),
        ({"compressor": "topk", "rules": [{"name": "*"}]}, "compressor"),
    ],
)
def test_a_bad_policy_names_the_argument_and_what_came(value, words):
    with pytest.raises(ConfigError) as caught:
        as_policy(value)
    assert words in str(caught.value)


def test_feedback_is_decided_for_each_compressor():
    policy = Policy("topk", rules=[Rule("quantize:rounding=stochastic", name="a*")])
    assert policy.uses_feedback
    assert policy.feedback_for(policy.compressor_for("w", 5000))
    assert not policy.feedback_for(policy.compressor_for("a", 5000))
    assert Policy("quantize:rounding=stochastic", momentum=0.9).uses_feedback
    assert not Policy("none").uses_feedback


def test_warm_up_keeps_what_deep_gradient_compression_keeps():
    policy = Policy(TopK(sparsity=0.999), warmup_steps=400)
    kept = [1 - policy.compressor_for("w", 5000, step=step).sparsity for step in (0, 99, 100, 200, 300, 399, 400)]
    assert kept == pytest.approx([0.251, 0.251, 0.063, 0.0158, 0.00398, 0.00398, 0.001], rel=5e-3)
    assert policy.compressor_for("w", 5000) == TopK(sparsity=0.999)
    assert eased(Quantize(bits=4), 0, 100) == Quantize(bits=4)
    assert eased(TopK(sparsity=0.0), 0, 100).sparsity == 0


def test_momentum_correction_loses_nothing_and_masks_what_was_sent():
    """What is sent and the residual add up to plain momentum until entries are sent; those start again."""
    memory, compressor, numel = MomentumCorrection(momentum=0.5), TopK(sparsity=0.9), 1000
    velocity, residuals = torch.zeros(numel), torch.zeros(numel)
    for step in range(10):
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(step))
        velocity = 0.5 * velocity + gradient
        residuals = residuals + velocity
        sent = compressor.decompress(*memory.compress("w", gradient, compressor))
        assert torch.equal(sent[sent != 0], residuals[sent != 0])
        velocity, residuals = velocity * (sent == 0), residuals - sent
        torch.testing.assert_close(memory.residual("w"), residuals)
        torch.testing.assert_close(memory.velocity("w"), velocity)


def test_momentum_correction_of_a_dense_compressor_is_momentum():
    memory, total, velocity, given = MomentumCorrection(momentum=0.9), 0, 0, 0
    for step in range(20):
        gradient = torch.randn(1000, generator=torch.Generator().manual_seed(step))
        velocity = 0.9 * velocity + gradient
        given = given + velocity
        total = total + Quantize(bits=4).decompress(*memory.compress("w", gradient, Quantize(bits=4)))
    torch.testing.assert_close(total + memory.residual("w"), given, atol=1e-4, rtol=1e-4)


def test_gradients_are_clipped_before_they_are_added():
    memory = MomentumCorrection(momentum=0.0, clip=3.0)
    memory.compress("w", torch.full((900,), 1.0), TopK(sparsity=0.999))
    torch.testing.assert_close(memory.residual("w")[1:], torch.full((899,), 0.1))
    memory.compress("v", torch.full((900,), 0.01), TopK(sparsity=0.999))
    torch.testing.assert_close(memory.residual("v")[1:], torch.full((899,), 0.01))


@pytest.mark.parametrize("clip", [None, 3.0])
def test_momentum_correction_forgets_a_non_finite_step_and_is_saved(clip):
    memory, compressor = MomentumCorrection(momentum=0.9, clip=clip), TopK(sparsity=0.9)
    memory.compress("w", torch.randn(1000), compressor)
    before = [memory.residual("w").clone(), memory.velocity("w").clone()]
    for value in (float("nan"), float("inf")):
        poisoned = torch.randn(1000)
        poisoned[17] = value
        assert not compressor.decompress(*memory.compress("w", poisoned, compressor)).isfinite().all()
        assert torch.equal(memory.residual("w"), before[0]) and torch.equal(memory.velocity("w"), before[1])
    other = MomentumCorrection(momentum=0.9, clip=clip)
    other.load_state_dict(memory.state_dict())
    gradient = torch.randn(1000)
    assert torch.equal(memory.compress("w", gradient, compressor)[0], other.compress("w", gradient, compressor)[0])
    with pytest.raises(ConfigError, match="residual and velocity"):
        other.load_state_dict({"w": torch.zeros(3)})


def test_momentum_is_applied_once():
    model = torch.nn.Linear(100, 100)
    policy = Policy("topk", momentum=0.9)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), policy, weight_decay=1e-4)
    assert [(len(group["params"]), group["momentum"]) for group in groups] == [(1, 0.0), (1, 0.9)]
    assert groups[0]["weight_decay"] == pytest.approx(1e-3)
    check_momentum(policy, torch.optim.SGD(groups, lr=0.1).param_groups, names)
    twice = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8).param_groups
    with pytest.raises(ConfigError, match="'weight'.*parameter_groups"):
        check_momentum(policy, twice, names)
    check_momentum(Policy("topk"), twice, names)
    (whole,) = parameter_groups(model.named_parameters(), "topk")
    assert len(whole["params"]) == 2 and "momentum" not in whole
