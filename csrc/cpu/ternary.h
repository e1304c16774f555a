// Ternary: minus, zero or plus one scale, five trits a byte (gcompress/compressors/ternary.py).
#ifndef GCOMPRESS_CPU_TERNARY_H
#define GCOMPRESS_CPU_TERNARY_H

#include "../arith/ternary.h"
#include "../gcompress.h"
#include "qsgd.h"
#include "select.h"
#include "sums.h"
#include "units.h"

namespace {

// The ordered sum of magnitudes above `bound` (all if it is negative), and how many there are.
inline double sum_above(const float* x, int64_t count, float bound, int64_t* members) {
    double total = 0.0;
    float kept[64] = {0};
    *members = 0;
    for (int64_t block = 0; block < count; block += SUM_BLOCK) {
        const int64_t end = min64(count, block + SUM_BLOCK);
        LaneSum sum;
        for (int64_t i = block; i < end; i += 64) {
            const int64_t size = min64(64, end - i);
            int32_t above = 0;
            if (size < 64) memset(kept, 0, sizeof kept);
            for (int64_t j = 0; j < size; ++j) {  // vectorised
                const float magnitude = __builtin_fabsf(x[i + j]);
                kept[j] = magnitude > bound ? magnitude : 0.0f;
                above += magnitude > bound;
            }
            *members += above;
            for (int row = 0; row < 64; row += SUM_LANES) sum.add(kept + row);
        }
        total += sum.folded();
    }
    return total;
}

inline TernaryScale ternary_scale(const float* x, int64_t count, bool stochastic, double clip) {
    TernaryScale result = {0.0f, 0.0f, true};
    const Magnitudes all = magnitudes_of(x, count);
    if (all.largest >= (int32_t)INFINITY_KEY) {
        result.finite = false;
        return result;
    }
    if (stochastic) {
        result.scale = ternary_clipped(all.squares, all.largest, count, clip);
        return result;
    }
    int64_t members;
    result.bound = ternary_bound(sum_above(x, count, -1.0f, &members), count);
    const double above = sum_above(x, count, result.bound, &members);
    result.scale = ternary_mean(above, members);
    return result;
}

inline void ternary_encode_range(const float* x, int64_t n, int64_t bucket, bool stochastic, double clip, uint32_t seed,
                                 int64_t from, int64_t to, uint8_t* payload) {
    uint8_t* packed = payload + 4 * ((n + bucket - 1) / bucket);
    TernaryScale scale = {0.0f, 0.0f, true};
    uint8_t trits[TRIT_GROUP], bytes[64];
    float tail[64] = {0};
    for (int64_t group = from; group < to; group += TRIT_GROUP) {
        const int64_t entries = min64(TRIT_GROUP, n - group), width = (entries + 4) / 5;
        if (entries < TRIT_GROUP) memset(trits, 0, sizeof trits);
        for (int64_t run = 0; run < entries; run += 64) {
            const int64_t i = group + run, size = min64(64, entries - run);
            if (i % bucket == 0) {
                scale = ternary_scale(x + i, min64(bucket, n - i), stochastic, clip);
                store<float>(payload + 4 * (i / bucket), ternary_sent(scale));
            }
            const float* source = x + i;
            if (size < 64) {
                memcpy(tail, source, (size_t)size * sizeof(float));
                source = tail;
            }
            uint8_t some[64];
            for (int j = 0; j < 64; ++j) {  // vectorised
                const float bound = stochastic ? uniform((uint32_t)i + (uint32_t)j, seed) * scale.scale : scale.bound;
                some[j] = trit_of(source[j], bound);
            }
            if (!ternary_usable(scale)) memset(some, 1, sizeof some);
            memcpy(trits + run, some, (size_t)size);
        }
        if (width == 64) {
            for (int j = 0; j < 64; ++j)  // vectorised
                bytes[j] = (uint8_t)(trits[j] + 3 * trits[64 + j] + 9 * trits[128 + j] + 27 * trits[192 + j] +
                                     81 * trits[256 + j]);
        } else {
            for (int64_t j = 0; j < width; ++j) {
                int32_t byte = 0, weight = 1;
                for (int64_t d = 0; d < 5; ++d, weight *= 3) {
                    if (d * width + j < entries) byte += weight * trits[d * width + j];
                }
                bytes[j] = (uint8_t)byte;
            }
        }
        memcpy(packed + group / 5, bytes, (size_t)width);
    }
}

template <bool add>
void ternary_decode_range(const uint8_t* payload, int64_t n, int64_t bucket, int64_t from, int64_t to, float* out) {
    const uint8_t* packed = payload + 4 * ((n + bucket - 1) / bucket);
    uint8_t trits[TRIT_GROUP + 64], bytes[64] = {0};
    float scale = load<float>(payload + 4 * (from / bucket));
    for (int64_t group = from; group < to; group += TRIT_GROUP) {
        const int64_t entries = min64(TRIT_GROUP, n - group), width = (entries + 4) / 5;
        memcpy(bytes, packed + group / 5, (size_t)width);
        for (int d = 0; d < 5; ++d) {
            uint8_t digit[64];
            for (int j = 0; j < 64; ++j) {  // vectorised; 171 / 512 is a third for all bytes
                const uint16_t third = (uint16_t)((uint16_t)(bytes[j] * 171) >> 9);
                digit[j] = (uint8_t)(bytes[j] - 3 * third);
                bytes[j] = (uint8_t)third;
            }
            memcpy(trits + d * width, digit, (size_t)width);
        }
        for (int64_t run = 0; run < entries; run += 64) {
            const int64_t i = group + run, size = min64(64, entries - run);
            if (i % bucket == 0) scale = load<float>(payload + 4 * (i / bucket));
            float* target = out + (i - from);
            if (size == 64) {
                for (int j = 0; j < 64; ++j) {  // vectorised
                    const float value = trit_value(trits[run + j], scale);
                    target[j] = add ? target[j] + value : value;
                }
            } else {
                for (int64_t j = 0; j < size; ++j) {
                    const float value = trit_value(trits[run + j], scale);
                    target[j] = add ? target[j] + value : value;
                }
            }
        }
    }
}

void ternary_encode(int threads, gc_memory* memory, const float* x, int64_t n, int64_t bucket, int stochastic,
                    double clip, uint32_t seed, uint8_t* payload) {
    int64_t unit = bucket;  // whole groups and whole buckets
    while (unit % TRIT_GROUP && unit < n) unit += bucket;
    encode_units(
        threads, memory, x, n, unit,
        [&](const float* source, int64_t first, int64_t end, int64_t) {
            ternary_encode_range(source, n, bucket, stochastic != 0, clip, seed, first, end, payload);
        },
        [&](int64_t first, int64_t end, int64_t, float* sent) {
            ternary_decode_range<false>(payload, n, bucket, first, end, sent);
        });
}

void ternary_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t bucket, int add,
                    float* out) {
    decode_units(threads, more, payload, n, TRIT_GROUP, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     ternary_decode_range<decltype(adds)::value>(one, n, bucket, first, end, target);
                 });
}

}  // namespace
#endif
