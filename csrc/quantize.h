// Quantize: a grid per bucket, codes of 1 to 8 bits (gcompress/compressors/quantize.py).
#ifndef GCOMPRESS_QUANTIZE_H
#define GCOMPRESS_QUANTIZE_H

#include "random.h"
#include "select.h"
#include "simd.h"

namespace {

inline float floor_small(float value) {  // |value| < 2^22
    const float nearest = (float)round_even(value);
    return nearest > value ? nearest - 1.0f : nearest;
}

struct Grid {
    float step, inverse, zero;
    bool finite;
};

inline float inverse_of(float step) { return step >= SMALLEST_NORMAL ? 1.0f / step : 0.0f; }

// The scale of one bucket: `step` between codes, and the code `zero` that stands for 0.
template <int bits>
Grid grid_of(const float* x, int64_t count, bool stochastic) {
    // Float order as integer order, so that minimum and maximum vectorise and show NaN too.
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t pattern = load<int32_t>(x + i);
        const int32_t ordered = pattern ^ (int32_t)((uint32_t)(pattern >> 31) >> 1);
        low = ordered < low ? ordered : low;
        high = ordered > high ? ordered : high;
    }
    Grid grid = {0.0f, 0.0f, bits == 1 ? 0.5f : 0.0f, true};
    if (high >= (int32_t)INFINITY_KEY || ~low >= (int32_t)INFINITY_KEY) {
        grid.step = bits_float(0x7fc00000u);
        grid.finite = false;
        return grid;
    }
    const float top = bits_float((uint32_t)high);
    const float bottom = low < 0 ? -bits_float((uint32_t)~low) : 0.0f;
    if (bits == 1) {
        float half = top > -bottom ? top : -bottom;
        if (!stochastic && half < SMALLEST_FIXED) half = 0.0f;
        if (!stochastic && half > 0.0f) {  // the mean magnitude errs least
            const float to_fixed = 65535.0f / half;
            int64_t sum = 0;
            for (int64_t i = 0; i < count; ++i) sum += round_even(__builtin_fabsf(x[i]) * to_fixed);
            half = (float)((double)sum / (double)count * ((double)half / 65535.0));
        }
        grid.step = half < SMALLEST_NORMAL ? 0.0f : half > LARGEST / 2 ? LARGEST : half + half;
        grid.inverse = inverse_of(grid.step);
        return grid;
    }
    // Stochastic rounding needs a spare level, since zero falls on a code exactly.
    const int levels = (1 << bits) - 1;
    const float span = (float)(stochastic && bottom < 0.0f && top > 0.0f ? levels - 1 : levels);
    const float step = top / span - bottom / span;
    if (!(step >= SMALLEST_NORMAL)) return grid;
    grid.step = step;
    grid.inverse = inverse_of(step);
    const float below = -bottom * grid.inverse;
    grid.zero = stochastic ? -floor_small(-below) : (float)round_even(below);
    return grid;
}

template <int bits>
inline uint8_t quantized(float value, const Grid& grid, float dither, bool stochastic) {
    const float scaled = value * grid.inverse;
    float code;
    if (bits == 1)
        code = floor_small((scaled + 0.5f) + dither);
    else
        code = (stochastic ? floor_small(scaled + dither) : (float)round_even(scaled)) + grid.zero;
    const float top = (float)((1 << bits) - 1);
    code = code < 0.0f ? 0.0f : code;
    code = code > top ? top : code;
    return (uint8_t)(int32_t)code;
}

template <int bits, bool stochastic>
void quantize_bucket(const float* x, int64_t count, int64_t first, const Grid& grid, uint32_t seed, bool last,
                     uint8_t* packed) {
    uint8_t codes[64];
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t block = min64(64, count - i);
        if (!grid.finite) {
            memset(codes, 0, sizeof codes);
        } else if (block == 64) {
            for (int j = 0; j < 64; ++j)  // vectorised
                codes[j] = quantized<bits>(
                    x[i + j], grid, stochastic ? uniform((uint32_t)(first + i) + (uint32_t)j, seed) : 0.5f, stochastic);
        } else {
            for (int64_t j = 0; j < block; ++j)
                codes[j] = quantized<bits>(
                    x[i + j], grid, stochastic ? uniform((uint32_t)(first + i + j), seed) : 0.5f, stochastic);
        }
        // A whole block is stored with words that reach into the next one: there must be one.
        if (block == 64 && (i + 128 <= count || !last))
            pack_64<bits>(codes, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes, block, packed + i / 8 * bits);
    }
}

template <int bits>
void quantize_encode_bits(const float* x, int64_t n, int64_t bucket, bool stochastic, uint32_t seed,
                          uint8_t* payload) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    uint8_t* zeros = payload + 4 * buckets;
    uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    for (int64_t b = 0; b < buckets; ++b) {
        const int64_t first = b * bucket, count = min64(bucket, n - first);
        const Grid grid = grid_of<bits>(x + first, count, stochastic);
        store<float>(payload + 4 * b, grid.step);
        if (bits > 1) zeros[b] = (uint8_t)grid.zero;
        // "last": fewer than eight bytes may follow this bucket.
        const bool last = n - (first + count) < 64;
        uint8_t* target = packed + first / 8 * bits;
        if (stochastic)
            quantize_bucket<bits, true>(x + first, count, first, grid, seed, last, target);
        else
            quantize_bucket<bits, false>(x + first, count, first, grid, seed, last, target);
    }
}

template <int bits, bool add>
void quantize_decode_bits(const uint8_t* payload, int64_t n, int64_t bucket, float* out) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    const uint8_t* zeros = payload + 4 * buckets;
    const uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    uint8_t codes[64];
    for (int64_t b = 0; b < buckets; ++b) {
        const float step = load<float>(payload + 4 * b), zero = bits == 1 ? 0.5f : (float)zeros[b];
        const int64_t end = min64(n, (b + 1) * bucket);
        for (int64_t i = b * bucket; i < end; i += 64) {
            const int64_t block = min64(64, end - i);
            if (block == 64 && i + 128 <= n) {
                unpack_64<bits>(packed + i / 8 * bits, codes);
            } else {
                unpack_tail<bits>(packed + i / 8 * bits, block, codes);
            }
            float* target = out + i;
            if (block == 64) {
                for (int j = 0; j < 64; ++j) {  // vectorised
                    const float value = ((float)codes[j] - zero) * step;
                    target[j] = add ? target[j] + value : value;
                }
            } else {
                for (int64_t j = 0; j < block; ++j) {
                    const float value = ((float)codes[j] - zero) * step;
                    target[j] = add ? target[j] + value : value;
                }
            }
        }
    }
}

}  // namespace
#endif
