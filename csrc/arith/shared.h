// SharedScale: integers that add up in 64-bit words (gcompress/compressors/shared.py).
#ifndef GCOMPRESS_ARITH_SHARED_H
#define GCOMPRESS_ARITH_SHARED_H

#include "base.h"

namespace {

const int64_t WORDS = 64;  // of a block; field f of word j is its entry 64 f + j

GC_INLINE float shared_step(float scale, int limit) {
    if (key_of<true>(scale) >= INFINITY_KEY) return bits_float(QUIET_NAN);
    const float step = scale / (float)limit;
    return step >= SMALLEST_NORMAL ? step : 0.0f;
}
GC_INLINE float shared_inverse(float step) { return step >= SMALLEST_NORMAL ? 1.0f / step : 0.0f; }

// A code from -limit to limit; `draw`, uniform in [0, 1), is used by stochastic rounding. A value of a bucket that is
// not finite must be passed as 0.
GC_INLINE int32_t shared_code(float value, float inverse, float top, bool stochastic, float draw) {
    float scaled = value * inverse;
    scaled = stochastic ? floor_small(scaled + draw) : scaled;
    scaled = scaled < -top ? -top : scaled;
    scaled = scaled > top ? top : scaled;
    return round_even(scaled);
}

GC_INLINE float shared_value(int32_t code, float step) { return saturated((float)code * step); }

GC_INLINE uint64_t bias_of(int width, int fields) {
    uint64_t bias = 0;
    for (int f = 0; f < fields; ++f) bias |= 1ull << (width * f + width - 1);
    return bias;
}

}  // namespace
#endif
