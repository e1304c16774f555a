// Dct: what keeps sums of large entries finite (gcompress/compressors/dct.py).
#ifndef GCOMPRESS_ARITH_DCT_H
#define GCOMPRESS_ARITH_DCT_H

#include "base.h"

namespace {

const float DCT_DOWN = 9.31322574615478515625e-10f, DCT_UP = 1073741824.0f;  // 2^-30, 2^30

// Whether a block of this largest key is scaled down: from 2^100 on.
GC_INLINE bool dct_may_overflow(uint32_t largest_key) { return largest_key >> 23 >= 227; }

}  // namespace
#endif
