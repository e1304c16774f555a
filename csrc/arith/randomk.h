// RandomK: one entry of each of k runs, drawn by a seed (gcompress/compressors/randomk.py).
#ifndef GCOMPRESS_ARITH_RANDOMK_H
#define GCOMPRESS_ARITH_RANDOMK_H

#include "base.h"

namespace {

// The entry drawn from a run that begins with `first`.
GC_INLINE int64_t drawn_entry(int64_t run, int64_t first, int64_t length, uint32_t seed) {
    return first + (int64_t)((uint64_t)hashed((uint32_t)run, seed) * (uint64_t)length >> 32);
}
GC_INLINE float drawn_value(float value, int64_t length, bool unbiased) {
    return unbiased ? saturated(value * (float)length) : value;
}

}  // namespace
#endif
