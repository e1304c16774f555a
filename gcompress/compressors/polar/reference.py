"""The polar code in plain torch: the readable definition of the bytes that csrc/polar/ makes.

Rows of lanes, one block of the code a lane, as in csrc/polar/.
"""

import numpy as np
import torch

from . import outliers, turning
from .layout import CLASSES, NO_CODE, column_order
from .samples import value_tables
from .spending import class_starts, level_shares, row_classes
from .tables import ERASED, MAX_LEVELS, design_at, positions, rank

turn, turn_scales, turn_back = turning.turn, turning.scales, turning.turn_back
MAX_REPETITION, MAX_PARITY = 128, 64
WORST = 2047  # of a path's metric


def sums(values, columns, by_column):
    """Sums of |x| 2^-24 over rows and columns as float32 arrays (columns: None unless `by_column`).

    A row's in 16 interleaved sums that fold in halves, a column's from top to bottom.
    """
    rows = -(-values.numel() // columns)
    width = -(-columns // 16) * 16
    matrix = torch.nn.functional.pad(values.abs() * 2.0**-24, (0, rows * columns - values.numel())).view(rows, columns)
    parts = torch.nn.functional.pad(matrix, (0, width - columns)).view(rows, -1, 16)
    lanes = torch.zeros_like(parts[:, 0])
    for k in range(parts.shape[1]):
        lanes = lanes + parts[:, k]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    column_sums = None
    if by_column:
        column_sums = torch.zeros_like(matrix[0])
        for row in matrix:
            column_sums = column_sums + row
        column_sums = column_sums.cpu().numpy()
    return lanes[:, 0].cpu().numpy(), column_sums


def beyond(values, layout, limits, expected):
    """The places of entries whose magnitude reaches their limit: int64, rising. About `expected` are likely."""
    rows, columns = (torch.from_numpy(part).to(values.device) for part in outliers.factors(layout))
    entries = layout.rows * layout.columns
    matrix = torch.nn.functional.pad(values.abs(), (0, entries - values.numel())).view(layout.rows, layout.columns)
    return torch.nonzero((matrix >= limits.at(rows.unsqueeze(1), columns)).view(-1)[: values.numel()]).view(-1)


def energies(values, layout, scales):
    """Per class the sum of squares of its entries, each times its class's scale and rounded: int64."""
    entries, classes = _order(layout, values.device)
    scaled = values[entries] * torch.from_numpy(scales).to(values.device)[classes]
    squares = torch.round(scaled.clamp(-32767, 32767)).to(torch.int64).square()
    totals = torch.zeros(CLASSES, dtype=torch.int64, device=values.device)
    return totals.index_add_(0, classes, squares).cpu().numpy()


def gather(values, spending, scales):
    """Samples, int8, in the order of the tiles; those of padding do not matter to the code."""
    entries, classes = _order(spending.layout, values.device)
    starts, size = class_starts(spending)
    samples = torch.zeros(size, dtype=torch.int8, device=values.device)
    levels = torch.tensor([c.levels for c in spending.classes] + [1])[_slots(spending)]
    samples[levels.to(samples.device) > 1] = ERASED
    for c, start, scale in zip(spending.classes, starts, scales.tolist(), strict=True):
        scaled = values[entries[classes == c.of_class]] * scale
        samples[start : start + c.count] = torch.round(scaled.clamp(-127, 127)).to(torch.int8)
    return samples


def scatter(values, spending, out, add):
    """The inverse of `gather`: decoded values back to their entries, 0 to those that are not coded."""
    entries, classes = _order(spending.layout, values.device)
    result = torch.zeros_like(out)
    for c, start in zip(spending.classes, class_starts(spending)[0], strict=True):
        result[entries[classes == c.of_class]] = values[start : start + c.count]
    out.add_(result) if add else out.copy_(result)


def _order(layout, device):
    """Entries row by row, columns in falling order of their codes, and the entries' classes."""
    rows = np.full(layout.rows, NO_CODE) if layout.row_codes is None else layout.row_codes.astype(np.int64)
    order, columns = np.arange(layout.columns), np.full(layout.columns, NO_CODE)
    if layout.column_codes is not None:
        order = column_order(layout)
        columns = layout.column_codes[order].astype(np.int64)
    classes = np.where((rows[:, None] > 0) & (columns > 0), rows[:, None] + columns, 0).ravel()
    entries = (np.arange(layout.rows)[:, None] * layout.columns + order).ravel()
    real = entries < layout.numel
    return torch.from_numpy(entries[real]).to(device), torch.from_numpy(classes[real]).to(device)


def _slots(spending):
    """Per entry of the tiles the position of its class, the number of classes for padding rows."""
    slots = row_classes(spending).astype(np.int64)
    slots[slots == 255] = len(spending.classes)
    lanes = np.repeat([tile.lanes for tile in spending.tiles], [tile.rows for tile in spending.tiles])
    return torch.from_numpy(np.repeat(slots, lanes))


def encode(values, spending, scales, list_size):
    """`encode_samples` of what `gather` makes of the values."""
    return encode_samples(gather(values, spending, scales), spending, list_size)


def encode_samples(samples, spending, list_size):
    """(words as uint8, products): the tiles' information bits, and per class <samples, reproduction>
    and, with more than one level, |reproduction|^2, as integers.
    """
    words, start = [], 0
    slots = _slots(spending).to(samples.device)
    labels = torch.empty(samples.shape, dtype=torch.int64, device=samples.device)
    for tile, shares in zip(spending.tiles, level_shares(spending), strict=True):
        place = slice(start, start + tile.rows * tile.lanes)
        found, information = _encode_tile(
            samples[place].view(tile.rows, -1), slots[place], tile, shares, spending, list_size
        )
        labels[place] = found.view(-1)
        words.append(_to_bytes(information))
        start = place.stop
    products = []
    for slot, c in enumerate(spending.classes):
        mine = (slots == slot) & ((samples != ERASED) | (c.levels == 1))
        points = torch.from_numpy(design_at(c.design).points.astype(np.int64)).to(samples.device)[labels[mine]]
        products.append((int((samples[mine] * points).sum()), int((points * points).sum())))
    return torch.cat(words), products


def _encode_tile(samples, slots, tile, shares, spending, list_size):
    """Labels int64 [rows, lanes] and the information bits of all levels [words, lanes], bool."""
    order, position = _order_of_rows(tile, samples.device)
    labels, information = torch.zeros(samples.shape, dtype=torch.int64, device=samples.device), []
    for level, share in enumerate(shares):
        inputs = samples.to(torch.int16)
        if len(shares) > 1:
            inputs = _level_inputs(samples.view(-1), labels.view(-1), slots, level, spending).view(tile.rows, -1)
        shuffled = torch.empty_like(inputs)
        shuffled[position] = inputs
        if list_size > 1 and len(shares) < MAX_LEVELS:
            code = _encode_list(shuffled, order, share, list_size)
        else:
            code = _encode_node(shuffled, order, share)
        labels |= code[position].to(torch.int64) << level
        information.append(transform(code)[order < share])
    return labels, torch.cat(information)


def _order_of_rows(tile, device):
    tables = rank(tile.rows, tile.real), positions(tile.rows)
    return [torch.from_numpy(table.astype(np.int64)).to(device) for table in tables]


def _level_inputs(samples, labels, slots, level, spending):
    """The log-likelihood ratios of a level's bits, given the lower ones: int16, 0 in padding rows."""
    inputs = torch.zeros(samples.shape, dtype=torch.int16, device=samples.device)
    for slot, c in enumerate(spending.classes):
        mine = slots == slot
        first = 256 * ((1 << level) - 1)
        if c.levels == MAX_LEVELS:  # the sample's own bits
            inputs[mine] = 1 - 2 * (samples[mine] >> level & 1).to(torch.int16)
        elif bool(mine.any()):
            table = torch.from_numpy(design_at(c.design).tables[first : first + (256 << level)]).to(samples.device)
            inputs[mine] = table[256 * labels[mine] + (samples[mine].to(torch.int64) & 255)].to(torch.int16)
    return inputs


def _encode_node(ratios, rank, free):
    """Successive cancellation by min-sum: the bool codeword for int16 log-likelihoods [n, lanes].

    `rank` is this subtree's part of the order; positions of rank below `free` carry information.
    """
    size, count = ratios.shape[0], int((rank < free).sum())
    if count == 0:
        return torch.zeros(ratios.shape, dtype=torch.bool, device=ratios.device)
    if count == size:
        return ratios < 0
    if count == 1 and size <= MAX_REPETITION and rank[-1] < free:
        return (ratios.sum(0, keepdim=True, dtype=torch.int32) < 0).expand_as(ratios)
    if count == size - 1 and 4 <= size <= MAX_PARITY and rank[0] >= free:
        return _single_parity(ratios)
    half = size // 2
    upper, lower = ratios[:half], ratios[half:]
    if (rank[:half] >= free).all():
        right = _encode_node(_saturated(lower + upper), rank[half:], free)
        return torch.cat([right, right])
    left = _encode_node(_check_node(upper, lower), rank[:half], free)
    right = _encode_node(_saturated(torch.where(left, lower - upper, lower + upper)), rank[half:], free)
    return torch.cat([left ^ right, right])


def _saturated(values):
    return values.clamp(-128, 127)


def _check_node(a, b):
    return torch.maximum(torch.minimum(a, b), _saturated(-torch.maximum(a, b)))


def _single_parity(ratios):
    """Wagner's rule: hard decisions; where their parity is odd the first least reliable one flips."""
    code = ratios < 0
    odd = code.sum(0, keepdim=True) % 2 == 1
    magnitude = ratios.abs().clamp(max=127)
    weakest = magnitude == magnitude.amin(0, keepdim=True)
    return code ^ (odd & weakest & (weakest.cumsum(0) == 1))


def _encode_list(ratios, rank, free, list_size):
    """As `_encode_node`, keeping the best candidates ("paths") of every block.

    A path's metric is the sum of |ratios| over its decisions against the sign of ratios, relative to the
    best path of its block and at most WORST. The best path at the end is the codeword.
    """
    metric = torch.full((ratios.shape[1], list_size), WORST, dtype=torch.int32, device=ratios.device)
    metric[:, 0] = 0
    paths = ratios.unsqueeze(2).expand(-1, -1, list_size)
    code, _, metric = _list_node(paths, rank, free, metric)
    numbered = metric * list_size + torch.arange(list_size, dtype=torch.int32, device=ratios.device)
    return _taken(code, numbered.argmin(1, keepdim=True)).squeeze(2)


def _list_node(ratios, rank, free, metric):
    """(codewords, source, metrics) for log-likelihoods [n, lanes, paths]: path j was path source[:, j] before."""
    size, count = ratios.shape[0], int((rank < free).sum())
    same = torch.arange(ratios.shape[2], device=ratios.device).expand(metric.shape)
    if count == 0:
        for part in (-ratios).clamp(0, 127).split(MAX_REPETITION):
            metric = _penalized(metric, part.sum(0, dtype=torch.int32))
        return torch.zeros(ratios.shape, dtype=torch.bool, device=ratios.device), same, metric
    if count == size and size <= MAX_REPETITION:
        return _list_free(ratios, metric)
    if count == 1 and size <= MAX_REPETITION and rank[-1] < free:
        total = ratios.sum(0, dtype=torch.int32)
        against = (-ratios).clamp(0, 127).sum(0, dtype=torch.int32)
        metric = _penalized(metric, against + total.clamp(max=0))
        metric, source, paid = _split(metric, total.abs())
        return ((total < 0).gather(1, source) ^ paid).expand_as(ratios), source, metric
    if count == size - 1 and 4 <= size <= MAX_PARITY and rank[0] >= free:
        return _list_parity(ratios, metric)
    half = size // 2
    left, source, metric = _list_node(_check_node(ratios[:half], ratios[half:]), rank[:half], free, metric)
    upper, lower = _taken(ratios[:half], source), _taken(ratios[half:], source)
    inputs = _saturated(torch.where(left, lower - upper, lower + upper))
    right, second, metric = _list_node(inputs, rank[half:], free, metric)
    return torch.cat([_taken(left, second) ^ right, right]), source.gather(1, second), metric


def _list_free(ratios, metric):
    """Hard decisions, or those with the first least reliable one changed."""
    weakest, places = ratios.abs().clamp(max=127).sort(dim=0, stable=True)
    metric, source, paid = _split(metric, weakest[0].to(torch.int32))
    code = _taken(ratios < 0, source)
    return _changed(code, places[0].gather(1, source), paid), source, metric


def _list_parity(ratios, metric):
    """Wagner's rule, or that with the two least reliable bits both changed."""
    weakest, places = ratios.abs().clamp(max=127).sort(dim=0, stable=True)
    first, second = weakest[:2].to(torch.int32)
    odd = (ratios < 0).sum(0) % 2 == 1
    metric, source, paid = _split(_penalized(metric, first * odd), torch.where(odd, second - first, second + first))
    code = _changed(_taken(ratios < 0, source), places[0].gather(1, source), odd.gather(1, source) ^ paid)
    return _changed(code, places[1].gather(1, source), paid), source, metric


def _taken(values, source):
    return values.gather(2, source.expand(len(values), -1, -1))


def _changed(code, row, where):
    """`code` with the bit of a path in its `row` changed `where` that is True."""
    rows = torch.arange(len(code), device=code.device).view(-1, 1, 1)
    return code ^ ((rows == row) & where)


def _penalized(metric, penalty):
    metric = metric + penalty
    return (metric - metric.amin(1, keepdim=True)).clamp(max=WORST)


def _split(metric, price):
    """Every path goes on as it is or pays: (metrics, sources, whether they paid) of the best, best first.

    Of equal candidates those come first that do not pay, then those of the lower number.
    """
    paths = metric.shape[1]
    candidates = torch.cat([metric, (metric + price).clamp(max=WORST)], 1)
    metric, chosen = candidates.sort(dim=1, stable=True)
    return metric[:, :paths], chosen[:, :paths] % paths, chosen[:, :paths] >= paths


def transform(bits):
    """The polar transform along the first dimension; its own inverse."""
    size, half = bits.shape[0], 1
    while half < size:
        pairs = bits.reshape(size // (2 * half), 2, half, -1)
        bits = torch.stack([pairs[:, 0] ^ pairs[:, 1], pairs[:, 1]], 1).view(size, -1)
        half *= 2
    return bits


def _to_bytes(bits):
    """bool [words, lanes] to uint8, bit j of a word from lane j, bytes low first."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.reshape(-1, 8).to(torch.uint8) * weights).sum(1, dtype=torch.uint8)


def decode(words, spending, out, add):
    """Decode all tiles, one after the other, to the float32 vector `out`, which may be shorter; with `add`, add."""
    tables = torch.from_numpy(value_tables(spending)).to(words.device)
    slots = _slots(spending).clamp(max=len(spending.classes) - 1).to(words.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    start = 0
    for tile, shares in zip(spending.tiles, level_shares(spending), strict=True):
        bits = (words[: tile.nbytes].unsqueeze(1) >> shifts & 1).bool().view(-1, tile.lanes)
        words = words[tile.nbytes :]
        labels = _decode_labels(bits, tile, shares).view(-1)
        target = out[start : start + len(labels)]
        values = tables[slots[start : start + len(target)], labels[: len(target)]]
        target.add_(values) if add else target.copy_(values)
        start += len(labels)


def _decode_labels(bits, tile, shares):
    order, position = _order_of_rows(tile, bits.device)
    labels, first = torch.zeros((tile.rows, bits.shape[1]), dtype=torch.int64, device=bits.device), 0
    for level, share in enumerate(shares):
        spread = torch.zeros(labels.shape, dtype=torch.bool, device=bits.device)
        spread[order < share] = bits[first : first + share]
        labels |= transform(spread)[position].to(torch.int64) << level
        first += share
    return labels
