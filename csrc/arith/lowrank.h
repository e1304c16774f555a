// LowRank: an entry of the product of two thin matrices (gcompress/compressors/lowrank.py).
#ifndef GCOMPRESS_ARITH_LOWRANK_H
#define GCOMPRESS_ARITH_LOWRANK_H

#include "base.h"

namespace {

// For an entry whose sum in single precision is not finite: finite factors have a finite one in double precision.
GC_INLINE float lowrank_wide(const float* left, const float* right, int64_t rank, int64_t columns) {
    double sum = 0.0;
    for (int64_t k = 0; k < rank; ++k) sum = sum + (double)left[k] * (double)right[k * columns];
    const double limit = (double)LARGEST, infinity = (double)bits_float(INFINITY_KEY);
    if (sum > limit && sum < infinity) return LARGEST;
    if (sum < -limit && sum > -infinity) return -LARGEST;
    return (float)sum;
}

}  // namespace
#endif
