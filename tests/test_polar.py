"""The polar code for bits, and what docs/polar.md and docs/FORMAT.md say about polar codes."""

import functools
import json
import math
import pathlib
import struct

import numpy as np
import pytest
import torch

import gcompress
from gcompress import ConfigError, PayloadError, Polar, backends, packing
from gcompress.compressors.polar import reference
from gcompress.compressors.polar.bits import PolarCode
from gcompress.compressors.polar.tables import ERASED, design_at, design_count, rank


def fair_bits(count, seed=0):
    return torch.randint(0, 2, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def distortion(code, bits):
    decoded = code.decompress(code.compress(bits), bits.numel())
    assert decoded.dtype == torch.uint8 and decoded.shape == bits.shape
    return float((decoded != bits).double().mean())


@pytest.mark.parametrize("block, information", [(16, 5), (256, 128), (1024, 100), (4096, 4095), (64, 64)])
@pytest.mark.parametrize("blocks", [1, 9, 65])
def test_a_codeword_is_its_own_nearest(block, information, blocks):
    code = PolarCode(block, information)
    payload = fair_bits(8 * code.nbytes(blocks * block)).view(-1, 8)
    payload.view(-1)[blocks * information :] = 0  # what fills the last byte
    payload = (payload << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    codewords = code.decompress(payload, blocks * block)
    assert 0.3 < codewords.float().mean() < 0.7
    assert torch.equal(code.compress(codewords), payload)
    assert torch.equal(code.decompress(payload, blocks * block), codewords)


# Bounds h^-1(1 - R): .3160, .1100, .0130; an earlier implementation had .1315 for (1024, 512).
@pytest.mark.parametrize(
    "block, information, most",
    [(256, 128, 0.136), (1024, 512, 0.1275), (1024, 102, 0.337), (4096, 2048, 0.1225), (4096, 3686, 0.0196)],
)
def test_distortion_is_near_its_bound(block, information, most):
    assert distortion(PolarCode(block, information), fair_bits(2**18)) < most


def test_distortion_of_the_longest_block_is_near_its_bound():
    assert distortion(PolarCode(65536, 32768), fair_bits(8 * 65536)) < 0.118


@pytest.mark.parametrize("block, information, blocks", [(16, 1, 3), (256, 77, 100), (1024, 512, 17), (16384, 9000, 2)])
def test_all_backends_make_the_same_bytes(block, information, blocks):
    code, bits = PolarCode(block, information), fair_bits(block * blocks)
    found = []
    for backend in backends.available_backends():
        with backends.use_backend(backend):
            payload = code.compress(bits)
            found.append((payload, code.decompress(payload, bits.numel())))
    for payload, decoded in found[1:]:
        assert torch.equal(payload, found[0][0]) and torch.equal(decoded, found[0][1])


def test_tables_are_odd():
    """csrc/polar/levels.h looks a sample up by its magnitude: the negative one has the inverted label."""
    samples = np.arange(1 + ERASED, -ERASED)
    for design in map(design_at, range(1, design_count() - 1)):
        for level in range(design.levels):
            table = design.tables[256 * ((1 << level) - 1) : 256 * ((2 << level) - 1)].reshape(-1, 256)
            assert np.array_equal(table[:, samples & 255], -table[::-1, -samples & 255])
            assert not table[:, ERASED & 255].any()


@pytest.mark.parametrize(  # 1 … 7 levels, 8 … 64 blocks side by side, of all lengths
    "rate, numel, list_size",
    [(rate, numel, 1) for rate in (0.1, 0.7, 1.5, 3.0) for numel in (9000, 40_000)]
    + [(rate, numel, 1) for rate in (0.4, 1.0, 2.2, 4.0) for numel in (300, 17_003, 66_001)]
    + [(rate, 9000, 2) for rate in (0.4, 1.0, 2.2)],
)
def test_all_backends_code_a_vector_alike(rate, numel, list_size):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values[::977] *= 30
    compressor = Polar(rate=rate, block=1024 if rate > 1 else 4096, list_size=list_size)
    found = []
    for backend in backends.available_backends():
        with backends.use_backend(backend):
            payload, ctx = compressor.compress(values)
            decoded = compressor.decompress(payload, ctx)
            twice = decoded.clone()
            compressor.decode_into(payload, twice, add=True)
            found.append((payload, decoded, twice))
    for payload, decoded, twice in found[1:]:
        assert torch.equal(payload, found[0][0])
        assert torch.equal(decoded, found[0][1]) and torch.equal(twice, found[0][2])


@pytest.mark.parametrize("rate", [0.25, 1.0, 2.0])
def test_a_large_target_is_filled_wherever_it_lies(rate):
    """Beyond 32 MiB the kernels write past the caches, if the target lies at a multiple of 64 bytes."""
    count = (1 << 23) + 77
    compressor = Polar(rate=rate, scales="tensor", outliers=0.0)
    values = torch.randn(count, generator=torch.Generator().manual_seed(3))
    memory = torch.empty(count + 32)
    shift = -memory.data_ptr() // 4 % 16
    for backend in backends.available_backends()[1:]:
        with backends.use_backend(backend):
            payload, _ = compressor.compress(values)
            expected = torch.zeros(count)
            compressor.decode_into(payload, expected, add=True)
            for start in (shift, shift + 1):
                memory.fill_(7.0)
                compressor.decode_into(payload, memory[start : start + count])
                assert torch.equal(memory[start : start + count], expected)
                assert bool((memory[start + count :] == 7.0).all()) and bool((memory[:start] == 7.0).all())


def test_a_payload_has_its_size_and_blocks_do_not_depend_on_each_other():
    code, bits = PolarCode(256, 100), fair_bits(256 * 70)
    payload = code.compress(bits.bool())
    assert payload.numel() == code.nbytes(bits.numel()) == 875
    assert torch.equal(payload[: 2 * 100 // 8], code.compress(bits[:512]))
    assert code.compress(bits[:0]).numel() == 0 and code.decompress(payload[:0], 0).numel() == 0


@pytest.mark.parametrize("block, information", [(8, 4), (100, 4), (131072, 4), (64, 0), (64, 65), (64, 0.5), ("64", 4)])
def test_an_impossible_code_is_refused(block, information):
    with pytest.raises(ConfigError, match="block|information"):
        PolarCode(block, information)


@pytest.mark.parametrize(
    "bits", [torch.zeros(65, dtype=torch.uint8), torch.zeros(64), torch.zeros(1, 64).bool(), [0] * 64,
             torch.full((64,), 2, dtype=torch.uint8)],
    ids=["half a block", "floats", "two dimensions", "a list", "a two"],
)  # fmt: skip
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ConfigError, match="bits: got"):
        PolarCode(64, 32).compress(bits)


def test_a_payload_that_does_not_fit_is_refused():
    code = PolarCode(64, 20)
    for payload in (torch.zeros(2, dtype=torch.uint8), torch.zeros(3), torch.zeros(1, 3, dtype=torch.uint8), b"abc"):
        with pytest.raises(PayloadError, match="expected 3 bytes"):
            code.decompress(payload, 64)
    with pytest.raises(ConfigError, match="multiple"):
        code.decompress(torch.zeros(3, dtype=torch.uint8), 65)


def test_the_worked_example_of_the_documentation():
    """The block of eight in docs/polar.md."""
    order = torch.from_numpy(rank(8, 8).astype("int64"))
    assert [int((order == place).nonzero()) for place in range(8)] == [7, 6, 5, 3, 4, 2, 1, 0]
    ratios = torch.tensor([14, -5, 22, -18, 3, -13, -8, 27], dtype=torch.int16).view(8, 1)
    check = reference._check_node(ratios[:4], ratios[4:])
    assert check.flatten().tolist() == [3, 5, -8, -18]
    assert reference._encode_node(check, order[:4], 4).flatten().tolist() == [1, 1, 1, 1]
    right = ratios[4:] - ratios[:4]
    assert right.flatten().tolist() == [-11, -8, -30, 45]
    assert reference._encode_node(right, order[4:], 4).flatten().tolist() == [1, 0, 1, 0]
    code = reference._encode_node(ratios, order, 4)
    assert code.flatten().tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert reference.transform(code).flatten().tolist() == [0, 0, 0, 1, 0, 0, 1, 0]
    entries, signs = ratios.float(), 1 - 2 * code.float()
    decoded = (signs * entries).mean() * signs
    assert (signs * entries).sum() == 78
    assert round(float((entries - decoded).square().sum() / entries.square().sum()), 2) == 0.62


# A decoder by the letter of docs/FORMAT.md, with nothing of the library's but the designs ------------------


def bit_stream(data, count, width):
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * width].reshape(count, width)
    return bits @ (1 << np.arange(width))


def order_of(size, real):
    """(rank of every position, position of every row)."""
    width = size.bit_length() - 1
    place = np.array([int(f"{row:0{width}b}"[::-1], 2) for row in range(size)])
    useful = np.zeros(size, bool)
    useful[place[:real]] = True
    half = size // 2
    while half:
        for i in range(size):
            if not i & half:
                first, second = useful[i], useful[i + half]
                useful[i], useful[i + half] = first and second, first or second
        half //= 2
    # floor(2^(24 + j / 4)): floor of the fourth root of 2^(96 + j)
    weight = [sum(math.isqrt(math.isqrt(2 ** (96 + j))) for j in range(width) if i >> j & 1) for i in range(size)]
    best_first = sorted(range(size), key=lambda i: (useful[i], weight[i], i), reverse=True)
    return np.argsort(best_first), place


def transform_of(u):
    u, half = u.copy(), 1
    while half < len(u):
        for i in range(len(u)):
            if not i & half:
                u[i] ^= u[i + half]
        half *= 2
    return u


@functools.cache
def designs():
    """(m, points by label, weights) of every design."""
    stored = json.loads(
        (pathlib.Path(gcompress.__file__).parent / "compressors" / "polar" / "designs.json").read_text()
    )
    between = [(d["levels"], np.array([-p for p in d["points"][::-1]] + d["points"]), d["information"]) for d in stored]
    samples = np.rint(np.arange(256).astype(np.int8) * (4096 / 24))
    return [(1, np.array([1, -1]), [4096]), *between, (8, samples, [4096] * 8)]


def decoded_by_the_book(data, numel, block):
    if data[0] & 32:
        (size,) = struct.unpack("<I", data[-4:])
        rest = decoded_by_the_book(bytes([data[0] & ~32]) + data[1:-size], numel, block)
        return rest + product_by_the_book(data[-size:-4], numel)
    flags, count, base, columns, row_width, row_low, column_width, column_low = struct.unpack("<BBhIBBBB", data[:12])
    assert flags in (0, 2, 4, 6, 8, 10, 12, 14, 16)
    at, codes, columns = 12, [], columns or numel
    for flag, length, width, low in (
        (2, -(-numel // columns), row_width, row_low),
        (4, columns, column_width, column_low),
    ):
        values = np.ones(length, int)
        if flags & flag:
            values = bit_stream(data[at : at + -(-length * width // 8)], length, width)
            values = np.where(values > 0, values + low - 1, 0)
            at += -(-length * width // 8)
        codes.append(values)
    outliers, at = outliers_by_the_book(data, at, numel, codes) if flags & 8 else ({}, at)
    if flags & 16:
        seed, *scales = struct.unpack_from(f"<I{-(-numel // 16384)}f", data, at)
        at += 4 + 4 * len(scales)
    order = np.argsort(-codes[1], kind="stable")
    entries = (np.arange(len(codes[0]))[:, None] * columns + order).ravel()
    of_class = np.where((codes[0][:, None] > 0) & (codes[1][order] > 0), codes[0][:, None] + codes[1][order], 0).ravel()
    of_class, entries = of_class[entries < numel], entries[entries < numel]
    classes = [struct.unpack_from("<BBe", data, at + 4 * k) for k in range(count)]
    at += 4 * count
    groups = []
    for k, c in enumerate(classes):
        m = designs()[c[1]][0]
        if groups and m in (1, 8) and designs()[classes[groups[-1][0]][1]][0] == m and len(groups[-1]) < 64:
            groups[-1].append(k)
        else:
            groups.append([k])
    tiles = []  # (N, real, L, [class of every row], [row of its class])
    for group in groups:
        sizes = [int((of_class == classes[k][0]).sum()) for k in group]
        lanes = next((lanes for lanes in (64, 32, 16) if sum(sizes) >= 1024 * lanes), 8)
        rows = [(k, row) for k, size in zip(group, sizes, strict=True) for row in range(-(-size // lanes))]
        while rows:
            size = min(block, max(16, 1 << (len(rows) - 1).bit_length()))
            tiles.append((size, min(size, len(rows)), lanes, rows[:size]))
            rows = rows[size:]
    words = [struct.unpack_from("<H", data, at + 2 * t)[0] for t in range(len(tiles))]
    at += 2 * len(tiles)
    values = [[] for _ in classes]
    for (size, real, lanes, rows), sent in zip(tiles, words, strict=True):
        ranks, place = order_of(size, real)
        m = designs()[classes[rows[0][0]][1]][0]
        carried = [sum(designs()[classes[k][1]][2][level] for k, _ in rows) for level in range(m)]
        shares = [0] * m
        for level in reversed(range(m)):
            if carried[level] >= 4063 * real:
                shares[level] = min(real, sent - sum(shares))
        others = [level for level in range(m) if carried[level] < 4063 * real]
        remain = sent - sum(shares)
        for level in others:
            shares[level] = min(real, remain * carried[level] // sum(carried[k] for k in others))
        for level in reversed(range(m)):
            shares[level] += min(sent - sum(shares), real - shares[level])
        labels = np.zeros((size, lanes), int)
        for level, share in enumerate(shares):
            u = np.zeros((size, lanes), int)
            u[ranks < share] = bit_stream(data[at : at + share * lanes // 8], share * lanes, 1).reshape(share, lanes)
            at += share * lanes // 8
            labels += transform_of(u)[place] << level
        for (k, _), row in zip(rows, labels, strict=False):
            points = designs()[classes[k][1]][1][row] * np.float64(classes[k][2]) * 2.0**base
            values[k].append(points / (1 if m == 1 else 4096))
    out = np.zeros(numel, np.float32)
    for c, of in zip(classes, values, strict=True):
        mine = entries[of_class == c[0]]
        out[mine] = np.concatenate(of)[: len(mine)]
    for place, value in outliers.items():
        out[place] += value
    if flags & 16:
        for block, scale in enumerate(scales):
            turn_back_by_the_book(out[16384 * block :][:16384], 512 * block, seed, np.float32(scale))
    return out


def product_by_the_book(data, numel):
    columns, count, least = struct.unpack_from("<IBh", data)
    components = [struct.unpack_from("<BBB", data, 7 + 3 * k) for k in range(count)]
    stream, at, sides = np.unpackbits(np.frombuffer(data[7 + 3 * count :], np.uint8), bitorder="little"), 0, []
    for _, *widths in components:
        for width, length in zip(widths, (numel // columns, columns), strict=True):
            low = stream[at : at + length * width].reshape(length, width) @ (1 << np.arange(width))
            at += length * width
            sides.append((width, low))
    unary, bit, columns_of = stream[-(-at // 8) * 8 :], 0, []
    for width, low in sides:
        column = []
        for part in low:
            high = 0
            while not unary[bit]:
                high, bit = high + 1, bit + 1
            bit += 1
            value = (high << width) + int(part)
            column.append(value // 2 if value % 2 == 0 else -(value + 1) // 2)
        columns_of.append(column)
    total = sum(
        np.outer(np.array(left, object), np.array(right, object)) * 2**shift  # integers of Python
        for (shift, *_), left, right in zip(components, columns_of[::2], columns_of[1::2], strict=True)
    )
    return (total.astype(np.float64) * 2.0**least).astype(np.float32).ravel()


def outliers_by_the_book(data, at, numel, codes):
    """({place: value}, end)."""
    floor, slope, offset, depth = struct.unpack_from("<ffBB", data, at)
    floor, slope = np.float32(floor), np.float32(slope)
    layers = struct.unpack_from(f"<{depth}I", data, at + 10)
    at += 10 + 4 * depth
    levels, before = {}, list(range(numel))  # the candidates of a layer, by their place
    members = []
    for layer in layers:
        count, width = layer & (2**27 - 1), layer >> 27
        low = bit_stream(data[at : at + -(-count * width // 8)], count, width) if width else [0] * count
        at += -(-count * width // 8)
        here, number, bit = [], -1, 0
        for gap in low:
            high = 0
            while not data[at + bit // 8] >> bit % 8 & 1:
                high, bit = high + 1, bit + 1
            bit += 1
            number += 1 + (high << width) + int(gap)
            here.append(before[number])
        at += -(-bit // 8)
        members.append(here)
        before = here
    signs = bit_stream(data[at : at + -(-len(members[0]) // 8)], len(members[0]), 1)
    at += -(-len(members[0]) // 8)
    for d, here in enumerate(members):
        alone = sorted(set(here) - set(members[d + 1] if d + 1 < depth else []))
        size = -(-len(alone) * d // 8)
        mantissas = bit_stream(data[at : at + size], len(alone), d) if d else [0] * len(alone)
        at += size
        levels.update((place, 2**d + int(mantissa)) for place, mantissa in zip(alone, mantissas, strict=True))
    values = {}
    for place, sign in zip(members[0], signs, strict=True):
        row, column = divmod(place, len(codes[1]))
        r, c = (np.float32(2 ** (code / 4)) if code else np.float32(0) for code in (codes[0][row], codes[1][column]))
        limit = max(floor, (slope * r) * c + np.float32(0.4) * floor)
        size = (np.float32(levels[place]) + np.float32(offset / 256)) * limit
        values[place] = -size if sign else size
    return values, at


def turn_back_by_the_book(y, word, seed, scale):
    """In place, by the steps of eden's decoding."""

    def flip(part, first):
        words = packing.hashed(torch.arange(-(-len(part) // 32)) + first, seed).numpy()
        bits = words[np.arange(len(part)) // 32] >> np.arange(len(part)) % 32 & 1
        part[bits == 1] *= -1

    def transform(part):
        h = 1
        while h < len(part):
            pairs = part.reshape(-1, 2, h)
            part[:] = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).ravel()
            h *= 2

    q = 1 << (len(y).bit_length() - 1)
    if q == len(y):
        transform(y)
    else:
        for part, first in ((y[-q:], word + 0x80000000), (y[:q], None)):
            transform(part)
            part *= np.float32(1 / np.sqrt(q))
            if first is not None:
                flip(part, first)
    y *= scale
    flip(y, word)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(5000,), (40, 300), (20_001,)])
def test_the_format_document_suffices_to_decode(rate, shape):
    generator = torch.Generator().manual_seed(7)
    spread = torch.exp(torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator).sort(0).values)
    gauss = torch.randn(shape, generator=generator)
    heavy = gauss / torch.randn((3, *shape), generator=generator).square().mean(0).sqrt()
    flags = []
    outer = 9 * gauss[:, :1] * gauss[:1] if gauss.dim() > 1 else gauss
    for tensor, options in (
        (gauss, {}),
        (spread * gauss, {}),
        (spread * heavy, {}),
        (gauss, {"unbiased": True}),
        (gauss + outer, {}),
    ):
        compressor = Polar(rate=rate, block=1024, floor=0, **options)
        payload, ctx = compressor.compress(tensor, seed=3)
        flags.append(int(payload[0]))
        expected = decoded_by_the_book(payload.numpy().tobytes(), tensor.numel(), 1024)
        assert torch.equal(compressor.decompress(payload, ctx).view(-1), torch.from_numpy(expected))
    assert flags[3] == 16 and (flags[2] & 8 or rate == 0.1)
    assert (flags[4] & 32 > 0) == (len(shape) > 1 and rate > 0.1)
