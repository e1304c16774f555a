// RandomK: one entry of each of k runs, drawn by a seed (gcompress/compressors/randomk.py).
#ifndef GCOMPRESS_CPU_RANDOMK_H
#define GCOMPRESS_CPU_RANDOMK_H

#include "../arith/randomk.h"
#include "select.h"
#include "simd.h"

namespace {

// Calls place(run, index, length) for every run, without a division for each.
template <class Place>
inline void for_each_drawn(int64_t n, int64_t k, uint32_t seed, const Place& place) {
    const int64_t length = n / k, rest = n % k;
    int64_t first = 0, carry = 0;
    for (int64_t run = 0; run < k; ++run) {
        carry += rest;
        const int64_t longer = length + (carry >= k);
        if (carry >= k) carry -= k;
        place(run, drawn_entry(run, first, longer, seed), longer);
        first += longer;
    }
}

void randomk_encode(const float* x, int64_t n, int64_t k, int unbiased, uint32_t seed, uint8_t* payload) {
    store<uint32_t>(payload, seed);
    uint8_t* values = payload + 4;
    const uint32_t largest = largest_key(x, n);
    if (largest >= INFINITY_KEY) {
        for (int64_t i = 0; i < k; ++i) store<uint32_t>(values + 4 * i, 0x7fc00000u);
        return;
    }
    if (unbiased && !may_overflow(bits_float(largest), (float)(n / k + 1)))
        for_each_drawn(n, k, seed, [&](int64_t run, int64_t index, int64_t length) {
            store<float>(values + 4 * run, x[index] * (float)length);
        });
    else
        for_each_drawn(n, k, seed, [&](int64_t run, int64_t index, int64_t length) {
            store<float>(values + 4 * run, drawn_value(x[index], length, unbiased != 0));
        });
}

void randomk_decode(const uint8_t* payload, int64_t n, int64_t k, int add, float* out) {
    if (!add) memset(out, 0, (size_t)n * sizeof(float));
    for_each_drawn(n, k, load<uint32_t>(payload), [&](int64_t run, int64_t index, int64_t) {
        const float value = load<float>(payload + 4 + 4 * run);
        out[index] = add ? out[index] + value : value;
    });
}

}  // namespace
#endif
