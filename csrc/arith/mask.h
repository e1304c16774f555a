// MaskSparse: magnitudes of dropped entries and their classes (gcompress/compressors/mask.py).
#ifndef GCOMPRESS_ARITH_MASK_H
#define GCOMPRESS_ARITH_MASK_H

#include "base.h"

namespace {

// A dropped entry's magnitude in 1/65535 of the threshold: every later decision and sum is
// on these integers, so their order does not matter.
const int FIXED_ONE = 65535;
const int BINS = 4096;

struct MaskScale {
    float threshold, to_fixed;
    uint32_t limit;  // keys above it carry no magnitude: kept, or not finite
};

GC_INLINE MaskScale mask_scale(uint32_t threshold_key) {
    MaskScale scale = {0.0f, 0.0f, threshold_key};
    const float threshold = bits_float(threshold_key);
    if (threshold_key >= INFINITY_KEY) {
        scale.limit = INFINITY_KEY - 1;
    } else if (threshold >= SMALLEST_FIXED) {
        scale.threshold = threshold;
        scale.to_fixed = (float)FIXED_ONE / threshold;
    }
    return scale;
}

GC_INLINE int32_t fixed_magnitude(uint32_t key, const MaskScale& scale) {
    const float magnitude = key > scale.limit ? 0.0f : bits_float(key);
    return round_even(magnitude * scale.to_fixed);
}

// The classes of dropped entries: 0 to `half`; `sent` of them have a level in the payload. In the signed form
// codes stand on both sides of `centre`; the code `codes` means kept.
struct MaskShape {
    int codes, half, steps, centre, sent;
};

GC_INLINE constexpr MaskShape mask_shape(int bits, bool is_signed) {
    MaskShape shape = {0, 0, 0, 0, 0};
    shape.codes = (1 << bits) - 1;
    shape.half = is_signed ? (shape.codes - 1) / 2 : shape.codes - 1;
    shape.steps = shape.half + 1;
    shape.centre = is_signed ? shape.half : 0;
    shape.sent = is_signed ? shape.half : shape.codes;
    return shape;
}

GC_INLINE int32_t linear_class(int32_t fixed, int steps, int half) {
    const int32_t nearest = (fixed * steps + (1 << 15)) >> 16;
    return nearest < half ? nearest : half;
}

// Lloyd's iteration on a histogram of fixed magnitudes, in double precision: where it begins, the first bin of the
// class of the upper of two levels, and a class's level by its members.
GC_INLINE double lloyd_start(int m, int steps) { return (double)m * FIXED_ONE / steps; }
GC_INLINE int lloyd_border(double lower, double upper) { return (int)(((lower + upper) / 2.0 + 8.0) / 16.0); }
GC_INLINE double lloyd_level(int64_t sum, int64_t members) { return (double)sum / (double)members; }
const int LLOYD_ROUNDS = 100;

// The level that is sent for a class, by the sum of its fixed magnitudes.
GC_INLINE float mask_level(int64_t sum, int64_t members, float threshold) {
    if (members <= 0) return 0.0f;
    return (float)((double)sum / (double)members * ((double)threshold / (double)FIXED_ONE));
}

}  // namespace
#endif
