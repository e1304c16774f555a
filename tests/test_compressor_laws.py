"""What every compressor promises, run on all of them."""

import dataclasses
import json

import pytest
import torch

from gcompress import Chain, ConfigError, Entropy, PayloadError, Quantize, TopK, backends, from_dict, from_spec
from gcompress.feedback import ErrorFeedback
from tests.compressors import COMPRESSORS, MISSING, SIZES, fits, inputs, poisoned, same_or_nan

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)


def test_no_method_of_the_registry_is_left_out():
    assert not MISSING


@every_compressor
def test_the_configuration_survives_json_and_its_spec(compressor):
    assert from_dict(json.loads(json.dumps(compressor.to_dict()))) == compressor
    assert from_spec(str(compressor)) == compressor
    assert hash(from_spec(compressor.spec)) == hash(compressor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        compressor.bits = 3


# Inputs of which the largest sizes have something to add: others are decided entry by entry, or are one value.
AT_LENGTH = ("gauss", "heavy", "ties", "many")


@every_compressor
def test_native_bytes_are_the_reference_bytes(compressor):
    """On every instruction set, for encoding, decoding and adding."""
    for numel in SIZES:
        for name, tensor in {**inputs(numel), **poisoned(numel)}.items():
            if numel > 8000 and name not in AT_LENGTH:
                continue  # what smaller sizes have shown, at most of this test's time
            with backends.use_backend("reference"):
                payload, ctx = compressor.compress(tensor, seed=7)
                decoded = compressor.decompress(payload, ctx)
            total = torch.ones(numel) + decoded  # which is what the reference does
            assert payload.dtype == torch.uint8 and fits(compressor, payload, numel)
            for isa in backends.available_backends()[1:]:
                with backends.use_backend(isa):
                    where = (isa, numel, name)
                    assert torch.equal(compressor.compress(tensor, seed=7)[0], payload), where
                    assert same_or_nan(compressor.decompress(payload, ctx), decoded), where
                    native_total = torch.ones(numel)
                    compressor.decode_into(payload, native_total, add=True)
                    assert same_or_nan(native_total, total), where


@every_compressor
def test_what_is_kept_and_what_is_added_up_are_those_of_the_reference(compressor):
    """Three steps of error feedback, one of which is not finite, and the sum of their payloads, in one pass or not."""
    for numel in (1, 65, 1023, 8200):
        gradients = [inputs(numel, seed=0)["heavy"], poisoned(numel)["one inf"], inputs(numel, seed=1)["gauss"]]
        found = []
        for backend in backends.available_backends():
            with backends.use_backend(backend):
                feedback, steps = ErrorFeedback(), []
                for step, gradient in enumerate(gradients):
                    payload, _ = feedback.compress("w", gradient, compressor, seed=step)
                    residual = feedback.residual("w")
                    steps.append((payload, residual if residual is None else residual.clone()))
                out = torch.empty(numel)
                compressor.decode_sum([steps[each][0] for each in (0, 2, 0, 2)], out, 0.3)
                found.append((steps, out))
        (expected, total), *others = found
        assert expected[0][1] is None or same_or_nan(expected[0][1], expected[1][1]), numel
        for steps, out in others:
            for (payload, residual), (expected_payload, kept) in zip(steps, expected, strict=True):
                assert torch.equal(payload, expected_payload), numel
                assert residual is None if kept is None else same_or_nan(residual, kept), numel
            assert same_or_nan(out, total), numel


@every_compressor
def test_a_residual_may_be_replaced_where_it_lies(compressor):
    """As those are that are unpacked for one step. Also of a tensor that is larger than the nearer caches."""
    for numel in (65, 8200, 70_000):
        values, residual = inputs(numel, seed=0)["heavy"], 0.1 * inputs(numel, seed=1)["gauss"]
        for backend in backends.available_backends()[1:]:
            with backends.use_backend(backend):
                kernels = backends.kernels(values, compressor)
                if not kernels or not kernels.keeps_residual_with(compressor.kernels):
                    continue
                found, flag = [], torch.zeros(1, dtype=torch.int32)
                for before, after in ((residual, torch.empty(numel)), (residual.clone(),) * 2):
                    remembering = kernels.remembering(before.data_ptr(), after.data_ptr(), flag.data_ptr())
                    found.append((compressor.encode_with(remembering, values, 7), after))
                (apart, expected), (payload, after) = found
                assert torch.equal(payload, apart) and torch.equal(after, expected), (backend, numel)


@every_compressor
def test_the_error_does_not_exceed_that_of_sending_nothing(compressor):
    if compressor.unbiased:
        pytest.skip("an unbiased compressor trades error for its mean")
    for numel in SIZES:
        for name, tensor in inputs(numel).items():
            if not getattr(compressor, "signed", True):
                tensor = tensor.relu()
            decoded = compressor.decompress(*compressor.compress(tensor))
            assert torch.isfinite(decoded).all(), name
            error = (decoded.double() - tensor.double()).norm()
            assert error <= tensor.double().norm() * (1 + 1e-6) + 1e-36 * numel, (numel, name)


@every_compressor
def test_a_non_finite_input_decodes_to_a_non_finite_result(compressor):
    for numel in SIZES:
        for name, tensor in poisoned(numel).items():
            decoded = compressor.decompress(*compressor.compress(tensor))
            assert not torch.isfinite(decoded).all(), (numel, name)


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_types_and_shapes_come_back(compressor, dtype):
    base = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    for tensor in (base, base.t(), base[:, ::3], base[0, 0], base[:0], base[:1, :1], base.view(2, 3, 50)):
        payload, ctx = compressor.compress(tensor)
        decoded = compressor.decompress(payload, ctx)
        assert fits(compressor, payload, tensor.numel())
        assert decoded.shape == tensor.shape and decoded.dtype == dtype
        flat, _ = compressor.compress(tensor.contiguous().float())
        assert torch.equal(payload, flat)


@every_compressor
def test_the_input_is_left_alone(compressor):
    tensor = torch.randn(1000)
    before = tensor.clone()
    compressor.compress(tensor)
    assert torch.equal(tensor, before)


@every_compressor
def test_bytes_that_do_not_fit_are_refused(compressor):
    payload, ctx = compressor.compress(torch.randn(1000))
    for wrong in (payload[:-1], torch.cat([payload, payload[:1]]), payload.view(1, -1), payload.float(), payload[:0]):
        with pytest.raises(PayloadError, match="payload"):
            compressor.decompress(wrong, ctx)


def test_an_output_that_cannot_be_written_is_refused():
    compressor = from_spec("topk")
    payload, _ = compressor.compress(torch.randn(1000))
    for wrong in (torch.empty(1000).double(), torch.empty(10, 100), torch.empty(2000)[::2]):
        with pytest.raises(ConfigError, match="out: got"):
            compressor.decode_into(payload, wrong)


@every_compressor
@pytest.mark.parametrize("backend", backends.available_backends())
def test_damaged_bytes_decode_or_are_refused_but_never_crash(compressor, backend):
    generator = torch.Generator().manual_seed(3)
    out = torch.empty(333)
    with backends.use_backend(backend):
        payload, _ = compressor.compress(torch.randn(333, generator=generator))
        for trial in range(60):
            damaged = payload.clone()
            positions = torch.randint(0, len(payload), (1 + trial % 5,), generator=generator)
            damaged[positions] = torch.randint(0, 256, positions.shape, generator=generator).to(torch.uint8)
            try:
                compressor.decode_into(damaged, out)
            except PayloadError:
                pass
        for value in (0, 255):
            try:
                compressor.decode_into(torch.full_like(payload, value), out)
            except PayloadError:
                pass


LARGE = 2**24 + 7


@pytest.fixture(scope="module")
def large():
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("compressor", {each.name: each for each in reversed(COMPRESSORS)}.values(), ids=str)
def test_sixteen_million_entries_and_seven(compressor, large):
    """The same bytes on every instruction set, a spec of each method; the reference, slow, is asked for three below."""
    payloads = []
    for isa in backends.available_backends()[1:] or ["reference"]:
        with backends.use_backend(isa):
            payload, ctx = compressor.compress(large)
            payloads.append(payload)
            decoded = compressor.decompress(payload, ctx)
        assert fits(compressor, payload, LARGE)
        assert torch.equal(payload, payloads[0])
        assert decoded.isfinite().all()
        if not compressor.unbiased and getattr(compressor, "signed", True):
            assert (decoded - large).norm() < large.norm()


@pytest.mark.parametrize("spec", ["quantize:bits=4", "topk:sparsity=0.99", "mask:sparsity=0.99,bits=2"])
def test_sixteen_million_entries_by_the_reference(spec, large):
    compressor = from_spec(spec)
    payload, _ = compressor.compress(large)
    with backends.use_backend("reference"):
        assert torch.equal(compressor.compress(large)[0], payload)


def test_what_is_not_a_dense_floating_point_tensor_is_refused():
    for wrong in (torch.arange(5), torch.randn(4, 4).to_sparse(), [1.0, 2.0], None):
        with pytest.raises(ConfigError, match="tensor"):
            from_spec("topk").compress(wrong)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("polka", "'polka'"),
        ("topk:sparsity=1.0", "sparsity: got 1.0"),
        ("topk:sparsity=-0.1", "sparsity: got -0.1"),
        ("topk:sparsity=much", "sparsity: got 'much'"),
        ("topk:sparsity", "argument=value"),
        ("topk:sparsity=0.9,sparsity=0.8", "once"),
        ("topk:density=0.1", "'density'"),
        ("binmean:bits=1", "bits: got 1"),
        ("dct:size=129", "size: got 129, expected an integer from 2 to 128"),
        ("binmean:range=0", "range: got 0, expected a number from 0.1 to 100"),
        ("topk:index=hash", "index: got 'hash'"),
        ("topk:index=places", "index: got 'places' with chunk=0, expected a chunk with it"),
        ("topk:chunk=100", "chunk: got 100, expected a power of two from 64 to 65536, or 0 for the whole tensor"),
        ("topk:chunk=-64", "chunk: got -64, expected a power of two"),
        ("topk:chunk=true", "chunk: got True, expected a power of two"),
        ("quantize:bits=9", "bits: got 9"),
        ("quantize:bits=0", "bits: got 0"),
        ("quantize:bits=2.5", "bits: got 2.5"),
        ("quantize:bits=1e400", "bits: got inf"),
        ("quantize:bits=nan", "bits: got nan"),
        ("quantize:bucket=12", "bucket: got 12, expected a multiple of 8, or 0"),
        ("quantize:bucket=9223372036854775808", "expected an integer of at least 0, below 2^63"),
        ("topk:sparsity=nan", "sparsity: got nan"),
        ("ternary:clip=1e400", "clip: got inf"),
        ("threshold:threshold=nan", "threshold: got nan"),
        ("polar:rate=nan", "rate: got nan"),
        ("polar:block=100", "block: got 100, expected a power of two from 64 to 16384"),
        ("mxfp4:bucket=32.0", "bucket: got 32.0, expected one of 16"),
        ("lowrank:exchanges=true", "exchanges: got True"),
        ("quantize:rounding=up", "rounding: got 'up'"),
        ("sign:bucket=100", "bucket: got 100"),
        ("mxfp4:bucket=0", "bucket: got 0"),
        ("eden:bits=1.5", "bits: got 1.5"),
        ("eden:block=100", "block: got 100"),
        ("eden:scale=most", "scale: got 'most'"),
        ("qsgd:bits=1", "bits: got 1"),
        ("ternary:clip=-1", "clip: got -1"),
        ("mask:bits=true", "bits: got True"),
        ("mask:levels=max", "levels: got 'max'"),
        ("mask:signed=3", "signed: got 3"),
        ("threshold:threshold=0", "threshold: got 0"),
        ("threshold:threshold=2.0,relative=true", "threshold: got 2.0"),
        ("entropy:(quantize", "parentheses"),
        ("entropy:(quantize),(topk)", "each once"),
        ("chain:(topk:sparsity=0.9),(polka)", "'polka'"),
        (17, "17"),
        ({"name": []}, "got []"),
        ({"name": "chain", "first": {"name": {}}}, "got {}"),
        ("quantize:bits=" + "9" * 10**6, "(1000016 characters), expected a spec of at most 1000"),
        ("entropy:" + "(" * 10**6, "expected a spec of at most 1000"),
        ("entropy:" + "(entropy:" * 90, "parentheses are 8 deep, expected at most 7"),
    ],
)
def test_a_bad_spec_names_the_argument_and_what_came(spec, words):
    with pytest.raises(ConfigError) as caught:
        from_spec(spec)
    assert words in str(caught.value)


def nested(depth, part="then"):
    """A chain that many compressors deep."""
    chain = TopK(sparsity=0.5)
    for _ in range(depth - 1):
        chain = Chain(**{"first": TopK(sparsity=0.5), "then": TopK(sparsity=0.5), part: chain})
    return chain


@pytest.mark.parametrize("part", ["first", "then"])
def test_compressors_are_eight_deep_at_most(part):
    deepest = nested(8, part)
    assert deepest.depth == 8 and from_spec(str(deepest)) == deepest == from_dict(deepest.to_dict())
    spec, configuration, cycle = str(deepest), deepest.to_dict(), {"name": "entropy"}
    cycle["inner"] = cycle
    for _ in range(400):
        spec, configuration = f"entropy:({spec})", {"name": "entropy", "inner": configuration}
    for make in (lambda: nested(9, part), lambda: Entropy(deepest), lambda: from_spec(spec[-900:])):
        with pytest.raises(ConfigError, match="deep|match"):
            make()
    for deep in (configuration, cycle):
        with pytest.raises(ConfigError, match="dicts more than 8 deep"):
            from_dict(deep)
    with pytest.raises(ConfigError, match="characters, more than 1000"):
        hybrid = TopK()
        for _ in range(7):
            hybrid = Chain(hybrid, hybrid)


@pytest.mark.parametrize("part", ["first", "then"])
def test_each_part_is_asked_once(part, monkeypatch):
    """Whatever is asked of a nest of compressors takes no more steps than it has parts."""
    deepest, asked = nested(8, part), []
    sections = TopK.sections
    monkeypatch.setattr(TopK, "sections", lambda self, numel: asked.append(numel) or sections(self, numel))
    for question in (deepest.sections, deepest.nbytes, lambda numel: deepest.payload_nbytes(torch.zeros(9), numel)):
        asked.clear()
        question(1 << 20)
        assert len(asked) <= 8, question


def test_a_number_too_long_to_be_written_is_named_by_its_bits():
    for make in (lambda: Quantize(bits=10**5000), lambda: Quantize(bucket=8 * 10**5000), lambda: TopK(10**5000)):
        with pytest.raises(ConfigError, match="an integer of 166[0-9][0-9] bits"):
            make()


@every_compressor
def test_what_an_encoder_writes_passes_the_check_for_strangers(compressor):
    for numel in (1, 65, 1023, 8200):
        for tensor in {**inputs(numel), **poisoned(numel)}.values():
            payload, _ = compressor.compress(tensor, seed=7)
            compressor.check(payload, numel)
