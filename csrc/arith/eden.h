// Eden: a random rotation of blocks, Lloyd-Max levels, a scale per block (gcompress/compressors/eden.py).
#ifndef GCOMPRESS_ARITH_EDEN_H
#define GCOMPRESS_ARITH_EDEN_H

#include "base.h"

namespace {

enum { EDEN_LARGEST_BLOCK = 16384 };
const uint32_t EDEN_TAIL_WORDS = 0x80000000u, EDEN_PART_WORDS = 0x40000000u;

// Changes the sign of a float where its bit, of 32 a word, is set.
GC_INLINE float flipped(float value, uint32_t bits, int64_t j) {
    return bits_float(float_bits(value) ^ (bits >> (j & 31) << 31));
}

GC_INLINE float eden_root(int64_t part) { return (float)(1.0 / square_root((double)part)); }

// The rotated entries that are sent, when not all are: every prime-th, from a random one on.
GC_INLINE int64_t eden_step(uint32_t word, int64_t entries) {
    const int64_t primes[8] = {16411, 16417, 16421, 16427, 16433, 16447, 16451, 16453};
    return primes[word & 7] % entries;
}
GC_INLINE int64_t eden_start(uint32_t word, int64_t entries) { return (int64_t)(word >> 3) % entries; }

// Between two levels, in units of 1/8192 deviation; and what brings a block whose squares sum to `power` to units.
GC_INLINE float eden_border(float lower, float upper) { return (lower + upper) * 0.5f; }
GC_INLINE float eden_units(double power, int64_t entries) {
    return (float)(8192.0 / square_root(power / (double)entries));
}

GC_INLINE double two_to_the(int exponent) { return bits_double((uint64_t)(exponent + 1023) << 52); }

// A block's scale by the ordered sums of its squares, of magnitudes times levels, and of squared levels.
GC_INLINE float eden_scale(double power, double dot, double squares, bool unbiased, int exponent, bool whole,
                           int64_t entries) {
    if (!(dot > 0.0)) return 0.0f;
    double scale = unbiased ? power / dot : dot / squares;
    scale = scale * two_to_the(exponent - 128) / (whole ? (double)entries : 1.0);
    if (scale >= (double)LARGEST) return LARGEST;
    const float rounded = (float)scale;
    return rounded >= SMALLEST_NORMAL ? rounded : 0.0f;
}

}  // namespace
#endif
