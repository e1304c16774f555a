// Natural: a sign and a randomly rounded exponent (gcompress/compressors/natural.py).
#ifndef GCOMPRESS_NATURAL_H
#define GCOMPRESS_NATURAL_H

#include "gcompress.h"
#include "sign.h"

namespace {

void natural_encode(const float* x, int64_t n, uint32_t seed, uint8_t* payload) {
    uint8_t* exponents = payload + (n + 7) / 8;
    float tail[64] = {0};
    uint8_t bytes[64];
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t size = min64(64, n - i);
        const float* source = x + i;
        if (size < 64) {
            memcpy(tail, source, (size_t)size * sizeof(float));
            source = tail;
        }
        const uint64_t signs = signs_64(source);
        for (int j = 0; j < 64; ++j) {  // vectorised
            const int32_t key = (int32_t)(float_bits(source[j]) & 0x7fffffffu);
            const int32_t word = (int32_t)(hashed((uint32_t)i + (uint32_t)j, seed) >> 9);
            const int32_t finite = key < 0x7f800000 ? key : 0;
            int32_t exponent = (finite + word) >> 23;
            exponent = exponent < 254 ? exponent : 254;
            bytes[j] = (uint8_t)(key < 0x7f800000 ? exponent : 255);
        }
        memcpy(payload + i / 8, &signs, (size_t)((size + 7) / 8));
        memcpy(exponents + i, bytes, (size_t)size);
    }
}

void natural_decode(const uint8_t* payload, int64_t n, int add, float* out) {
    const uint8_t* exponents = payload + (n + 7) / 8;
    float values[64];
    uint8_t bytes[64] = {0};
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t size = min64(64, n - i);
        uint64_t signs = 0;
        memcpy(&signs, payload + i / 8, (size_t)((size + 7) / 8));
        memcpy(bytes, exponents + i, (size_t)size);
        const uint32_t half[2] = {(uint32_t)signs, (uint32_t)(signs >> 32)};
        for (int part = 0; part < 2; ++part)
            for (int j = 0; j < 32; ++j) {  // vectorised
                const uint32_t exponent = bytes[32 * part + j];
                const uint32_t magnitude = exponent == 255 ? 0x7fc00000u : exponent << 23;
                values[32 * part + j] = bits_float(magnitude | half[part] >> j << 31);
            }
        if (add)
            for (int64_t j = 0; j < size; ++j) out[i + j] += values[j];
        else
            memcpy(out + i, values, (size_t)size * sizeof(float));
    }
}

}  // namespace
#endif
