"""At the ends of the range of floats, sizes and strides: what is finite stays finite, what is small costs little.

`inputs` has the largest magnitudes too, so the laws of every compressor hold for them.
"""

import pytest
import torch

from gcompress import ConfigError, backends, from_spec
from tests.allocations import Allocations
from tests.compressors import COMPRESSORS, LARGEST, inputs
from tests.test_summed import sum_by_hand

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
summable = pytest.mark.parametrize(
    "compressor",
    [each for each in COMPRESSORS if each.summable] + [from_spec("lowrank:rank=2,exchanges=2")],
    ids=str,
)
every_backend = pytest.mark.parametrize("backend", backends.available_backends())


def largest(numel):
    """{name: float32 tensor} near the largest number, in every company."""
    generator = torch.Generator().manual_seed(numel)
    signs = torch.randn(numel, generator=generator).sign()
    alone = torch.zeros(numel)
    alone[numel // 2] = LARGEST
    opposite = torch.zeros(numel)
    opposite[0], opposite[-1] = LARGEST, -LARGEST
    return {
        "positive": torch.full((numel,), LARGEST),
        "negative": torch.full((numel,), -LARGEST),
        "alone": alone,
        "opposite": opposite,
        "uneven": torch.where(signs > 0, LARGEST, -LARGEST / 2),
        "spread": signs * (1 + 2.4 * torch.rand(numel, generator=generator)) * 1e38,
        **{name: inputs(numel)[name] for name in ("largest", "near largest")},
    }


@every_compressor
def test_finite_tensors_decode_to_finite_ones_on_every_backend(compressor):
    for numel in (1, 63, 1000, 4200):
        for name, tensor in largest(numel).items():
            for shape in [(numel,)] + [(60, 70)] * (numel == 4200):
                results = []
                for backend in backends.available_backends():
                    with backends.use_backend(backend):
                        payload, ctx = compressor.compress(tensor.view(shape), seed=7)
                        results.append((payload, compressor.decompress(payload, ctx)))
                assert results[0][1].isfinite().all(), (shape, name)
                for payload, decoded in results:
                    assert torch.equal(payload, results[0][0]) and torch.equal(decoded, results[0][1]), (shape, name)


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_finite_tensors_of_other_types_decode_to_finite_ones(compressor, dtype):
    signs = inputs(4200)["largest"].sign().to(dtype)
    for values in (signs * torch.finfo(dtype).max, torch.full((4200,), torch.finfo(dtype).max, dtype=dtype)):
        decoded = compressor.decompress(*compressor.compress(values.view(60, 70), seed=7))
        assert decoded.dtype == dtype and decoded.isfinite().all()


def test_what_is_not_finite_is_not_made_so():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensor = torch.tensor([1.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
        decoded = from_spec("topk:sparsity=0.0").decompress(*from_spec("topk:sparsity=0.0").compress(tensor))
        assert torch.equal(decoded.nan_to_num(nan=5.0, posinf=6.0), tensor.nan_to_num(nan=5.0, posinf=6.0))


@summable
@every_backend
def test_a_finite_sum_is_found_finite(compressor, backend):
    """Of one rank; of several whose gradients are so large that only their sum is just finite; of opposite ones."""
    with backends.use_backend(backend):
        for tensor in largest(4200).values():
            tensor = tensor.view(60, 70)
            for parts in ([tensor], [tensor * 0.3] * 3, [tensor, -tensor], [tensor * 0.06] * 16):
                memories = [{} for _ in parts]
                for step in range(2):
                    total, owns, _ = sum_by_hand(compressor, parts, memories, seed=step)
                    assert total.isfinite().all() and all(own.isfinite().all() for own in owns)


@summable
def test_a_sum_with_what_is_not_finite_is_not_finite(compressor):
    for wrong in (float("inf"), float("nan")):
        tensor = inputs(4200)["largest"].view(60, 70) * 0.3
        poisoned = tensor.clone()
        poisoned[30, 35] = wrong
        total, _, _ = sum_by_hand(compressor, [tensor, poisoned])
        assert not total.isfinite().all()


BUCKETED = ["quantize", "fp16", "fp8", "sign", "onebit", "qsgd", "ternary", "ternary:rounding=nearest", "shared"]


@pytest.mark.parametrize("spec", BUCKETED)
@every_backend
def test_a_bucket_larger_than_the_tensor_is_the_tensor(spec, backend):
    tensor = torch.randn(1001)
    joint = "," if ":" in spec else ":"
    whole, huge = (from_spec(f"{spec}{joint}bucket={bucket}") for bucket in (0, 2**63 - 64))
    with backends.use_backend(backend):
        expected, ctx = whole.compress(tensor, seed=3)
        decoded = whole.decompress(expected, ctx)
        with Allocations() as allocations:
            payload, _ = huge.compress(tensor, seed=3)
            assert torch.equal(payload, expected) and torch.equal(huge.decompress(payload, ctx), decoded)
        assert allocations.peak < 1 << 20
    assert huge.nbytes(1001) == whole.nbytes(1001) and huge.nbytes(0) == 0
    with pytest.raises(ConfigError, match="below 2\\^63"):
        from_spec(f"{spec}{joint}bucket={2**63}")


@every_compressor
@every_backend
def test_one_entry_may_have_any_strides(compressor, backend):
    with backends.use_backend(backend):
        expected, _ = compressor.compress(torch.tensor([3.0]), seed=1)
        for tensor in (torch.tensor([3.0, 1.0])[::2], torch.full((4, 4), 3.0)[::3, ::2][:1, :1], torch.tensor(3.0)):
            payload, ctx = compressor.compress(tensor, seed=1)
            assert torch.equal(payload, expected)
            out = torch.zeros(2)[::2]
            compressor.decode_into(payload, out)
            assert torch.equal(compressor.decompress(payload, ctx).view(-1), out)
            if compressor.summable:
                total, _, _ = sum_by_hand(compressor, [tensor], seed=1)
                assert total.isfinite().all()
