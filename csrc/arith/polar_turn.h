// Polar, unbiased: by what blocks of entries are multiplied when they are turned and turned back (csrc/polar/turn.h).
#ifndef GCOMPRESS_ARITH_POLAR_TURN_H
#define GCOMPRESS_ARITH_POLAR_TURN_H

#include "eden.h"

namespace {

// What brings turned entries whose squares sum to `power` to the mean square 1.
GC_INLINE float turn_unit(double power, int64_t entries) { return (float)(1.0 / square_root(power / (double)entries)); }

// By what they are multiplied when turned back, if they were decoded without an error; `exponent` is the largest one.
GC_INLINE double turn_length(int exponent, bool whole, int64_t entries, float unit) {
    return two_to_the(exponent - 128) / (whole ? (double)entries : 1.0) / (double)unit;
}

// And in truth, by the ordered sums of turned entries' squares and of their products with decoded ones.
GC_INLINE float turn_scale(double length, double power, double dot) {
    const double scale = dot > 0.0 ? length * (power / dot) : 0.0;
    return scale >= (double)LARGEST ? LARGEST : (float)scale;
}

}  // namespace
#endif
