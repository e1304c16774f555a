// Quantize: a grid per bucket (gcompress/compressors/quantize.py).
#ifndef GCOMPRESS_ARITH_QUANTIZE_H
#define GCOMPRESS_ARITH_QUANTIZE_H

#include "base.h"

namespace {

struct Grid {
    float step, inverse, zero;
    bool finite;
};

GC_INLINE float inverse_of(float step) { return step >= SMALLEST_NORMAL ? 1.0f / step : 0.0f; }

// Float order as integer order, so that minimum and maximum vectorise and show NaN too.
GC_INLINE int32_t ordered_pattern(float value) {
    const int32_t pattern = (int32_t)float_bits(value);
    return pattern ^ (int32_t)((uint32_t)(pattern >> 31) >> 1);
}

// Of a bucket whose ordered patterns, and 0, reach from `low` to `high`.
GC_INLINE bool is_finite_range(int32_t low, int32_t high) {
    return high < (int32_t)INFINITY_KEY && ~low < (int32_t)INFINITY_KEY;
}
GC_INLINE float range_top(int32_t high) { return bits_float((uint32_t)high); }
GC_INLINE float range_bottom(int32_t low) { return low < 0 ? -bits_float((uint32_t)~low) : 0.0f; }

GC_INLINE Grid poisoned_grid(int bits) {
    const Grid grid = {bits_float(QUIET_NAN), 0.0f, bits == 1 ? 0.5f : 0.0f, false};
    return grid;
}

// With 1 bit: the largest magnitude, 0 where nearest rounding cannot say its mean; the factor of fixed magnitudes;
// the mean behind their sum, which errs least; and the grid of either.
GC_INLINE float one_bit_largest(float top, float bottom, bool stochastic) {
    const float half = top > -bottom ? top : -bottom;
    return !stochastic && half < SMALLEST_FIXED ? 0.0f : half;
}
GC_INLINE float one_bit_factor(float largest) { return 65535.0f / largest; }
GC_INLINE float one_bit_mean(int64_t sum, int64_t count, float largest) {
    return (float)((double)sum / (double)count * ((double)largest / 65535.0));
}
GC_INLINE Grid one_bit_grid(float half) {
    Grid grid = {0.0f, 0.0f, 0.5f, true};
    grid.step = half < SMALLEST_NORMAL ? 0.0f : half > LARGEST / 2 ? LARGEST : half + half;
    grid.inverse = inverse_of(grid.step);
    return grid;
}

// With more bits. Stochastic rounding needs a spare level, since zero falls on a code exactly.
GC_INLINE Grid range_grid(float top, float bottom, bool stochastic, int bits) {
    Grid grid = {0.0f, 0.0f, 0.0f, true};
    const int levels = (1 << bits) - 1;
    const float span = (float)(stochastic && bottom < 0.0f && top > 0.0f ? levels - 1 : levels);
    const float step = top / span - bottom / span;
    if (!(step >= SMALLEST_NORMAL)) return grid;
    grid.step = step;
    grid.inverse = inverse_of(step);
    const float below = -bottom * grid.inverse;
    const float zero = stochastic ? -floor_small(-below) : (float)round_even(below);
    grid.zero = zero < (float)levels ? zero : (float)levels;  // rounding may have made `below` larger
    return grid;
}

GC_INLINE uint8_t quantized(float value, const Grid& grid, float dither, bool stochastic, int bits) {
    const float scaled = value * grid.inverse;
    float code;
    if (bits == 1)
        code = floor_small((scaled + 0.5f) + dither);
    else
        code = (stochastic ? floor_small(scaled + dither) : (float)round_even(scaled)) + grid.zero;
    const float top = (float)((1 << bits) - 1);
    code = code < 0.0f ? 0.0f : code;
    code = code > top ? top : code;
    return (uint8_t)(int32_t)code;
}

// `limited` may be false unless a product of the step may overflow.
GC_INLINE float dequantized(uint8_t code, float zero, float step, bool limited) {
    const float value = ((float)code - zero) * step;
    return limited ? saturated(value) : value;
}

}  // namespace
#endif
