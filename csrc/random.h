// Reproducible random numbers from the hash of an index and a seed.
#ifndef GCOMPRESS_RANDOM_H
#define GCOMPRESS_RANDOM_H

#include "simd.h"

namespace {

// Uniform in [0, 1).
inline float uniform(uint32_t i, uint32_t seed) {
    return (float)(int32_t)(hashed(i, seed) >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

}  // namespace
#endif
