// Polar: encoding a tile, blocks of one length side by side with all their levels.
#ifndef GCOMPRESS_POLAR_TILE_H
#define GCOMPRESS_POLAR_TILE_H

#include "encoder.h"
#include "levels.h"
#include "list.h"

namespace {

// One tile's part of the plan that Python makes (gcompress/compressors/polar/spending.py).
struct PolarTile {
    int64_t rows, lanes;       // block length N, blocks side by side: 8, 16, 32 or 64
    int64_t levels;            // label bits m
    int64_t rank, positions;   // addresses of uint16 [N]: a position's rank, where a row goes
    int64_t free[MAX_LEVELS];  // information bits a block of every level
};

// The design of a class: addresses of its tables [1 + 2 + … + 2^(m-1)][256] and of its 2^m points.
struct PolarDesign {
    int64_t tables, points;
};

// What the subtree types of a level in the workspace are of: the next tile's are mostly the same.
struct PolarTyped {
    const uint16_t* rank;
    int rows, free;
};

// What encoding a tile needs besides.
struct PolarWorkspace {
    Bytes *inputs, *scratch, *list;  // list: 3 MAX_BLOCK, shared with parts
    Signs *code, *parts;
    int8_t* samples;
    uint64_t *words, *information;  // words: [MAX_LEVELS][rows]
    uint8_t* types;                 // [MAX_LEVELS][2 MAX_BLOCK]
    PolarTyped* typed;              // [MAX_LEVELS]
};

inline PolarWorkspace polar_workspace(uint8_t* memory) {
    memory = (uint8_t*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    PolarWorkspace work;
    work.inputs = (Bytes*)memory;
    work.scratch = (Bytes*)(memory + LANES * MAX_BLOCK);
    work.code = (Signs*)(memory + 2 * LANES * MAX_BLOCK);
    work.list = (Bytes*)(memory + 3 * LANES * MAX_BLOCK);
    work.parts = (Signs*)work.list;
    work.samples = (int8_t*)(memory + 6 * LANES * MAX_BLOCK);
    work.words = (uint64_t*)(memory + 7 * LANES * MAX_BLOCK);
    work.information = work.words + MAX_LEVELS * MAX_BLOCK;
    work.types = (uint8_t*)(work.information + MAX_BLOCK);
    work.typed = (PolarTyped*)(work.types + 2 * MAX_LEVELS * MAX_BLOCK);
    memset(work.typed, 0, MAX_LEVELS * sizeof *work.typed);
    return work;  // (8 LANES + 25) MAX_BLOCK bytes
}

inline uint8_t* types_of(const uint16_t* rank, int rows, int level, int free, PolarWorkspace work) {
    uint8_t* types = work.types + 2 * MAX_BLOCK * level;
    PolarTyped* typed = work.typed + level;
    if (typed->rank != rank || typed->rows != rows || typed->free != free) {
        subtree_types(rank, rows, free, types);
        typed->rank = rank;
        typed->rows = rows;
        typed->free = free;
    }
    return types;
}

// Adds <samples, points of their labels> and <points, points> over the samples that matter.
inline void label_products(const int8_t* samples, const int8_t* labels, int count, const int16_t* points, int levels,
                           int64_t* products) {
    int64_t dot = 0, norm = 0;
    int j = 0;
    if (HAS_SHUFFLES && levels <= 5) {  // points of up to 32 labels by byte shuffles, their lower and upper bytes apart
        int8_t bytes[4][16] = {{0}, {0}, {0}, {0}};
        for (int k = 0; k < 1 << levels; ++k) {
            bytes[k / 16][k % 16] = (int8_t)(points[k] & 255);
            bytes[2 + k / 16][k % 16] = (int8_t)(points[k] >> 8);
        }
        Bytes parts[4];
        for (int k = 0; k < 4; ++k) parts[k] = repeat_16(bytes[k]);
        const Bytes erased = every_byte(ERASED);
        while (j + LANES <= count) {
            Dots dots = no_dots(), squares = no_dots();
            for (int part = 0; part < WIDE / 2 && j + LANES <= count; ++part, j += LANES) {  // points are below 2^13.5
                const Bytes label = load_bytes(labels + j), sample = load_bytes(samples + j);
                const Bytes index = levels == 5 ? lower_four(label) : label;
                Bytes low = shuffled(parts[0], index), high = shuffled(parts[2], index);
                if (levels == 5) {
                    const Signs upper = has_bit(label, 4);
                    low = choose(upper, shuffled(parts[1], index), low);
                    high = choose(upper, shuffled(parts[3], index), high);
                }
                const Signs absent = equal(sample, erased);
                low = cleared(low, absent);
                high = cleared(high, absent);
                dots = with_products(dots, low, high, sample, bytes_of(negative(sample)));
                squares = with_products(squares, low, high, low, high);
            }
            int32_t dot_parts[WIDE];
            uint32_t square_parts[WIDE];
            memcpy(dot_parts, &dots, sizeof dots);
            memcpy(square_parts, &squares, sizeof squares);
            for (int k = 0; k < WIDE; ++k) {
                dot += dot_parts[k];
                norm += square_parts[k];
            }
        }
    }
    for (; j < count; ++j) {
        const int32_t point = samples[j] == ERASED ? 0 : points[(uint8_t)labels[j]];
        dot += samples[j] * point;
        norm += point * point;
    }
    products[0] += dot;
    products[1] += norm;
}

// The same with one level: the sum of samples, each by the sign of its codeword's bit.
inline void sign_products(const Bytes* samples, const Signs* code, int rows, int64_t* products) {
    ByteSum sum = no_sum();
    for (int i = 0; i < rows; ++i) sum = with_bytes(sum, negate_where(samples[i], code[i]));
    products[0] += folded(sum, rows);
}

struct PolarTables {
    const int8_t* levels[PADDING_ROW];  // by slot
    const int16_t* points[PADDING_ROW];
};

// Where a tile's samples come from: they are there, or `count` entries of a vector become them, which are all of one class.
struct PolarSource {
    const int8_t* samples;
    const float* x;
    int64_t count;
    float scale;
};

// The source of the next tile, or with direction -1 of the one before.
inline void polar_pass_tile(PolarSource* source, const PolarTile* tile, int direction) {
    const int64_t entries = direction * tile->lanes * tile->rows;
    if (source->samples) source->samples += entries;
    if (source->x) source->x += entries;
    source->count -= entries;
}

inline int64_t polar_tile_bytes(const PolarTile* tile) {
    int64_t words = 0;
    for (int64_t level = 0; level < tile->levels; ++level) words += tile->free[level];
    return words * tile->lanes / 8;
}
// Row i of a tile made from entries; those beyond the last are `absent`.
inline Bytes row_of_entries(const PolarSource* source, int i, int lanes, int8_t absent) {
    const int64_t start = (int64_t)lanes * i, left = source->count - start;
    if (left >= LANES && lanes == LANES) return rounded_bytes(source->x + start, source->scale);
    float entries[LANES] = {0};
    int8_t row[LANES];
    const int64_t present = left < 0 ? 0 : left < lanes ? left : lanes;
    if (present > 0) memcpy(entries, source->x + start, (size_t)present * sizeof(float));
    store_bytes(row, rounded_bytes(entries, source->scale));
    for (int64_t j = present; j < lanes; ++j) row[j] = absent;
    return load_bytes(row);
}

// Inputs of a level in the order of the rows, chunk by chunk, of which the first steps are taken while they are in the
// nearest cache.
inline void polar_tile_inputs(const PolarSource* source, const PolarTile* tile, int level, const uint8_t* slots,
                              const int8_t* tables, int steps, PolarWorkspace work) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes;
    const int8_t* samples = source->samples ? source->samples : work.samples;
    for (int from = 0, to; from < rows; from = to) {
        to = from + CHUNK_ROWS < rows ? from + CHUNK_ROWS : rows;
        if (tile->levels == 1) {
            for (int i = from; i < to; ++i)
                work.inputs[i] =
                    source->x ? row_of_entries(source, i, lanes, 0) : load_lanes(samples + lanes * i, lanes);
        } else {
            for (int i = from; i < to && level == 0 && source->x; ++i)
                store_lanes(work.samples + lanes * i, row_of_entries(source, i, lanes, ERASED), lanes);
            level_inputs(samples, rows, from, to, lanes, level, slots, tables, work.words, work.inputs);
        }
        if (steps) take_steps(steps, Stored{work.inputs}, from, to, rows, 0, work.scratch);
    }
}

// Per class <samples, codeword> and <codeword, codeword>, for the amplitude of least error.
inline void polar_tile_products(const int8_t* samples, const PolarTile* tile, const uint8_t* slots,
                                const PolarTables* tables, PolarWorkspace work, int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    int8_t labels[CHUNK_ROWS * LANES];
    for (int i = 0, end; i < rows && slots[i] != PADDING_ROW; i = end) {
        end = i + 1;
        while (end < rows && slots[end] == slots[i]) ++end;
        int64_t* mine = products + 2 * slots[i];
        if (levels == 1) {
            sign_products(work.inputs + i, work.code + i, end - i, mine);
            continue;
        }
        for (int from = i, to; from < end; from = to) {
            to = from + CHUNK_ROWS < end ? from + CHUNK_ROWS : end;
            labels_of(work.words, rows, levels, from, to, lanes, labels);
            label_products(samples + lanes * from, labels, lanes * (to - from), tables->points[slots[i]], levels, mine);
        }
    }
}

// Writes the words of a level by its codeword alone and returns their end.
inline uint8_t* put_block(const Signs* code, const PolarTile* tile, int free, uint64_t* information, uint8_t* words) {
    const int rows = (int)tile->rows, bytes = (int)tile->lanes / 8;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    for (int i = 0; i < rows; ++i) information[i] = word_of(code[i]);
    transform(information, rows);
    for (int i = 0; i < rows; ++i) {
        store(words, information[positions[i]]);
        words += rank[i] < free ? bytes : 0;
    }
    return words;
}

// Writes a tile's words and returns their end. `slots` gives every row's class.
inline uint8_t* polar_encode_tile(const PolarSource* source, const PolarTile* tile, const uint8_t* slots,
                                  const PolarTables* tables, int list_size, PolarWorkspace work, uint8_t* words,
                                  int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    const bool list = list_size > 1 && levels < MAX_LEVELS;
    for (int level = 0; level < levels; ++level) {
        const int free = (int)tile->free[level];
        const uint8_t* types = types_of(rank, rows, level, free, work);
        const int steps = list || rows <= 64 ? 0 : steps_ahead(types, 1);
        polar_tile_inputs(source, tile, level, slots, tables->levels[slots[0]], steps, work);
        if (list) {
            list_encode_block(rows, lanes, list_size, types, positions, work.inputs, work.code, work.list);
            words = put_block(work.code, tile, free, work.information, words);
        } else {
            Output out = {words, lanes / 8, rows, positions, work.information};
            encode_block(rows, types, work.inputs, steps, work.code, work.scratch, work.parts, &out);
            words = out.at;
        }
        for (int i = 0; i < rows && levels > 1; ++i) work.words[level * rows + i] = word_of(work.code[i]);
    }
    polar_tile_products(source->samples ? source->samples : work.samples, tile, slots, tables, work, products);
    return words;
}

}  // namespace
#endif
