// Toy: a signed byte for every entry (tests/toy/toy.py).
#ifndef GCOMPRESS_CPU_TOY_H
#define GCOMPRESS_CPU_TOY_H

#include "../arith/toy.h"
#include "simd.h"

namespace {

void toy_encode(const float* x, int64_t n, uint8_t* payload) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t key = float_bits(x[i]) & 0x7fffffffu;
        largest = largest > key ? largest : key;
    }
    const float step = toy_step(largest);
    memcpy(payload, &step, sizeof step);
    for (int64_t i = 0; i < n; ++i) payload[4 + i] = (uint8_t)toy_code(x[i], step);
}

void toy_decode(const uint8_t* payload, int64_t n, int add, float* out) {
    float step;
    memcpy(&step, payload, sizeof step);
    for (int64_t i = 0; i < n; ++i) {
        const float value = toy_value((int8_t)payload[4 + i], step);
        out[i] = add ? out[i] + value : value;
    }
}

}  // namespace
#endif
