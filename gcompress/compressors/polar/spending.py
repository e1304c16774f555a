"""How the bytes of a payload are spent: classes in groups, tiles of blocks side by side, bits for each level.

The decoder makes the same plan from what it reads in the payload.
"""

import functools
from typing import NamedTuple

import numpy as np

from .layout import CLASSES, NEARLY_ALL, NO_CODE, Layout, side_bytes, without_idle_codes
from .payload import CLASS, HEADER, TILE
from .tables import MAX_LEVELS, SMALLEST_BLOCK, design_at, design_index, levels_for
from .water import class_rates

LONG_ENOUGH = 1024  # rows, of which longer blocks are made only when all lanes are in use
# Classes that share one code, by its levels: with one level there is no loss in it, with more some.
MIXED = {1: 64, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 64}


class CodedClass(NamedTuple):
    """Entries of one class: how many, by which design (an index for `tables.design_at`), at which factor."""

    of_class: int
    count: int  # type: ignore[assignment]  # of a tuple's methods nobody needs this one
    design: int
    amplitude: float = 0.0

    @property
    def levels(self):
        return design_at(self.design).levels


class Tile(NamedTuple):
    """`rows` x `lanes` entries of group `group`, a block of the code a lane, sent as `words` words of `lanes` bits.

    Only the first `real` rows are there; the rest is padding.
    """

    group: int
    rows: int
    real: int
    lanes: int
    levels: int
    words: int = 0

    @property
    def nbytes(self):
        return self.words * self.lanes // 8


class Spending(NamedTuple):
    """What a payload says before its words.

    Coded classes come group by group; each fills whole rows, and the rows of a group are cut into tiles.
    """

    layout: Layout
    base: int
    classes: list
    tiles: list


def groups_of(classes):
    """The positions of classes that are coded together: runs of as many levels, if that number of levels mixes."""
    groups = []
    for k, c in enumerate(classes):
        mixes = groups and classes[groups[-1][0]].levels == c.levels and len(groups[-1]) < MIXED[c.levels]
        if mixes:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def lanes_for(count):
    """Blocks side by side for a group of `count` entries: fewer where they would be short."""
    return next((lanes for lanes in (64, 32, 16) if count >= lanes * LONG_ENOUGH), 8)


def make_tiles(classes, block):
    """Tiles of at most `block` rows; the last one of a group is as much shorter as it has fewer entries."""
    tiles = []
    for number, group in enumerate(groups_of(classes)):
        lanes = lanes_for(sum(classes[k].count for k in group))
        left, levels = sum(-(-classes[k].count // lanes) for k in group), classes[group[0]].levels
        tiles += [Tile(number, block, block, lanes, levels)] * (left // block)
        left %= block
        if left:
            rows = min(block, max(SMALLEST_BLOCK, 1 << (left - 1).bit_length()))
            tiles.append(Tile(number, rows, left, lanes, levels))
    return tiles


def lone_class_bytes(numel, block):
    """Bytes before the words of a payload whose entries are all of one class, and room for some words."""
    tiles = make_tiles([CodedClass(2 * NO_CODE, numel, 0)], block)
    return HEADER.size + CLASS.size + TILE.size * len(tiles) + 8


def row_classes(spending):
    """Per row of all tiles the position of its class in `spending.classes`, 255 for a padding row: uint8."""
    slots = []
    for number, group in enumerate(groups_of(spending.classes)):
        tiles = [tile for tile in spending.tiles if tile.group == number]
        mine = [np.full(-(-spending.classes[k].count // tiles[0].lanes), k, np.uint8) for k in group]
        slots += [*mine, np.full(sum(tile.rows for tile in tiles) - sum(map(len, mine)), 255, np.uint8)]
    return np.concatenate(slots)


def class_starts(spending):
    """The position of every coded class's first entry among the tiles' entries, and the number of those."""
    starts, at = [], 0
    for number, group in enumerate(groups_of(spending.classes)):
        tiles = [tile for tile in spending.tiles if tile.group == number]
        start = at
        for k in group:
            starts.append(start)
            start += -(-spending.classes[k].count // tiles[0].lanes) * tiles[0].lanes
        at += sum(tile.rows * tile.lanes for tile in tiles)
    return starts, at


def tile_counts(spending):
    """Rows of every class in every tile: int64 [tiles, classes]."""
    counts = np.zeros((len(spending.tiles), len(spending.classes)), np.int64)
    for number, group in enumerate(groups_of(spending.classes)):
        mine = [k for k, tile in enumerate(spending.tiles) if tile.group == number]
        rows = [-(-spending.classes[k].count // spending.tiles[mine[0]].lanes) for k in group]
        classes = np.concatenate([[0], np.cumsum(rows)])
        tiles = np.concatenate([[0], np.cumsum([spending.tiles[k].real for k in mine])])[:, None]
        shared = np.minimum(tiles[1:], classes[1:]) - np.maximum(tiles[:-1], classes[:-1])
        counts[mine[0] : mine[-1] + 1, group[0] : group[-1] + 1] = np.maximum(shared, 0)
    return counts


def share_bits(spending, rates, nbytes):
    """The tiles with words of at most `nbytes` bytes between them, in proportion to the rates of their rows.

    Tiles of plain samples come first and take all they need.
    """
    per_row = np.array([rates[c.of_class] for c in spending.classes], np.int64)
    lanes = np.array([tile.lanes for tile in spending.tiles])
    wanted = np.maximum(tile_counts(spending) @ per_row * lanes, 1).tolist()
    missing, left, shared = sum(wanted), nbytes, []
    for tile, want in zip(spending.tiles, wanted, strict=True):
        share = left if tile.levels == MAX_LEVELS else want * left // missing
        missing -= want
        shared.append(tile._replace(words=min(8 * share // tile.lanes, tile.levels * tile.real, 0xFFFF)))
        left -= shared[-1].nbytes
    return shared


def level_shares(spending):
    """Per tile, the information bits of a block of every level: in proportion to what the levels carry.

    Levels that carry nearly all come first and are sent whole: a wrong bit there is a large error.
    """
    information = np.array([_information(c) for c in spending.classes])
    for tile, carried in zip(spending.tiles, (tile_counts(spending) @ information).tolist(), strict=True):
        yield _shares(tile.words, tile.real, tuple(carried[: tile.levels]))


@functools.lru_cache(256)  # mostly all tiles but the last are alike
def _shares(left, real, carried):
    """Information bits by level: of `left` together, at most `real` each, by what `carried` says in 1/4096."""
    carried, shares, words = list(carried), [0] * len(carried), left
    for level in reversed(range(len(shares))):
        if carried[level] >= NEARLY_ALL * real:
            shares[level], carried[level] = min(left, real), 0
            left -= shares[level]
    shared, total = left, max(sum(carried), 1)
    for level, bits in enumerate(carried):
        shares[level] += min(real - shares[level], shared * bits // total)
    left = words - sum(shares)
    for level in reversed(range(len(shares))):
        more = min(left, real - shares[level])
        shares[level] += more
        left -= more
    return tuple(shares)


def _information(coded):
    information = design_at(coded.design).information
    return [*information, *[0] * (MAX_LEVELS - len(information))]


def choose_classes(counts, rates):
    """The coded classes with their designs, those of many levels first."""
    coded = np.flatnonzero(rates)[::-1].tolist()
    levels = {k: levels_for(int(rates[k])) for k in coded}
    chosen = [CodedClass(k, int(counts[k]), design_index(levels[k], int(rates[k] + 4) // 8)) for k in coded]
    return sorted(chosen, key=lambda c: -c.levels)


def spend(layout, variances, nbytes, flat, block, apart=0, keep_codes=False):
    """The plan for a payload of `nbytes` bytes and the rates of all classes, or None if nothing can be coded.

    Args:
        layout: the matrix with its scale codes.
        variances: see `class_rates`.
        flat: one rate for all entries instead of water-filling.
        block: the longest block of the code.
        apart: bytes for outliers.
        keep_codes: leave the layout's codes as they are.
    """
    nbytes -= apart
    overhead = CLASS.size + TILE.size
    for _ in range(4):
        bits = 8 * (nbytes - HEADER.size - side_bytes(layout) - overhead)
        rates = class_rates(layout.histogram(), variances, bits, flat)
        if rates is None:
            return None
        if not flat and not keep_codes:
            layout = without_idle_codes(layout, int(np.flatnonzero(rates)[0]))
        classes = choose_classes(layout.histogram(), rates)
        tiles = make_tiles(classes, block)
        overhead, before = CLASS.size * len(classes) + TILE.size * len(tiles), overhead
        if overhead <= before:
            break
    left = nbytes - HEADER.size - side_bytes(layout) - overhead
    if left < 1:
        return None
    deviation = max(int(variances[c.of_class]) for c in classes)
    spending = Spending(layout, deviation // 64 + 1, classes, tiles)
    return spending._replace(tiles=share_bits(spending, rates, left)), rates


def slot_of_class(spending):
    """The position of every class among the coded ones, -1 for none: int8 [CLASSES]."""
    slots = np.full(CLASSES, -1, np.int8)
    for slot, c in enumerate(spending.classes):
        slots[c.of_class] = slot
    return slots
