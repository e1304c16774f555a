// QSGD: random rounding to multiples of norm / s (gcompress/compressors/qsgd.py).
#ifndef GCOMPRESS_ARITH_QSGD_H
#define GCOMPRESS_ARITH_QSGD_H

#include "base.h"

namespace {

struct QsgdScale {
    float step, inverse;  // both 0 where the step is too small, or the bucket not finite
    bool finite;
};

// Of a bucket by the ordered sum of its squares and the key of its largest magnitude.
GC_INLINE QsgdScale qsgd_scale(double squares, int32_t largest, bool largest_norm, int levels) {
    const float limit = 3.4e38f;
    float norm = largest_norm ? bits_float((uint32_t)largest) : (float)square_root(squares);
    norm = norm > limit ? limit : norm;
    QsgdScale scale = {norm / (float)levels, 0.0f, largest < (int32_t)INFINITY_KEY};
    const bool usable = scale.finite && scale.step >= SMALLEST_NORMAL;
    scale.inverse = usable ? (float)levels / norm : 0.0f;
    scale.step = usable ? scale.step : 0.0f;
    return scale;
}

GC_INLINE float qsgd_sent_step(const QsgdScale& scale) { return scale.finite ? scale.step : bits_float(QUIET_NAN); }

// `draw` is uniform in [0, 1); a value of a bucket that is not finite must be passed as a zero.
GC_INLINE uint8_t qsgd_code(float value, float inverse, float draw, int levels) {
    const float scaled = magnitude_of(value) * inverse;
    int32_t m = (int32_t)floor_small(scaled + draw);
    m = m < levels ? m : levels;
    const int32_t minus = (int32_t)float_bits(value) >> 31;
    return (uint8_t)(levels + ((m ^ minus) - minus));
}

GC_INLINE float qsgd_value(uint8_t code, float levels, float step) { return ((float)code - levels) * step; }

}  // namespace
#endif
