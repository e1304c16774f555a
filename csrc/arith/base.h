// The arithmetic that decides bytes stands in this folder, once for every compiler: that of the CPU's kernels
// (csrc/*.h), NVRTC for those of the GPU (csrc/cuda/), and the tests' emulation of a GPU.
//
// What differs between them must not matter: no fused multiply-add (-ffp-contract=off, --fmad=false), division and
// square root as IEEE 754 has them, denormals kept; no NaN goes through arithmetic to a byte (a GPU forgets its sign),
// no float out of range is converted to an integer, and no shift is as wide as its operand.
#ifndef GCOMPRESS_ARITH_BASE_H
#define GCOMPRESS_ARITH_BASE_H

#if defined(__CUDACC_RTC__)  // has no headers of the host
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#include <string.h>
#endif
#if defined(__CUDACC__)
#define GC_INLINE __device__ __forceinline__
#else
#define GC_INLINE inline
#endif

namespace {

const float SMALLEST_NORMAL = 1.17549435e-38f;
// Below 2^-110 a fixed-point scale of 65535 / magnitude overflows.
const float SMALLEST_FIXED = 7.70371978e-34f;
const float LARGEST = 3.40282347e38f;
const uint32_t INFINITY_KEY = 0x7f800000u, QUIET_NAN = 0x7fc00000u;

// An ordered sum (docs/FORMAT.md) has 16 lanes within blocks of 4096 terms; lanes in pairs, blocks in turn.
const int64_t SUM_BLOCK = 4096;
const int SUM_LANES = 16;

#if defined(__CUDACC__)
GC_INLINE uint32_t float_bits(float value) { return __float_as_uint(value); }
GC_INLINE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
GC_INLINE double bits_double(uint64_t bits) { return __longlong_as_double((long long)bits); }
GC_INLINE float magnitude_of(float value) { return fabsf(value); }
GC_INLINE double square_root(double value) { return sqrt(value); }
#else
GC_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
GC_INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
GC_INLINE double bits_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
GC_INLINE float magnitude_of(float value) { return __builtin_fabsf(value); }
GC_INLINE double square_root(double value) { return __builtin_sqrt(value); }
#endif

// No decoder makes infinity of finite numbers: the largest float of its sign instead. NaN stays.
GC_INLINE float saturated(float value) {
    value = value > LARGEST ? LARGEST : value;
    return value < -LARGEST ? -LARGEST : value;
}

// Whether products of a scale with numbers of up to `most` in magnitude need that: seldom, and it takes a while.
GC_INLINE bool may_overflow(float scale, float most) { return !(magnitude_of(scale) <= LARGEST / 2 / most); }

GC_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Nearest integer, ties to even, for |value| < 2^22: vectorises on every instruction set,
// unlike rintf, and equals it.
GC_INLINE int32_t round_even(float value) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    return (int32_t)(float_bits(value + magic) - float_bits(magic));
}

GC_INLINE float floor_small(float value) {  // |value| < 2^22
    const float nearest = (float)round_even(value);
    return nearest > value ? nearest - 1.0f : nearest;
}

// The random numbers of all compressors: a 32-bit hash of an index.
GC_INLINE uint32_t hashed(uint32_t i, uint32_t seed) {
    uint32_t h = i * 0x9E3779B9u + seed;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}

// Uniform in [0, 1).
GC_INLINE float uniform(uint32_t i, uint32_t seed) {
    return (float)(int32_t)(hashed(i, seed) >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

// An entry's key is its magnitude's bit pattern, which orders like the magnitude; NaN is above infinity, so a
// non-finite entry is always among the largest. In the unsigned form finite negative entries have key 0.
template <bool is_signed>
GC_INLINE uint32_t key_of(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
    if (is_signed) return magnitude;
    return (bits >> 31) && magnitude < INFINITY_KEY ? 0 : magnitude;
}

}  // namespace
#endif
