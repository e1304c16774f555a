// Entropy: the bytes of another payload by rANS (gcompress/compressors/entropy.py).
#ifndef GCOMPRESS_ARITH_ENTROPY_H
#define GCOMPRESS_ARITH_ENTROPY_H

#include "base.h"

namespace {

const int STATES = 32;
const int PROBABILITY_BITS = 12;
const int TOTAL = 1 << PROBABILITY_BITS;
const uint32_t LOWEST_STATE = 1u << 15;  // states stay in [2^15, 2^31): signed arithmetic vectorises
const int MAX_PLANES = 128;
const int64_t SMALLEST_CODED = 64;
const int64_t STATE_BYTES = 4 * STATES;

// Every stride-th byte of a section.
struct Plane {
    int64_t offset, stride, count;
};

GC_INLINE int leading_zeros(uint32_t value) {  // of a value that is not 0
#if defined(__CUDACC__)
    return __clz(value);
#else
    return __builtin_clz(value);
#endif
}

// Frequencies that sum to 4096, at least 1 for what occurs.
GC_INLINE void frequencies_of(const int64_t* histogram, int64_t count, uint16_t* frequency) {
    int sum = 0;
    for (int s = 0; s < 256; ++s) {
        const int64_t rounded = (histogram[s] * TOTAL + count / 2) / count;
        frequency[s] = (uint16_t)(histogram[s] > 0 && rounded == 0 ? 1 : rounded);
        sum += frequency[s];
    }
    while (sum != TOTAL) {
        int most = 0;
        for (int s = 1; s < 256; ++s)
            if (frequency[s] > frequency[most]) most = s;
        const int change = sum < TOTAL ? 1 : -1;
        frequency[most] = (uint16_t)(frequency[most] + change);
        sum += change;
    }
}

// 256 log2(value), rounded down, for a value from 1 to 4096.
GC_INLINE int64_t log2_fixed(uint32_t value) {
    const int exponent = 31 - leading_zeros(value);
    uint32_t mantissa = value << (16 - exponent);
    int64_t result = exponent;
    for (int bit = 0; bit < 8; ++bit) {
        mantissa = (uint32_t)((uint64_t)mantissa * mantissa >> 16);
        const uint32_t carry = mantissa >> 17;
        mantissa >>= carry;
        result = 2 * result + carry;
    }
    return result;
}

GC_INLINE int64_t table_bytes(const uint16_t* frequency) {
    int64_t bits = 0;
    for (int s = 0; s < 256; ++s) bits += 2 * (31 - leading_zeros((uint32_t)frequency[s] + 1)) + 1;
    return (bits + 7) / 8;
}

// Bytes that coding a plane saves, by its histogram and its frequencies; 0 or less: it stays as it is.
GC_INLINE int64_t bytes_saved(const int64_t* histogram, const uint16_t* frequency, int64_t count) {
    int64_t cost = 0;  // in 1 / 256 bit
    for (int s = 0; s < 256; ++s)
        if (histogram[s]) cost += histogram[s] * (256 * PROBABILITY_BITS - log2_fixed(frequency[s]));
    return count - table_bytes(frequency) - (cost + 2047) / 2048;
}

// What a slot of the decoding table holds: a symbol, its frequency less 1 and the place within it.
GC_INLINE uint32_t slot_of(int symbol, uint32_t frequency, uint32_t place) {
    return (uint32_t)symbol | (frequency - 1) << 8 | place << 20;
}
GC_INLINE uint32_t next_state(uint32_t state, uint32_t entry) {
    return ((entry >> 8 & 4095) + 1) * (state >> PROBABILITY_BITS) + (entry >> 20);
}

}  // namespace
#endif
