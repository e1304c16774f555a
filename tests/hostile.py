"""Payloads that nobody sent: what a stranger, a broken disk or another configuration may hand to a decoder."""

import struct

import torch

from gcompress import packing
from gcompress.compressors.polar import outliers, products
from gcompress.compressors.polar.layout import CLASSES, Layout
from gcompress.compressors.polar.payload import APART, CLASS, COLUMNS, HEADER, PRODUCT, ROWS
from gcompress.compressors.polar.tables import design_count

# Floats that no encoder writes as a scale, and such as few do.
SCALES = (-1.0, float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, -1e-45, 1e-38, 3.4028235e38, -3.4028235e38)


def with_scales(payload, positions):
    """Payloads with one of SCALES at one of the byte positions, those behind the end left out."""
    for position in positions:
        for scale in SCALES if position < len(payload) else ():
            changed = payload.clone()
            changed[position : position + 4] = torch.tensor([scale]).view(torch.uint8)[: len(payload) - position]
            yield changed


def hostile(payload, generator, trials):
    """About 6 `trials` payloads made of a good one, for a number of entries that it is right for."""
    size = len(payload)

    def number(below):
        return int(torch.randint(0, below, (), generator=generator))

    def noise(count):
        return torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)

    for trial in range(trials):
        yield noise(size)
        yield torch.full_like(payload, (0, 255, 1, 128)[trial % 4])
        changed = payload.clone()
        for _ in range(1 + trial % 5):
            changed[number(size)] = number(256)
        yield changed
        begun = payload.clone()  # headers stand at the beginning or, of polar's product, at the end
        first = number(min(size, 40))
        extreme = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**27 - 1, size, number(2**32))[trial % 8]
        begun[first : first + 4] = torch.tensor(list(struct.pack("<I", extreme)), dtype=torch.uint8)[: size - first]
        yield begun
        yield torch.cat([payload[: size // 2], noise(size - size // 2)])
        yield (payload[: number(size)], torch.cat([payload, noise(1 + number(100))]))[trial % 2]
        if size > 4:  # a payload of variable size says how long it is
            wrong = torch.cat([payload[:4], noise(number(4 * size))])
            wrong[:4] = torch.tensor(list(struct.pack("<I", len(wrong) if trial % 2 else extreme)), dtype=torch.uint8)
            yield wrong


def hostile_polar(numel, nbytes):
    """Payloads of polar that claim all that they can, and in part hold it."""
    for columns in (1, 2, 16, numel // 16, numel // 2, numel):
        for count in (1, 2, 16, 32):
            for widths in ((0, 0), (0, 20), (20, 0), (20, 20), (255, 255)):
                head = products.HEADER.pack(columns, count, 0) + products.COMPONENT.pack(10, *widths) * count
                low = count * (numel // columns * widths[0] + columns * widths[1])
                marks = [255] * (count * (numel // columns + columns) // 8)  # as many as there are entries, or fewer
                body = bytes(-(-low // 8)) + bytes(marks) if low < 8 * nbytes else b""
                end = struct.pack("<I", nbytes - 28)
                for fill in (0, 255, 85):
                    yield _filled(bytes([PRODUCT]) + bytes(27) + head + (b"" if fill else body), fill, nbytes, end)
    for members in (numel, numel // 2, 4 * nbytes, 2**27 - 1):
        for width in (0, 1, 9, 20, 31):
            for layers in (1, 2, 24):
                head = HEADER.pack(APART, 0, 0, 0, 0, 0, 0, 0) + outliers.HEADER.pack(1, 1, 0, layers)
                layer = outliers.LAYER.pack(min(members, 2**27 - 1) | width << outliers.COUNT_BITS)
                for fill in (0, 255, 85):
                    yield _filled(head + layers * layer, fill, nbytes)
    for columns in (1, 16, numel // 200, numel // 16, numel):
        for flags in (ROWS, COLUMNS, ROWS | COLUMNS):
            for design in (0, 3, design_count() - 1):
                yield _with_every_class(numel, nbytes, columns, flags, design)


def _with_every_class(numel, nbytes, columns, flags, design):
    """Every scale code there is, and every class that follows from them coded by one design, in no words."""
    sides = [-(-numel // columns) if flags & ROWS else 0, columns if flags & COLUMNS else 0]
    codes = [(torch.arange(side) * 37 % 63).to(torch.uint8) for side in sides]  # 0 stands for 0, v for v
    layout = Layout(numel, columns, *(code.numpy() if len(code) else None for code in codes))
    classes = [k for k in range(CLASSES - 1, 0, -1) if layout.histogram()[k]]
    head = HEADER.pack(flags, len(classes), 100, columns, 6, 1, 6, 1)
    head += b"".join(packing.pack_bits(code, 6).numpy().tobytes() for code in codes if len(code))
    return _filled(head + b"".join(CLASS.pack(k, design, 1.0) for k in classes), 0, nbytes)


def _filled(start, byte, nbytes, end=b""):
    start = start[: nbytes - len(end)]
    return torch.frombuffer(
        bytearray(start + bytes([byte]) * (nbytes - len(start) - len(end)) + end), dtype=torch.uint8
    )
