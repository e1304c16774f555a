// Polar: decoding a tile, which needs words alone and so goes by positions.
#ifndef GCOMPRESS_POLAR_DECODER_H
#define GCOMPRESS_POLAR_DECODER_H

#include "tile.h"

namespace {

const int64_t STREAM_BYTES = 1 << 25;

template <int mode>
inline void put_values(float* out, Floats value) {
    if (mode == ADD) value = load_floats(out) + value;
    if (mode == SUBTRACT) value = load_floats(out) - value;
    if (mode == STREAM)
        stream_floats(out, value);
    else
        store_floats(out, value);
}

// out[j] (+, -)= a where bit j is 0, -a where it is 1.
template <int mode>
inline void write_signs(uint64_t word, float a, float* out) {
    const Floats plus = every_float(a);
    for (int j = 0; j < LANES; j += WIDE) put_values<mode>(out + j, negate_by_bits(word >> j, plus));
}

// out[j] (+, -)= table[label j], for labels of up to five bits by vectors.
template <int mode>
inline void write_points(Bytes labels, const float* table, int levels, float* out) {
    uint8_t bytes[LANES];
    store_bytes((int8_t*)bytes, labels);
    if (levels > 5 && mode == SUBTRACT) {
        float values[LANES];
        look_up_64<false>(bytes, table, true, values);
        for (int j = 0; j < LANES; ++j) out[j] -= values[j];
        return;
    }
    if (levels > 5) return look_up_64 < mode == ADD > (bytes, table, true, out);
    const PointTable points = load_points(table);
    for (int j = 0; j < LANES; j += WIDE) put_values<mode>(out + j, looked_up(points, bytes + j, levels));
}

// A codeword from words of that many bytes for its information bits; returns their end. Without a branch: where there is
// none, the next one or the last is read in vain.
template <int bytes>
inline const uint8_t* read_codeword(const uint8_t* words, const uint16_t* rank, int rows, int free, uint64_t* code) {
    if (free == 0) {
        memset(code, 0, (size_t)rows * sizeof *code);
        return words;
    }
    const uint8_t* last = words + bytes * (free - 1);
    for (int i = 0; i < rows; i += 8) {
        uint64_t w[8];
        for (int k = 0; k < 8; ++k) {
            const uint64_t carries = rank[i + k] < free;
            uint64_t word = 0;
            memcpy(&word, words < last ? words : last, bytes);
            w[k] = word & (0 - carries);
            words += bytes * carries;
        }
        transform_eight(w);
        memcpy(code + i, w, sizeof w);
    }
    transform_beyond_eight(code, rows);
    return words;
}

// Values of 64 lanes of the row at a position, from the bits of all levels: code[level][rows].
template <int mode>
inline void write_row(const uint64_t* code, int rows, int levels, const float* table, float* out) {
    if (levels == 1) return write_signs<mode>(code[0], table[0], out);
    write_points<mode>(label_of(code, rows, levels), table, levels, out);
}

// Decodes one tile, at most `count` entries of it; returns the end of its words.
template <int mode>
const uint8_t* polar_decode_tile(const uint8_t* words, const PolarTile* tile, const uint8_t* slots, const float* values,
                                 uint64_t* code, int64_t count, float* out) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    for (int level = 0; level < levels; ++level) {
        uint64_t* mine = code + level * rows;
        const int free = (int)tile->free[level];
        words = lanes == LANES ? read_codeword<8>(words, rank, rows, free, mine)
                : lanes == 32  ? read_codeword<4>(words, rank, rows, free, mine)
                : lanes == 16  ? read_codeword<2>(words, rank, rows, free, mine)
                               : read_codeword<1>(words, rank, rows, free, mine);
    }
    for (int i = 0; i < rows && lanes * (int64_t)i < count; ++i) {
        if (slots[i] == PADDING_ROW) break;
        const int64_t left = min64(lanes, count - lanes * (int64_t)i);
        const float* table = values + ((int64_t)slots[i] << MAX_LEVELS);
        float* target = out + lanes * (int64_t)i;
        if (left == LANES) {
            write_row<mode>(code + positions[i], rows, levels, table, target);
        } else {
            float row[LANES];
            write_row<REPLACE>(code + positions[i], rows, levels, table, row);
            for (int64_t j = 0; j < left; ++j) target[j] = put_value<mode>(target[j], row[j]);
        }
    }
    return words;
}

}  // namespace
#endif
