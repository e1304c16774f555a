// SharedScale: integers that add up in 64-bit words (gcompress/compressors/shared.py).
#ifndef GCOMPRESS_CPU_SHARED_H
#define GCOMPRESS_CPU_SHARED_H

#include "../arith/lowrank.h"
#include "../arith/shared.h"
#include "quantize.h"
#include "select.h"
#include "simd.h"
#include "topk.h"

namespace {

const int64_t MOST_FIELDS = 32;  // two bits each
const int64_t BLOCK = WORDS * MOST_FIELDS;

// The largest magnitude of every bucket; infinity if an entry is not finite.
void shared_scales(const float* x, int64_t n, int64_t bucket, float* scales) {
    for (int64_t first = 0; first < n; first += bucket) {
        const uint32_t key = largest_key(x + first, min64(bucket, n - first));
        *scales++ = bits_float(key > INFINITY_KEY ? INFINITY_KEY : key);
    }
}

// The codes of one run within a bucket, plus `half`.
template <bool stochastic>
void shared_codes(const float* x, int64_t count, uint32_t index, float step, int limit, uint32_t seed, int32_t half,
                  uint32_t* codes) {
    const float inverse = shared_inverse(step), top = (float)limit;
    const bool finite = step == step;
    for (int64_t i = 0; i < count; ++i) {  // vectorised
        const float draw = stochastic ? uniform(index + (uint32_t)i, seed) : 0.0f;
        codes[i] = (uint32_t)(shared_code(finite ? x[i] : 0.0f, inverse, top, stochastic, draw) + half);
    }
}

// Codes in -limit … limit, `64 / width` to a word, whose sums over ranks must fit `width` bits.
void shared_encode(const float* x, int64_t n, int64_t bucket, int limit, int width, int stochastic, uint32_t seed,
                   const float* scales, uint8_t* payload) {
    const int fields = 64 / width;
    const uint64_t bias = bias_of(width, fields);
    const int32_t half = 1 << (width - 1);
    uint32_t codes[BLOCK];
    uint64_t words[WORDS];
    for (int64_t first = 0; first < n; first += WORDS * fields) {
        const int64_t count = min64(WORDS * fields, n - first);
        for (int64_t i = first; i < first + count;) {
            const int64_t run = min64(first + count, (i / bucket + 1) * bucket) - i;
            const float step = shared_step(scales[i / bucket], limit);
            uint32_t* target = codes + (i - first);
            if (stochastic)
                shared_codes<true>(x + i, run, (uint32_t)i, step, limit, seed, half, target);
            else
                shared_codes<false>(x + i, run, (uint32_t)i, step, limit, seed, half, target);
            i += run;
        }
        const int64_t used = (count + fields - 1) / fields;
        for (int64_t i = count; i < used * fields; ++i) codes[i] = (uint32_t)half;
        for (int64_t j = 0; j < used; ++j) words[j] = 0;
        for (int f = 0; f < fields; ++f)
            for (int64_t j = 0; j < used; ++j) words[j] |= (uint64_t)codes[f * used + j] << (width * f);  // vectorised
        for (int64_t j = 0; j < used; ++j) words[j] -= bias;
        memcpy(payload, words, (size_t)used * 8);
        payload += used * 8;
    }
}

template <bool add>
void shared_decode_form(const uint8_t* payload, int64_t n, int64_t bucket, int limit, int width, const uint8_t* scales,
                        float* out) {
    const int fields = 64 / width;
    const uint64_t bias = bias_of(width, fields), mask = (1ull << width) - 1;
    const int32_t half = 1 << (width - 1);
    int32_t codes[BLOCK];
    uint64_t words[WORDS];
    for (int64_t first = 0; first < n; first += WORDS * fields) {
        const int64_t count = min64(WORDS * fields, n - first), used = (count + fields - 1) / fields;
        memcpy(words, payload, (size_t)used * 8);
        payload += used * 8;
        for (int64_t j = 0; j < used; ++j) words[j] += bias;
        for (int f = 0; f < fields; ++f)
            for (int64_t j = 0; j < used; ++j)  // vectorised
                codes[f * used + j] = (int32_t)(words[j] >> (width * f) & mask) - half;
        for (int64_t i = first; i < first + count;) {
            const int64_t end = min64(first + count, (i / bucket + 1) * bucket);
            const float step = shared_step(load<float>(scales + i / bucket * 4), limit);
            if (may_overflow(step, (float)half)) {
                for (; i < end; ++i) {
                    const float value = shared_value(codes[i - first], step);
                    out[i] = add ? out[i] + value : value;
                }
            }
            for (; i < end; ++i) {
                const float value = (float)codes[i - first] * step;
                out[i] = add ? out[i] + value : value;
            }
        }
    }
}

void shared_decode(const uint8_t* payload, int64_t n, int64_t bucket, int limit, int width, const uint8_t* scales,
                   int add, float* out) {
    if (add)
        shared_decode_form<true>(payload, n, bucket, limit, width, scales, out);
    else
        shared_decode_form<false>(payload, n, bucket, limit, width, scales, out);
}

// LowRank (gcompress/compressors/lowrank.py): out = left right, in the order of the rank, each product rounded.
void lowrank_decode(const float* left, const float* right, int64_t rows, int64_t columns, int64_t rank, int64_t n,
                    int add, float* out) {
    float row[1024];
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t first = 0; first < columns; first += 1024) {
            const int64_t count = min64(min64(1024, columns - first), n - i * columns - first);
            if (count <= 0) return;
            for (int64_t j = 0; j < count; ++j) row[j] = 0.0f;
            for (int64_t k = 0; k < rank; ++k)
                for (int64_t j = 0; j < count; ++j) row[j] += left[i * rank + k] * right[k * columns + first + j];
            if (largest_key(row, count) >= INFINITY_KEY)
                for (int64_t j = 0; j < count; ++j)
                    if (key_of<true>(row[j]) >= INFINITY_KEY)
                        row[j] = lowrank_wide(left + i * rank, right + first + j, rank, columns);
            float* target = out + i * columns + first;
            for (int64_t j = 0; j < count; ++j) target[j] = add ? target[j] + row[j] : row[j];
        }
}

}  // namespace
#endif
