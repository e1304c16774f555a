"""The cosine transform in blocks: its coefficients, its bytes in any shape, and what it refuses."""

import math

import pytest
import torch

from gcompress import Dct, PayloadError, Quantize, TopK, backends, packing
from tests.compressors import inputs, poisoned


def gauss_of(*shape):
    return inputs(math.prod(shape))["gauss"].view(shape)


def cosine_transform(matrix, tall, wide):
    """The coefficients of all blocks, block after block, in double precision."""

    def basis(size):
        numbers = torch.arange(size, dtype=torch.float64)
        angles = math.pi / size * numbers[:, None] * (numbers + 0.5)
        return angles.cos() * torch.where(numbers > 0, 2 / size, 1 / size).sqrt()[:, None]

    rows, columns = matrix.shape
    blocks = matrix.double().view(rows // tall, tall, columns // wide, wide).transpose(1, 2)
    return basis(tall) @ blocks @ basis(wide).t()


EXACT = TopK(sparsity=0.0, index="bitmap")  # keeps all


@pytest.mark.parametrize(
    "shape, block", [((128, 192), (64, 64)), ((60, 7), (60, 7)), ((10, 3, 90), (10, 54)), ((1, 50), (1, 50))]
)
def test_coefficients_are_those_of_the_cosine_transform_of_blocks(shape, block):
    tensor = gauss_of(*shape)
    payload, ctx = Dct(EXACT).compress(tensor)
    coefficients = packing.bytes_to_float(payload[4 : 4 + 4 * tensor.numel()])
    expected = cosine_transform(tensor.view(shape[0], -1), *block).reshape(-1).float()
    torch.testing.assert_close(coefficients, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Dct(EXACT).decompress(payload, ctx), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1,), (64,), (77,), (67, 67), (128, 64), (96, 40), (3, 5, 7), (130, 1), (1, 130), (20, 254)]
)
def test_a_transform_has_the_bytes_of_the_reference_in_any_shape(shape):
    for coder in (Dct(EXACT), Dct(TopK(sparsity=0.9, chunk=64), size=8), Dct(Quantize(bits=3), size=127)):
        for name, tensor in {**inputs(math.prod(shape)), **poisoned(math.prod(shape))}.items():
            with backends.use_backend("reference"):
                payload, ctx = coder.compress(tensor.view(shape))
                decoded = coder.decompress(payload, ctx)
            for isa in backends.available_backends()[1:]:
                with backends.use_backend(isa):
                    where = (isa, str(coder), name)
                    assert torch.equal(coder.compress(tensor.view(shape))[0], payload), where
                    assert torch.equal(coder.decompress(payload, ctx).view(torch.int32), decoded.view(torch.int32)), (
                        where
                    )


def test_chunks_of_4096_are_blocks_of_64_by_64():
    """What DeMo keeps: the same number of each block."""
    tensor, coder = gauss_of(128, 192), Dct(TopK(sparsity=0.984375, chunk=4096, index="places"))
    payload, _ = coder.compress(tensor)
    coefficients = cosine_transform(tensor, 64, 64).reshape(-1, 4096)
    places = packing.unpack_bits(payload[4 + 4 * 64 * 6 :], 64 * 6, 12).view(6, 64)
    assert torch.equal(places, coefficients.abs().topk(64).indices.sort(1).values)


@pytest.mark.parametrize("backend", backends.available_backends())
@pytest.mark.parametrize("columns", [0, 7, 2**32 - 1])
def test_columns_that_do_not_divide_a_tensor_are_refused(backend, columns):
    coder = Dct(EXACT)
    with backends.use_backend(backend):
        payload, ctx = coder.compress(gauss_of(10, 10))
        payload[:4] = packing.u32_bytes(columns, "cpu")
        with pytest.raises(PayloadError, match=f"says it has {columns} columns, expected a divisor of 100"):
            coder.decompress(payload, ctx)
