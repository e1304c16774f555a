// Polar: decoding a tile, which needs words alone and so goes by positions.
#ifndef GCOMPRESS_POLAR_DECODER_H
#define GCOMPRESS_POLAR_DECODER_H

#include "tile.h"

namespace {

// How decoded values are written: in place of what is there, added to it, or past the caches, which what is much larger
// than they are would only flush; the target of that lies at a multiple of 64 bytes.
enum { REPLACE = 0, ADD = 1, STREAM = 2 };
const int64_t STREAM_BYTES = 1 << 25;

#if defined(__AVX512F__)
template <int mode>
inline void put_values(float* out, __m512 value) {
    if (mode == ADD) value = _mm512_add_ps(_mm512_loadu_ps(out), value);
    if (mode == STREAM)
        _mm512_stream_ps(out, value);
    else
        _mm512_storeu_ps(out, value);
}
#elif defined(__AVX2__)
template <int mode>
inline void put_values(float* out, __m256 value) {
    if (mode == ADD) value = _mm256_add_ps(_mm256_loadu_ps(out), value);
    if (mode == STREAM)
        _mm256_stream_ps(out, value);
    else
        _mm256_storeu_ps(out, value);
}
#endif

inline void finish_streams() {  // other threads see what was written before they see anything later
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// out[j] (+)= a where bit j is 0, -a where it is 1.
template <int mode>
inline void write_signs(uint64_t word, float a, float* out) {
#if defined(__AVX512F__)
    const __m512 plus = _mm512_set1_ps(a), minus = _mm512_set1_ps(-a);
    for (int part = 0; part < 4; ++part)
        put_values<mode>(out + 16 * part, _mm512_mask_mov_ps(plus, (__mmask16)(word >> (16 * part)), minus));
#elif defined(__AVX2__)
    const __m256 plus = _mm256_set1_ps(a), sign = _mm256_set1_ps(-0.0f);
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int part = 0; part < 8; ++part) {
        const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32((int)(word >> (8 * part))), to_top);
        put_values<mode>(out + 8 * part, _mm256_xor_ps(plus, _mm256_and_ps(sign, _mm256_castsi256_ps(bits))));
    }
#else
    const uint32_t pattern = float_bits(a);
    for (int half = 0; half < 2; ++half) {
        const uint32_t bits = (uint32_t)(word >> (32 * half));
        float* target = out + 32 * half;
        for (int j = 0; j < 32; ++j) {  // vectorised
            const float value = bits_float(pattern ^ ((bits >> j) << 31));
            target[j] = mode == ADD ? target[j] + value : value;
        }
    }
#endif
}

// out[j] (+)= table[label j], for labels of up to five bits by vectors.
template <int mode>
inline void write_points(Bytes labels, const float* table, int levels, float* out) {
    uint8_t bytes[LANES];
    store_bytes((int8_t*)bytes, labels);
#if defined(__AVX512F__)
    if (levels <= 5) {
        const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
        for (int part = 0; part < 4; ++part) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 16 * part)));
            put_values<mode>(out + 16 * part,
                             levels < 5 ? _mm512_permutexvar_ps(index, low) : _mm512_permutex2var_ps(low, index, high));
        }
        return;
    }
#elif defined(__AVX2__)
    if (levels <= 5) {
        __m256 eighth[4];
        for (int k = 0; k < 4; ++k) eighth[k] = _mm256_loadu_ps(table + 8 * k);
        for (int part = 0; part < 8; ++part) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * part)));
            __m256 value = _mm256_permutevar8x32_ps(eighth[0], index);
            if (levels > 3) {
                const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                value = _mm256_blendv_ps(value, _mm256_permutevar8x32_ps(eighth[1], index), bit3);
                if (levels > 4) {
                    const __m256 upper = _mm256_blendv_ps(_mm256_permutevar8x32_ps(eighth[2], index),
                                                          _mm256_permutevar8x32_ps(eighth[3], index), bit3);
                    value = _mm256_blendv_ps(value, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
                }
            }
            put_values<mode>(out + 8 * part, value);
        }
        return;
    }
#endif
    look_up_64<mode == ADD>(bytes, table, levels > 4, out);
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
            for (int64_t j = 0; j < left; ++j) target[j] = mode == ADD ? target[j] + row[j] : row[j];
        }
    }
    return words;
}

}  // namespace
#endif
