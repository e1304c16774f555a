// Quantize: a grid per bucket, codes of 1 to 8 bits (gcompress/compressors/quantize.py).
#ifndef GCOMPRESS_CPU_QUANTIZE_H
#define GCOMPRESS_CPU_QUANTIZE_H

#include "../arith/quantize.h"
#include "select.h"
#include "simd.h"
#include "units.h"
#include "for_bits.h"

namespace {

// Between which ordered patterns the entries of a bucket and 0 lie (arith/quantize.h).
struct Range {
    int32_t low, high;
};

// Of ordered patterns (0 and above those of positive entries, the others inverted), without ordering them.
inline Range range_of_patterns(Range range, const float* x, int64_t count) {
    int32_t high = range.high, inverse_low = ~range.low;
    for (int64_t i = 0; i < count; ++i) {  // vectorised
        const int32_t pattern = load<int32_t>(x + i), inverse = pattern ^ INT32_MIN;
        high = pattern > high ? pattern : high;
        inverse_low = inverse > inverse_low ? inverse : inverse_low;
    }
    return {~inverse_low, high};
}
GC_COLD Range range_of_few(Range range, const float* x, int64_t count) { return range_of_patterns(range, x, count); }

// By comparisons of floats, since SSE2 has none that finds the larger of two integers of 32 bits.
inline Range range_of(const float* x, int64_t count) {
    if (count < 128) return range_of_few({0, 0}, x, count);  // adding up lanes would take longer than it saves
    enum { CHAINS = 4 };                                     // else each comparison waits for the one before it
    Floats low[CHAINS], high[CHAINS], sum[CHAINS];
    for (int k = 0; k < CHAINS; ++k) low[k] = high[k] = sum[k] = every_float(0.0f);
    int64_t done = 0;
    for (; done + CHAINS * WIDE <= count; done += CHAINS * WIDE)
        for (int k = 0; k < CHAINS; ++k) {
            const Floats value = load_floats(x + done + k * WIDE);
            low[k] = least(low[k], value);
            high[k] = most(high[k], value);
            sum[k] = sum[k] + value;
        }
    float ends[2 * WIDE], sums[WIDE];
    store_floats(ends, least(least(low[0], low[1]), least(low[2], low[3])));
    store_floats(ends + WIDE, most(most(high[0], high[1]), most(high[2], high[3])));
    store_floats(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    int32_t largest = 0;
    for (int k = 0; k < WIDE; ++k) {
        const int32_t key = (int32_t)(float_bits(sums[k]) & 0x7fffffffu);
        largest = key > largest ? key : largest;
    }
    // The terms of finite sums are finite, and comparisons know their order. Those of others may be, too.
    if (largest >= (int32_t)INFINITY_KEY) return range_of_few({0, 0}, x, count);
    const Range range = range_of_patterns({0, 0}, ends, 2 * WIDE);
    return done == count ? range : range_of_few(range, x + done, count - done);
}

// The scale of one bucket: `step` between codes, and the code `zero` that stands for 0.
template <int bits>
Grid grid_of(const float* x, int64_t count, bool stochastic) {
    const Range range = range_of(x, count);
    if (!is_finite_range(range.low, range.high)) return poisoned_grid(bits);
    const float top = range_top(range.high), bottom = range_bottom(range.low);
    if (bits > 1) return range_grid(top, bottom, stochastic, bits);
    float half = one_bit_largest(top, bottom, stochastic);
    if (!stochastic && half > 0.0f) {
        const float to_fixed = one_bit_factor(half);
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += round_even(magnitude_of(x[i]) * to_fixed);
        half = one_bit_mean(sum, count, half);
    }
    return one_bit_grid(half);
}

template <int bits, bool stochastic>
void quantize_bucket(const float* x, int64_t count, int64_t first, const Grid& grid, uint32_t seed, bool last,
                     uint8_t* packed) {
    // A whole block is stored with words that reach into the next one: there must be one.
    const int64_t whole = last ? count - 64 : count;
    int64_t i = 0;
    if (bits > 1 && !stochastic && grid.finite) {
        const Floats inverse = every_float(grid.inverse);
        const int zero = (int)grid.zero;
        const Bytes top = every_byte((int8_t)((1 << bits) - 1));
        for (; i + 64 <= whole; i += 64) {
            const Bytes found = limited_bytes([&](int j) { return rounded(load_floats(x + i + j) * inverse); }, zero);
            pack_64<bits>(least(found, top), packed + i / 8 * bits);
        }
    }
    uint8_t codes[64];
    for (; i < count; i += 64) {
        const int64_t block = min64(64, count - i);
        if (!grid.finite) {
            memset(codes, 0, sizeof codes);
        } else if (block == 64) {
            for (int j = 0; j < 64; ++j)  // vectorised
                codes[j] =
                    quantized(x[i + j], grid, stochastic ? uniform((uint32_t)(first + i) + (uint32_t)j, seed) : 0.5f,
                              stochastic, bits);
        } else {
            for (int64_t j = 0; j < block; ++j)
                codes[j] = quantized(x[i + j], grid, stochastic ? uniform((uint32_t)(first + i + j), seed) : 0.5f,
                                     stochastic, bits);
        }
        if (i + 64 <= whole)
            pack_64<bits>(codes, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes, block, packed + i / 8 * bits);
    }
}

template <int bits>
void quantize_encode_range(const float* x, int64_t n, int64_t bucket, bool stochastic, uint32_t seed, int64_t from,
                           int64_t to, int64_t limit, uint8_t* payload) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    uint8_t* zeros = payload + 4 * buckets;
    uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    for (int64_t first = from; first < to; first += bucket) {
        const int64_t b = first / bucket, count = min64(bucket, n - first);
        const Grid grid = grid_of<bits>(x + first, count, stochastic);
        store<float>(payload + 4 * b, grid.step);
        if (bits > 1) zeros[b] = (uint8_t)grid.zero;
        // "last": fewer than eight bytes may be touched behind this bucket.
        const bool last = limit - (first + count) < 64;
        uint8_t* target = packed + first / 8 * bits;
        if (stochastic)
            quantize_bucket<bits, true>(x + first, count, first, grid, seed, last, target);
        else
            quantize_bucket<bits, false>(x + first, count, first, grid, seed, last, target);
    }
}

// The entries from `first` to `end`, which lie in one bucket; `limit`: where entries end whose codes may be read.
template <int bits, bool add, bool limited>
void dequantize_bucket(const uint8_t* packed, int64_t first, int64_t end, int64_t limit, float zero, float step,
                       float* out) {
    uint8_t codes[64];
    for (int64_t i = first; i < end; i += 64) {
        const int64_t block = min64(64, end - i);
        if (block == 64 && i + 128 <= limit) {
            unpack_64<bits>(packed + i / 8 * bits, codes);
        } else {
            unpack_tail<bits>(packed + i / 8 * bits, block, codes);
        }
        float* target = out + (i - first);
        if (block == 64) {
            for (int j = 0; j < 64; ++j) {  // vectorised
                const float value = dequantized(codes[j], zero, step, limited);
                target[j] = add ? target[j] + value : value;
            }
        } else {
            for (int64_t j = 0; j < block; ++j) {
                const float value = dequantized(codes[j], zero, step, limited);
                target[j] = add ? target[j] + value : value;
            }
        }
    }
}

template <int bits, bool add>
void quantize_decode_range(const uint8_t* payload, int64_t n, int64_t bucket, int64_t from, int64_t to, int64_t limit,
                           float* out) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    const uint8_t* zeros = payload + 4 * buckets;
    const uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    for (int64_t first = from, end; first < to; out += end - first, first = end) {
        const int64_t b = first / bucket;
        const float step = load<float>(payload + 4 * b), zero = bits == 1 ? 0.5f : (float)zeros[b];
        end = min64(to, (b + 1) * bucket);
        if (may_overflow(step, 255.0f))
            dequantize_bucket<bits, add, true>(packed, first, end, limit, zero, step, out);
        else
            dequantize_bucket<bits, add, false>(packed, first, end, limit, zero, step, out);
    }
}

template <int bits>
void quantize_encode_bits(int threads, gc_memory* memory, const float* x, int64_t n, int64_t bucket, bool stochastic,
                          uint32_t seed, uint8_t* payload) {
    encode_units(
        threads, memory, x, n, bucket,
        [&](const float* source, int64_t first, int64_t end, int64_t limit) {
            quantize_encode_range<bits>(source, n, bucket, stochastic, seed, first, end, limit, payload);
        },
        [&](int64_t first, int64_t end, int64_t limit, float* sent) {
            quantize_decode_range<bits, false>(payload, n, bucket, first, end, limit, sent);
        });
}

template <int bits>
void quantize_decode_bits(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t bucket, int add,
                          float* out) {
    decode_units(threads, more, payload, n, bucket, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     quantize_decode_range<bits, decltype(adds)::value>(one, n, bucket, first, end, n, target);
                 });
}

void quantize_encode(int threads, gc_memory* memory, const float* x, int64_t n, int bits, int64_t bucket,
                     int stochastic, uint32_t seed, uint8_t* payload) {
    GC_FOR_BITS(bits, (quantize_encode_bits<B>(threads, memory, x, n, bucket, stochastic != 0, seed, payload)))
}

void quantize_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int bits, int64_t bucket,
                     int add, float* out) {
    GC_FOR_BITS(bits, (quantize_decode_bits<B>(threads, more, payload, n, bucket, add, out)))
}

}  // namespace
#endif
