// Natural: a sign and a randomly rounded exponent (gcompress/compressors/natural.py).
#ifndef GCOMPRESS_CPU_NATURAL_H
#define GCOMPRESS_CPU_NATURAL_H

#include "../arith/natural.h"
#include "../gcompress.h"
#include "sign.h"
#include "units.h"

namespace {

inline void natural_encode_range(const float* x, int64_t n, uint32_t seed, int64_t from, int64_t to, uint8_t* payload) {
    uint8_t* exponents = payload + (n + 7) / 8;
    float tail[64] = {0};
    uint8_t bytes[64];
    for (int64_t i = from; i < to; i += 64) {
        const int64_t size = min64(64, n - i);
        const float* source = x + i;
        if (size < 64) {
            memcpy(tail, source, (size_t)size * sizeof(float));
            source = tail;
        }
        const uint64_t signs = signs_64(source);
        for (int j = 0; j < 64; ++j) {  // vectorised
            const int32_t key = (int32_t)(float_bits(source[j]) & 0x7fffffffu);
            bytes[j] = natural_exponent(key, hashed((uint32_t)i + (uint32_t)j, seed));
        }
        memcpy(payload + i / 8, &signs, (size_t)((size + 7) / 8));
        memcpy(exponents + i, bytes, (size_t)size);
    }
}

inline void natural_decode_range(const uint8_t* payload, int64_t n, int64_t from, int64_t to, bool add, float* out) {
    const uint8_t* exponents = payload + (n + 7) / 8;
    float values[64];
    uint8_t bytes[64] = {0};
    for (int64_t i = from; i < to; i += 64, out += 64) {
        const int64_t size = min64(64, n - i);
        uint64_t signs = 0;
        memcpy(&signs, payload + i / 8, (size_t)((size + 7) / 8));
        memcpy(bytes, exponents + i, (size_t)size);
        const uint32_t half[2] = {(uint32_t)signs, (uint32_t)(signs >> 32)};
        for (int part = 0; part < 2; ++part)
            for (int j = 0; j < 32; ++j)  // vectorised
                values[32 * part + j] = natural_value(bytes[32 * part + j], half[part] >> j & 1);
        if (add)
            for (int64_t j = 0; j < size; ++j) out[j] += values[j];
        else
            memcpy(out, values, (size_t)size * sizeof(float));
    }
}

void natural_encode(int threads, gc_memory* memory, const float* x, int64_t n, uint32_t seed, uint8_t* payload) {
    encode_units(
        threads, memory, x, n, 64,
        [&](const float* source, int64_t first, int64_t end, int64_t) {
            natural_encode_range(source, n, seed, first, end, payload);
        },
        [&](int64_t first, int64_t end, int64_t, float* sent) {
            natural_decode_range(payload, n, first, end, false, sent);
        });
}

void natural_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int add, float* out) {
    decode_units(threads, more, payload, n, 64, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     natural_decode_range(one, n, first, end, adds.value, target);
                 });
}

}  // namespace
#endif
