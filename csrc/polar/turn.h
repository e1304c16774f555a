// Polar, unbiased: blocks of entries turned at random as Eden turns them, and turned back (gcompress/compressors/polar/turning.py).
#ifndef GCOMPRESS_POLAR_TURN_H
#define GCOMPRESS_POLAR_TURN_H

#include "../arith/polar_turn.h"
#include "../cpu/eden.h"
#include "lanes.h"

namespace {

const int64_t TURN_BLOCK = EDEN_LARGEST_BLOCK;

// Turned entries of mean square 1, block by block, and by what each block, turned back, is to be multiplied (0 for a
// block of zeros). Sixteen zeros must follow the last entry of y.
void polar_turn_blocks(const float* x, int64_t n, uint32_t seed, float* y, double* lengths) {
    for (int64_t first = 0; first < n; first += TURN_BLOCK) {
        const EdenBlock block(first, min64(TURN_BLOCK, n - first), seed);
        const float* entries = x + first;
        float* turned = y + first;
        int32_t largest = 0;
        for (int64_t i = 0; i < block.entries; ++i) {  // vectorised
            const int32_t key = (int32_t)(float_bits(entries[i]) & 0x7fffffffu);
            largest = largest > key ? largest : key;
        }
        const int exponent = largest >> 23;
        *lengths = 0.0;
        if (exponent == 0) {
            memset(turned, 0, (size_t)block.entries * sizeof(float));
        } else {
            const float factor = bits_float((uint32_t)(255 - exponent) << 23);
            for (int64_t i = 0; i < block.entries; ++i) turned[i] = entries[i] * factor;
            block.rotate(turned);
            const double power = ordered_products(turned, turned, block.entries);
            const float unit = turn_unit(power, block.entries);
            for (int64_t i = 0; i < block.entries; ++i) turned[i] *= unit;
            *lengths = turn_length(exponent, block.whole(), block.entries, unit);
        }
        ++lengths;
    }
}

// The scales that make decoded blocks unbiased: length |y|^2 / <y, decoded>. Sixteen zeros must follow both.
void polar_turn_scales_of(const float* y, const float* decoded, int64_t n, const double* lengths, float* scales) {
    for (int64_t first = 0; first < n; first += TURN_BLOCK, ++lengths, ++scales) {
        const int64_t entries = min64(TURN_BLOCK, n - first);
        const double power = ordered_products(y + first, y + first, entries);
        const double dot = ordered_products(y + first, decoded + first, entries);
        *scales = turn_scale(*lengths, power, dot);
    }
}

template <int mode>
void polar_turn_blocks_back(float* y, int64_t n, uint32_t seed, const float* scales, float* out) {
    for (int64_t first = 0; first < n; first += TURN_BLOCK, ++scales) {
        const EdenBlock block(first, min64(TURN_BLOCK, n - first), seed);
        float* turned = y + first;
        block.rotate_back(turned);
        for (int64_t i = 0; i < block.entries; ++i) {  // vectorised
            turned[i] = saturated(turned[i] * *scales);
        }
        flip_signs(turned, block.entries, block.word, seed);
        for (int64_t i = 0; i < block.entries; ++i) out[first + i] = put_value<mode>(out[first + i], turned[i]);
    }
}

}  // namespace
#endif
