// Polar: what the encoder of a level starts from, its log-likelihoods, by the samples and the bits of the levels below.
#ifndef GCOMPRESS_POLAR_LEVELS_H
#define GCOMPRESS_POLAR_LEVELS_H

#include "lanes.h"

namespace {

// The labels of a row from their bits, the first at `bits` and the next ones `stride` further.
inline Bytes label_of(const uint64_t* bits, int stride, int levels) {
    Bytes label = zero_bytes();
    for (int k = levels - 1; k >= 0; --k) label = doubled_plus(label, signs_of(bits[k * stride]));
    return label;
}

// Labels of rows from … to - 1 of a tile, a byte each, from their bits: words[level][row].
inline void labels_of(const uint64_t* words, int rows, int levels, int from, int to, int lanes, int8_t* labels) {
    for (int i = from; i < to; ++i) store_lanes(labels + lanes * (i - from), label_of(words + i, rows, levels), lanes);
}

// Log-likelihoods of a level, from its table of [2^level prefixes][256 sample values]. All bits of a label of the negative
// sample are those of the sample inverted, so the tables' halves for samples >= 0 are enough: the rest is
// table[prefix][x] = -table[~prefix][-x], and 0 for ERASED.
const int CHUNK_ROWS = 64;
template <int level>
struct Prefix {
    GC_TABLES static inline Bytes look_up(const Table128* table, Bytes magnitude, const Signs* prefix) {
        const Bytes zero = Prefix<level - 1>::look_up(table, magnitude, prefix);
        const Bytes one = Prefix<level - 1>::look_up(table + (1 << (level - 1)), magnitude, prefix);
        return choose(prefix[level - 1], one, zero);
    }
};
template <>
struct Prefix<0> {
    GC_TABLES static inline Bytes look_up(const Table128* table, Bytes magnitude, const Signs*) {
        return looked_up(*table, magnitude);
    }
};
template <int level>
GC_TABLES void level_inputs_by_tables(const int8_t* samples, int rows, int from, int to, int lanes, const int8_t* table,
                                      const uint64_t* words, Bytes* l) {
    Table128 tables[1 << level];  // in registers, if there are few
    for (int k = 0; k < 1 << level; ++k) tables[k] = load_table_128(table + 256 * k);
    for (int i = from; i < to; ++i) {
        const Bytes x = load_lanes(samples + lanes * i, lanes);
        const Signs minus = negative(x);
        Signs prefix[MAX_LEVELS];
        for (int k = 0; k < level; ++k) prefix[k] = exclusive_or(signs_of(words[k * rows + i]), minus);
        const Bytes found = Prefix<level>::look_up(tables, magnitude_to_128(x), prefix);
        l[i] = negated_samples(found, minus, x);
    }
}
inline bool level_inputs_by_vectors(const int8_t* samples, int rows, int from, int to, int lanes, int level,
                                    const int8_t* table, const uint64_t* words, Bytes* l) {
    if (level >= TABLE_LEVELS || !has_tables()) return false;
    switch (level) {
        case 0: return level_inputs_by_tables<0>(samples, rows, from, to, lanes, table, words, l), true;
        case 1: return level_inputs_by_tables<1>(samples, rows, from, to, lanes, table, words, l), true;
        case 2: return level_inputs_by_tables<2>(samples, rows, from, to, lanes, table, words, l), true;
        case 3: return level_inputs_by_tables<3>(samples, rows, from, to, lanes, table, words, l), true;
        default: return level_inputs_by_tables<4>(samples, rows, from, to, lanes, table, words, l), true;
    }
}

// inputs[j] = table[256 labels[j] + samples[j] as a byte], for 64 of them: places by vectors, loads one by one.
inline void look_up_samples(const int8_t* table, const int8_t* samples, const int8_t* labels, int8_t* inputs) {
    uint16_t places[LANES];
    interleave_bytes(load_bytes(samples), load_bytes(labels), places);
    for (int j = 0; j < LANES; j += 8) {
        uint64_t eight = 0;
        for (int k = 0; k < 8; ++k) eight |= (uint64_t)(uint8_t)table[places[j + k]] << (8 * k);  // unrolled
        store(inputs + j, eight);
    }
}

// Inputs of a level of rows from … to - 1, at most CHUNK_ROWS. A tile of 2 … 7 levels is of one class, whose tables these
// are; one of 8 has none: its labels are the samples.
inline void level_inputs(const int8_t* samples, int rows, int from, int to, int lanes, int level, const uint8_t* slots,
                         const int8_t* tables, const uint64_t* words, Bytes* l) {
    const int8_t* table = tables + 256 * ((1 << level) - 1);
    if (tables && level_inputs_by_vectors(samples, rows, from, to, lanes, level, table, words, l)) return;
    int8_t labels[CHUNK_ROWS * LANES];
    if (tables) labels_of(words, rows, level, from, to, lanes, labels);
    for (int i = from; i < to; ++i) {
        int8_t inputs[LANES] = {0};
        const int8_t *sample = samples + lanes * i, *label = labels + lanes * (i - from);
        if (slots[i] == PADDING_ROW) {
        } else if (!tables) {
            for (int j = 0; j < lanes; ++j) inputs[j] = (int8_t)(1 - 2 * (sample[j] >> level & 1));
        } else if (lanes == LANES) {
            look_up_samples(table, sample, label, inputs);
        } else {
            for (int j = 0; j < lanes; ++j) inputs[j] = table[256 * (int)label[j] + (uint8_t)sample[j]];
        }
        l[i] = load_bytes(inputs);
    }
}

}  // namespace
#endif
