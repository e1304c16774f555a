// Natural: a sign, by warp ballots, and a randomly rounded exponent. Moves 4 bytes read and 1.125 written an entry;
// decoding 1.125 read and 4 written, or 4 more read to add.
#include "../arith/natural.h"
#include "device.cuh"

GC_KERNEL(natural_encode)(const float* x, int64_t n, int64_t seed, uint8_t* payload) {
    uint8_t* exponents = payload + (n + 7) / 8;
    for (int round = 0; round < 4; ++round) {
        const int64_t i = (4 * (int64_t)blockIdx.x + round) * THREADS + threadIdx.x, first = i - lane();
        if (first >= n) return;
        const float value = i < n ? x[i] : 0.0f;
        const uint32_t signs = __ballot_sync(ALL_LANES, float_bits(value) >> 31);
        if (lane() < 4 && first + 8 * lane() < n) payload[first / 8 + lane()] = (uint8_t)(signs >> (8 * lane()));
        if (i < n) exponents[i] = natural_exponent((int32_t)key_of<true>(value), hashed((uint32_t)i, (uint32_t)seed));
    }
}
GC_REGISTER(natural_encode)

GC_KERNEL(natural_decode)(const uint8_t* payload, int64_t n, int64_t add, float* out) {
    const uint8_t* exponents = payload + (n + 7) / 8;
    for (int round = 0; round < 4; ++round) {
        const int64_t i = (4 * (int64_t)blockIdx.x + round) * THREADS + threadIdx.x;
        if (i >= n) return;
        const float value = natural_value(exponents[i], (uint32_t)payload[i / 8] >> (i & 7) & 1);
        out[i] = add ? out[i] + value : value;
    }
}
GC_REGISTER(natural_decode)
