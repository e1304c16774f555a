// Ternary: minus, zero or plus one scale, five trits a byte (gcompress/compressors/ternary.py).
#ifndef GCOMPRESS_ARITH_TERNARY_H
#define GCOMPRESS_ARITH_TERNARY_H

#include "base.h"

namespace {

const int64_t TRIT_GROUP = 320;  // entries in 64 bytes

struct TernaryScale {
    float scale, bound;  // bound: nearest rounding keeps what is above
    bool finite;
};

GC_INLINE float ternary_rounded(double scale) {
    const float rounded = (float)scale;
    return rounded >= SMALLEST_NORMAL ? rounded : 0.0f;
}
// Stochastic rounding: the largest magnitude, or `clip` root mean squares.
GC_INLINE float ternary_clipped(double squares, int32_t largest, int64_t count, double clip) {
    double scale = (double)bits_float((uint32_t)largest);
    const double limit = clip * square_root(squares / (double)count);
    if (clip > 0.0 && limit < scale) scale = limit;
    return ternary_rounded(scale);
}
// Nearest: what is above 3/4 of the mean magnitude is kept; the scale is the mean of those.
GC_INLINE float ternary_bound(double sum, int64_t count) { return (float)(0.75 * (sum / (double)count)); }
GC_INLINE float ternary_mean(double above, int64_t members) {
    return ternary_rounded(above / (double)(members > 0 ? members : 1));
}

GC_INLINE float ternary_sent(const TernaryScale& scale) { return scale.finite ? scale.scale : bits_float(QUIET_NAN); }
GC_INLINE bool ternary_usable(const TernaryScale& scale) { return scale.finite && scale.scale > 0.0f; }
GC_INLINE uint8_t trit_of(float value, float bound) {
    const int32_t side = 1 - 2 * (int32_t)(float_bits(value) >> 31);
    return (uint8_t)(1 + (magnitude_of(value) > bound ? side : 0));
}
GC_INLINE float trit_value(uint8_t trit, float scale) { return ((float)trit - 1.0f) * scale; }

}  // namespace
#endif
