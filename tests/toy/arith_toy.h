// Toy: an entry to its code and back (tests/toy/toy.py).
#ifndef GCOMPRESS_ARITH_TOY_H
#define GCOMPRESS_ARITH_TOY_H

#include "base.h"

namespace {

GC_INLINE float toy_step(uint32_t largest_key) {
    const float step = bits_float(largest_key) / 127.0f;
    if (largest_key >= INFINITY_KEY) return bits_float(QUIET_NAN);
    return step < SMALLEST_NORMAL ? 0.0f : step;
}

GC_INLINE int8_t toy_code(float value, float step) {
    const float steps = value / step;
    if (steps != steps) return 0;
    return (int8_t)round_even(steps < -127.0f ? -127.0f : steps > 127.0f ? 127.0f : steps);
}

GC_INLINE float toy_value(int8_t code, float step) {
    const float value = code * step;
    return value > LARGEST ? LARGEST : value < -LARGEST ? -LARGEST : value;
}

}  // namespace
#endif
