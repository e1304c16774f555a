// Natural: a sign and a randomly rounded exponent (gcompress/compressors/natural.py).
#ifndef GCOMPRESS_ARITH_NATURAL_H
#define GCOMPRESS_ARITH_NATURAL_H

#include "base.h"

namespace {

// The exponent of a magnitude's key; `word` is the entry's random one.
GC_INLINE uint8_t natural_exponent(int32_t key, uint32_t word) {
    const int32_t finite = key < (int32_t)INFINITY_KEY ? key : 0;
    int32_t exponent = (finite + (int32_t)(word >> 9)) >> 23;
    exponent = exponent < 254 ? exponent : 254;
    return (uint8_t)(key < (int32_t)INFINITY_KEY ? exponent : 255);
}

GC_INLINE float natural_value(uint32_t exponent, uint32_t sign) {
    return bits_float((exponent == 255 ? QUIET_NAN : exponent << 23) | sign << 31);
}

}  // namespace
#endif
