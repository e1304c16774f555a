"""How the bytes of a polar payload are spent: scales, water level, groups of entries, tiles.

An entry's variance is modelled as the product of its row's and its column's, each sent as a
code of a quarter octave of amplitude. Entries of about the same variance are coded together,
and reverse water-filling gives every variance its rate: half the logarithm of variance over
water level, nothing below it. All decisions are integers, or doubles combined in a fixed order,
so that every machine and backend plans alike; the decoder reads what it needs from the payload.
"""

import functools
import math
import struct
from typing import NamedTuple

import numpy as np

from .tables import (  # fmt: skip
    MAX_LEVELS,
    POINT_ONE,
    SAMPLE_STEPS,
    SIGN_STEPS,
    SMALLEST_BLOCK,
    design_at,
    design_index,
    levels_for,
    octave_codes,
    power_of_two,
    powers_of_two,
)

# flags, coded classes, base (octaves), columns, and for rows and for columns bits of a code and the smallest code.
HEADER = struct.Struct("<BBhIBBBB")
CLASS = struct.Struct("<BBe")  # class, design, amplitude in 2^base
TILE = struct.Struct("<H")  # words
NOT_FINITE, ROWS, COLUMNS, APART, TURNED, PRODUCT = 1, 2, 4, 8, 16, 32
SMALLEST_PAYLOAD = HEADER.size + CLASS.size + 2 * TILE.size + 8

LARGEST = float(np.finfo(np.float32).max)
CODES = 63  # of a row or column; 0: below everything that is coded
CLASSES = 2 * CODES + 1
NO_CODE = 1  # stands for a factor that is not sent
LOWEST_RATE = 2  # 1/64 bit: classes with less are not coded
PLAIN_RATE = 384  # 1/64 bit: classes of more are sent as plain samples of eight bits
PLAIN_COST = 512
LEAST_GAIN = 0.96  # finer scales must lower the modelled error to this: less is the noise of their estimates
NEARLY_ALL = 4063  # of 4096
STRETCH = 8192  # of a long array: what numpy makes on the way stays in the caches
LONG_ENOUGH = 1024  # rows, of which longer blocks are made only when all lanes are in use
# Classes that share one code, by its levels: with one level there is no loss in it, with more some.
MIXED = {1: 64, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 64}


class Layout(NamedTuple):
    """A matrix of `numel` entries in rows of `columns`, and the class of every entry."""

    numel: int
    columns: int
    row_codes: np.ndarray | None  # [rows] uint8, or None
    column_codes: np.ndarray | None  # [columns] uint8, or None

    @property
    def rows(self):
        return -(-self.numel // self.columns)

    def row_histogram(self):
        """Entries per row code, if every column counted: int64 [64]."""
        if self.row_codes is None:
            histogram = np.zeros(CODES + 1, np.int64)
            histogram[NO_CODE] = self.numel
            return histogram
        histogram = np.bincount(self.row_codes, minlength=CODES + 1) * self.columns
        histogram[self.row_codes[-1]] -= self.rows * self.columns - self.numel
        return histogram

    def histogram(self):
        """Entries per class, those with a code 0 left out: int64 [CLASSES]."""
        rows = self.row_histogram()
        rows[0] = 0
        if self.column_codes is None:
            return np.concatenate(
                [np.zeros(NO_CODE, np.int64), rows, np.zeros(CLASSES - NO_CODE - CODES - 1, np.int64)]
            )
        columns = np.bincount(self.column_codes, minlength=CODES + 1)
        columns[0] = 0
        return np.convolve(rows // self.columns, columns)  # with column codes all rows are full


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


# Water-filling -----------------------------------------------------------------------------


def water_level(counts, variances, bits):
    """The level, in 1/64 bit, above which half-logarithmic variances cost `bits` bits; None if none fits."""
    order = np.argsort(-variances, kind="stable")
    order = order[counts[order] > 0]
    if len(order) == 0 or bits <= 0:
        return None
    members = np.cumsum(counts[order])
    levels = (np.cumsum(counts[order] * variances[order]) - 64 * bits) // members
    fits = np.flatnonzero(variances[order] - levels >= LOWEST_RATE)
    return int(levels[fits[-1]]) if len(fits) else None


def class_rates(counts, variances, bits, flat):
    """Rates in 1/64 bit per entry of all classes, 0 for those not coded; None if nothing can be coded.

    Args:
        counts: entries per class.
        variances: logarithms of a class's variance in 1/32 octaves, of deviation in 1/64 bit.
        bits: to be spent.
        flat: the same rate for all.
    """
    if flat:
        total = int(counts.sum())
        return np.where(counts > 0, max(1, 64 * bits // total), 0) if total and bits > 0 else None
    water = water_level(counts, variances, bits)
    if water is None:
        return None
    plain = (variances - water > PLAIN_RATE) & (counts > 0)
    if plain.any():  # they cost more than their rate
        left = bits - 8 * int(counts[plain].sum())
        lower = water_level(np.where(plain, 0, counts), variances, left)
        plain, water = (plain, lower) if lower is not None else (plain & False, water)
    rates = np.where(plain, PLAIN_COST, np.minimum(variances - water, PLAIN_RATE))
    return np.where((rates >= LOWEST_RATE) & (counts > 0), rates, 0)


def modelled_error(counts, variances, rates):
    """The squared error of ideal codes."""
    return math.fsum((counts * powers_of_two(2 * (variances - rates))).tolist())


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


# Scales ------------------------------------------------------------------------------------


def _scale_codes(means):
    """Codes of a quarter octave, the largest at CODES; 0 for those far below it and for means of 0."""
    offset = int(octave_codes(np.maximum(means.max(keepdims=True), 1e-300), 4)[0]) - CODES
    codes = np.empty(len(means), np.uint8)
    for first in range(0, len(means), STRETCH):
        part = means[first : first + STRETCH]
        logarithms = octave_codes(np.maximum(part, 1e-300), 4)
        logarithms -= offset
        codes[first : first + STRETCH] = np.maximum(logarithms, 0, out=logarithms)
    codes[means <= 0] = 0
    return codes


def candidate_layouts(numel, columns, row_sums, column_sums):
    """Layouts from the plainest to the finest; sums are of |x| over rows and columns, as float32."""
    yield Layout(numel, numel, None, None)
    if row_sums is None:
        return
    counts = np.full(len(row_sums), columns, np.float64)
    counts[-1] = numel - columns * (len(row_sums) - 1)
    row_codes = _scale_codes(row_sums.astype(np.float64) / counts)
    yield Layout(numel, columns, row_codes, None)
    if column_sums is not None:
        column_codes = _scale_codes(column_sums.astype(np.float64))
        yield Layout(numel, columns, None, column_codes)
        yield Layout(numel, columns, row_codes, column_codes)


def choose_layout(layouts, nbytes, flat):
    """(the layout with the least modelled error, that error), all judged by the finest one's variances.

    The error is in squares of what code 0 of the finest layout stands for. (None, infinity) if nothing fits.
    """
    finest = layouts[-1]
    row_power, column_power = _mean_power(finest.row_codes), _mean_power(finest.column_codes)
    best, least = None, math.inf
    for layout in layouts:
        error = error_model(layout, flat)[0](8 * nbytes)
        error *= row_power if layout.row_codes is None else 1.0  # a factor that is not sent has its mean power
        error *= column_power if layout.column_codes is None else 1.0
        if error < least * (LEAST_GAIN if best else 1.0):
            best, least = layout, error
    return best, least


def error_model(layout, flat):
    """(the function from a payload's bits to the modelled error, the modelled energy), by the scale codes alone.

    Both are in squares of what code 0 stands for; the error is infinite where nothing fits.
    """
    counts, variances = layout.histogram(), 16 * np.arange(CLASSES)
    overhead = 8 * (HEADER.size + CLASS.size + TILE.size + side_bytes(layout))

    def error(bits):
        rates = class_rates(counts, variances, int(bits) - overhead, flat)
        return math.inf if rates is None else modelled_error(counts, variances, rates)

    return error, modelled_error(counts, variances, np.zeros(CLASSES, np.int64))


def _mean_power(codes):
    """The mean variance of rows or columns, relative to that which NO_CODE stands for."""
    if codes is None:
        return 1.0
    counts = np.bincount(codes).tolist()
    return math.fsum(count * power_of_two(32 * (k - NO_CODE)) for k, count in enumerate(counts) if k) / len(codes)


def column_order(layout):
    """Columns in falling order of their codes, equal ones from left to right; None without column codes."""
    return None if layout.column_codes is None else np.argsort(-layout.column_codes.astype(np.int64), kind="stable")


def side_bytes(layout):
    """Bytes of the packed scale codes."""
    return sum(
        -(-len(codes) * code_form(codes)[0] // 8)
        for codes in (layout.row_codes, layout.column_codes)
        if codes is not None
    )


def code_form(codes):
    """(bits of a packed code, the smallest code that is not 0); 0 is packed as 0."""
    used = codes[codes > 0]
    if len(used) == 0:
        return 0, 0
    low = int(used.min())
    return (int(used.max()) - low + 1).bit_length(), low


def without_idle_codes(layout, floor):
    """The layout with codes 0 where a row or column lies below the class `floor` throughout."""
    row_codes, column_codes = layout.row_codes, layout.column_codes
    if row_codes is not None:
        best = NO_CODE if column_codes is None else int(column_codes.max())
        row_codes = np.where(row_codes + np.int64(best) >= floor, row_codes, 0).astype(np.uint8)
    if column_codes is not None:
        best = NO_CODE if row_codes is None else int(row_codes.max())
        column_codes = np.where(column_codes + np.int64(best) >= floor, column_codes, 0).astype(np.uint8)
    return layout._replace(row_codes=row_codes, column_codes=column_codes)


# Samples -----------------------------------------------------------------------------------


def sample_scales(spending, variances, rates):
    """By what an entry of every coded class is multiplied to become a sample: float32.

    With several levels a standard deviation is SAMPLE_STEPS. With one, samples are in
    proportion to the log-likelihood ratio of an entry against the optimal reproduction, whose
    deviation is the root of variance less water level; their root mean square is SIGN_STEPS.
    """
    scales, power, members = [], 0.0, 0
    for c in spending.classes:
        deviation = power_of_two(int(variances[c.of_class]))
        scale = SAMPLE_STEPS / deviation
        if c.levels == 1:
            rate = int(rates[c.of_class])
            relative = math.sqrt(max(power_of_two(2 * rate) - 1.0, 0.0)) / power_of_two(rate)
            scale = relative
            power += c.count * (relative * deviation) ** 2
            members += c.count
        scales.append(scale)
    gain = SIGN_STEPS / math.sqrt(power / members) if members else 1.0
    return np.array(
        [s * gain if c.levels == 1 else s for s, c in zip(scales, spending.classes, strict=True)], np.float32
    )


def with_amplitudes(spending, scales, products):
    """The classes with the factors of least error, from <sample, reproduction> and |reproduction|^2 in integers."""
    classes = []
    for c, scale, (dot, norm) in zip(spending.classes, scales.tolist(), products, strict=True):
        norm = float(c.count) if c.levels == 1 else int(norm) / POINT_ONE
        amplitude = int(dot) / (scale * norm) if norm else 0.0
        relative = math.ldexp(amplitude, -spending.base)
        classes.append(c._replace(amplitude=float(np.float16(min(max(relative, 0.0), 6e4)))))
    return spending._replace(classes=classes)


def value_tables(spending):
    """What the labels of every coded class decode to: float32 [classes, 2^MAX_LEVELS]."""
    tables = np.zeros((len(spending.classes), 1 << MAX_LEVELS), np.float32)
    for table, c in zip(tables, spending.classes, strict=True):
        points = design_at(c.design).points.astype(np.float64)
        values = np.ldexp(points * c.amplitude, spending.base) / (1 if c.levels == 1 else POINT_ONE)
        table[: len(points)] = np.clip(values, -LARGEST, LARGEST)
    return tables


def slot_of_class(spending):
    """The position of every class among the coded ones, -1 for none: int8 [CLASSES]."""
    slots = np.full(CLASSES, -1, np.int8)
    for slot, c in enumerate(spending.classes):
        slots[c.of_class] = slot
    return slots
