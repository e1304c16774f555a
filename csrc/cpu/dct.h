// Dct: the cosine transform of a matrix in blocks, and back (gcompress/compressors/dct.py).
#ifndef GCOMPRESS_CPU_DCT_H
#define GCOMPRESS_CPU_DCT_H

#include "../arith/dct.h"
#include "hadamard.h"

namespace {

const int64_t DCT_LARGEST = 128;  // sides of a block

// Rows of left times right, of which they are `tall`; rows of `right` and `out` are `pitch` apart, a multiple of WIDE.
// Products are added in turn, so that every instruction set rounds alike: vectors run over columns.
template <int tall, int vectors>
GC_HOT void dct_strip(const float* left, int64_t left_pitch, int64_t inner, const float* right, int64_t pitch,
                      float* out) {
    Wide sum[tall][vectors] = {};
    for (int64_t j = 0; j < inner; ++j) {
        Wide row[vectors];
        for (int v = 0; v < vectors; ++v) load_wide(&row[v], right + j * pitch + v * WIDE);
        for (int r = 0; r < tall; ++r)
            for (int v = 0; v < vectors; ++v) sum[r][v] += left[r * left_pitch + j] * row[v];
    }
    for (int r = 0; r < tall; ++r)
        for (int v = 0; v < vectors; ++v) store_wide(out + r * pitch + v * WIDE, &sum[r][v]);
}

template <int tall>
void dct_rows(const float* left, int64_t left_pitch, int64_t inner, const float* right, int64_t pitch, float* out) {
    int64_t c = 0;
    for (; c + 2 * WIDE <= pitch; c += 2 * WIDE) dct_strip<tall, 2>(left, left_pitch, inner, right + c, pitch, out + c);
    if (c < pitch) dct_strip<tall, 1>(left, left_pitch, inner, right + c, pitch, out + c);
}

void dct_product(const float* left, int64_t left_pitch, int64_t rows, int64_t inner, const float* right, int64_t pitch,
                 float* out) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dct_rows<4>(left + r * left_pitch, left_pitch, inner, right, pitch, out + r * pitch);
    for (; r < rows; ++r) dct_rows<1>(left + r * left_pitch, left_pitch, inner, right, pitch, out + r * pitch);
}

// A block in its place: rows `pitch` apart.
struct DctBlock {
    float entries[DCT_LARGEST * DCT_LARGEST], half[DCT_LARGEST * DCT_LARGEST];
    int64_t rows, columns, pitch;
    uint32_t load_from(const float* x, int64_t stride) {
        int32_t largest = 0;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {  // vectorised
                const float value = x[r * stride + c];
                const int32_t key = (int32_t)key_of<true>(value);
                largest = largest > key ? largest : key;
                entries[r * pitch + c] = value;
            }
        return (uint32_t)largest;
    }
    void transform(uint32_t largest, const float* left, const float* right) {
        const bool scaled = dct_may_overflow(largest), poisoned = largest >= INFINITY_KEY;
        if (scaled)
            for (int64_t i = 0; i < rows * pitch; ++i) entries[i] *= DCT_DOWN;
        dct_product(left, rows, rows, rows, entries, pitch, half);
        dct_product(half, pitch, rows, columns, right, pitch, entries);
        if (scaled)
            for (int64_t i = 0; i < rows * pitch; ++i)
                entries[i] = poisoned ? bits_float(QUIET_NAN) : saturated(entries[i] * DCT_UP);
    }
    template <bool add>
    void store_to(float* out, int64_t stride) const {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {  // vectorised
                const float value = entries[r * pitch + c];
                out[r * stride + c] = add ? out[r * stride + c] + value : value;
            }
    }
};

void dct_blocks(const float* x, int64_t rows, int64_t columns, int64_t tall, int64_t wide, const float* left,
                const float* right, int inverse, int add, float* out) {
    float padded[DCT_LARGEST * DCT_LARGEST] = {0.0f};
    DctBlock block;
    block.rows = tall;
    block.columns = wide;
    block.pitch = (wide + WIDE - 1) / WIDE * WIDE;
    memset(block.entries, 0, sizeof block.entries);
    for (int64_t j = 0; j < wide; ++j) memcpy(padded + j * block.pitch, right + j * wide, (size_t)wide * sizeof(float));
    for (int64_t r = 0; r < rows; r += tall)
        for (int64_t c = 0; c < columns; c += wide) {
            const int64_t place = r * columns + c, packed = r * columns + c * tall;  // of its first entry; as a list
            block.transform(block.load_from(x + (inverse ? packed : place), inverse ? wide : columns), left, padded);
            float* target = out + (inverse ? place : packed);
            if (add)
                block.store_to<true>(target, inverse ? columns : wide);
            else
                block.store_to<false>(target, inverse ? columns : wide);
        }
}

}  // namespace
#endif
