"""Tensors larger than the nearer caches are coded in other ways, to the same bytes and results, wherever they lie."""

import pytest
import torch

from gcompress import backends
from tests.compressors import COMPRESSORS, gauss

NUMEL = 70001  # csrc/cpu/units.h: LARGE
KERNELS = backends.cpu_kernels()
NATIVE = [compressor for compressor in COMPRESSORS if KERNELS and compressor.kernels]
KEEPING = [compressor for compressor in NATIVE if KERNELS.keeps_residual_with(compressor.kernels)]
ADDING = [compressor for compressor in NATIVE if KERNELS.adds_with(compressor.kernels)]
pytestmark = [
    pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built here"),
    pytest.mark.parametrize("isa", backends.available_backends()[1:] or ["none"]),
]


def at(offset, values):
    """A copy that begins so many entries behind a multiple of 64 bytes."""
    room = torch.empty(offset + values.numel() + 16)
    place = room[(-room.data_ptr() // 4) % 16 + offset :][: values.numel()]
    return place.copy_(values)


def with_entry(values, position, value):
    values = values.clone()
    values[position] = value
    return values


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("compressor", KEEPING, ids=str)
def test_what_an_encoder_keeps_is_what_its_payload_loses(compressor, offset, isa):
    values, before = gauss(NUMEL), gauss(NUMEL, seed=1)
    cases = [(values, None), (values, before)]
    cases += [(with_entry(values, place, float("nan")), before) for place in (0, 63, NUMEL // 2, NUMEL - 1)]
    with backends.use_backend(isa):
        kernels = backends.cpu_kernels()
        for number, (x, residual) in enumerate(cases):
            corrected = x if residual is None else x + residual
            payload, ctx = compressor.compress(corrected, seed=5)
            lost = corrected - compressor.decompress(payload, ctx)
            for in_place in (False, True) if residual is not None else (False,):
                old = at(offset, torch.zeros(NUMEL) if residual is None else residual)
                fresh, flag = old if in_place else at(offset, gauss(NUMEL, seed=2)), torch.zeros(1, dtype=torch.int32)
                address = 0 if residual is None else old.data_ptr()
                remembering = kernels.remembering(address, fresh.data_ptr(), flag.data_ptr())
                found = compressor.encode_with(remembering, at(offset, x), 5)
                assert torch.equal(found, payload), number
                assert bool(flag) == (not corrected.isfinite().all()), (number, in_place)
                assert flag or torch.equal(fresh, lost), (number, in_place)
                assert in_place or residual is None or torch.equal(old, residual)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("compressor", ADDING, ids=str)
def test_sums_are_those_of_one_payload_after_the_other(compressor, offset, isa):
    with backends.use_backend(isa):
        payloads = [compressor.compress(gauss(NUMEL, seed=seed), seed=seed)[0] for seed in range(3)]
        expected, total = torch.zeros(NUMEL), at(offset, gauss(NUMEL, seed=4))
        for count in (1, 3):
            for number, payload in enumerate(payloads[:count]):
                compressor.decode_into(payload, expected, add=number > 0)
            for again in (False, True):
                compressor.decode_sum(payloads[:count], total, 0.3, again=again)
                assert torch.equal(total, expected * torch.tensor(0.3)), (count, again)
