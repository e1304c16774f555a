// Sign and OneBit: the mean behind an ordered sum of magnitudes (gcompress/compressors/sign.py).
#ifndef GCOMPRESS_ARITH_SIGN_H
#define GCOMPRESS_ARITH_SIGN_H

#include "base.h"

namespace {

GC_INLINE float mean_of(double sum, int64_t count) {
    const float mean = (float)(sum / (double)(count > 0 ? count : 1));
    if (!(mean <= LARGEST)) return bits_float(QUIET_NAN);
    return mean < SMALLEST_NORMAL ? 0.0f : mean;
}

}  // namespace
#endif
