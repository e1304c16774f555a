// Reproducible random numbers: a 32-bit integer hash of an index and a seed.
#ifndef GCOMPRESS_RANDOM_H
#define GCOMPRESS_RANDOM_H

#include <stdint.h>

namespace {

inline uint32_t random_word(uint32_t i, uint32_t seed) {
    uint32_t h = i * 0x9E3779B9u + seed;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}

// Uniform in [0, 1).
inline float uniform(uint32_t i, uint32_t seed) {
    return (float)(int32_t)(random_word(i, seed) >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

}  // namespace
#endif
