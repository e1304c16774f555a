// Casts to 16, 8 and 4 bit floats (gcompress/compressors/casts.py).
#ifndef GCOMPRESS_ARITH_CAST_H
#define GCOMPRESS_ARITH_CAST_H

#include "base.h"

namespace {

enum { CAST_FP16 = 0, CAST_FP8 = 1, CAST_MXFP4 = 2 };

template <int form>
struct Cast;
template <>
struct Cast<CAST_FP16> {
    enum { WIDTH = 16, MANTISSA = 10, BIAS = 15, TOP = 0x7bff, TARGET = 14, CARRY = 0 };
    typedef uint16_t Code;
};
template <>
struct Cast<CAST_FP8> {
    enum { WIDTH = 8, MANTISSA = 3, BIAS = 7, TOP = 0x7e, TARGET = 7, CARRY = 0 };
    typedef uint8_t Code;
};
template <>
struct Cast<CAST_MXFP4> {
    enum { WIDTH = 4, MANTISSA = 1, BIAS = 1, TOP = 7, TARGET = 2, CARRY = 0x17ffff };
    typedef uint8_t Code;
};
const int32_t SMALLEST_EXPONENT = 15;

GC_INLINE float power_of_two(int exponent) { return bits_float((uint32_t)(127 + exponent) << 23); }

// Adding a power of two whose last place is the code's rounds to it: that of the magnitude's own exponent, and
// not less than that of the smallest normal code, below which codes are multiples of one unit.
template <int form>
GC_INLINE int32_t finite_code(uint32_t key) {
    typedef Cast<form> C;
    const int32_t smallest = (128 - C::BIAS) << 23;
    int32_t exponent = (int32_t)(key & INFINITY_KEY);
    exponent = exponent > smallest ? exponent : smallest;
    const float unit = bits_float((uint32_t)(exponent + ((23 - C::MANTISSA) << 23)));
    const int32_t units = (int32_t)(float_bits(bits_float(key) + unit) - float_bits(unit));
    const int32_t code = units + ((exponent - smallest) >> (23 - C::MANTISSA));
    return code < C::TOP ? code : C::TOP;
}

template <int form>
GC_INLINE int32_t any_code(uint32_t key, int32_t top) {
    if (key < INFINITY_KEY) return finite_code<form>(key) < top ? finite_code<form>(key) : top;
    if (form == CAST_MXFP4) return Cast<form>::TOP;
    return form == CAST_FP8 ? 0x7f : key == INFINITY_KEY ? 0x7c00 : 0x7e00;
}

template <int form>
GC_INLINE float from_code(uint32_t code) {
    typedef Cast<form> C;
    const uint32_t magnitude = code & ((1u << (C::WIDTH - 1)) - 1);
    uint32_t normal = (magnitude << (23 - C::MANTISSA)) + ((uint32_t)(127 - C::BIAS) << 23);
    if (form == CAST_FP16) normal += magnitude >= 0x7c00 ? 112u << 23 : 0;
    if (form == CAST_FP8) normal = magnitude == 0x7f ? 0x7fc00000u : normal;
    const uint32_t small = float_bits((float)(int32_t)magnitude * power_of_two(1 - C::BIAS - C::MANTISSA));
    const uint32_t value = magnitude < 1u << C::MANTISSA ? small : normal;
    return bits_float(value | code >> (C::WIDTH - 1) << 31);
}

struct CastScale {
    float factor;   // brings the largest finite magnitude to 2^target
    bool ordinary;  // all entries are finite and `top` is the format's
    int32_t top;    // the largest code that does not decode to infinity
    uint8_t byte;   // E8M0
};

// Of a bucket by the keys of its largest finite magnitude and of its largest one.
template <int form>
GC_INLINE CastScale cast_scale(int32_t largest, int32_t top) {
    typedef Cast<form> C;
    const int32_t exponent = (largest + C::CARRY) >> 23;
    const int32_t byte = (exponent > SMALLEST_EXPONENT ? exponent : SMALLEST_EXPONENT) - C::TARGET;
    CastScale scale;
    const bool finite = top < (int32_t)INFINITY_KEY;
    const int32_t below_infinity = ((255 - byte + C::BIAS) << C::MANTISSA) - 1;
    scale.top = below_infinity < C::TOP ? below_infinity : (int32_t)C::TOP;
    scale.ordinary = finite && scale.top == C::TOP;
    scale.factor = bits_float((uint32_t)(254 - byte) << 23);
    scale.byte = (uint8_t)(form == CAST_MXFP4 && !finite ? 255 : byte);
    return scale;
}

// The factor by which codes of a bucket decode.
GC_INLINE float cast_back(uint32_t byte) { return bits_float(byte == 255 ? QUIET_NAN : byte << 23); }

// `below`: what is added to the 16 bits that are cut off, from 0 to ffff.
GC_INLINE uint16_t bf16_code(uint32_t pattern, uint32_t below) {
    const int32_t key = (int32_t)(pattern & 0x7fffffffu);
    int32_t code = (int32_t)(((uint32_t)key + below) >> 16);
    code = code > 0x7f7f ? 0x7f7f : code;
    code = key == (int32_t)INFINITY_KEY ? 0x7f80 : code;
    code = key > (int32_t)INFINITY_KEY ? 0x7fc0 : code;
    return (uint16_t)(code | (int32_t)(pattern >> 31 << 15));
}

// To nearest, ties to even; or at random, the larger neighbour as often as the entry is near to it.
GC_INLINE uint16_t to_bf16(float value, bool stochastic, uint32_t index, uint32_t seed) {
    const uint32_t pattern = float_bits(value);
    return bf16_code(pattern, stochastic ? hashed(index, seed) >> 16 : 0x7fff + (pattern >> 16 & 1));
}

GC_INLINE float from_bf16(uint16_t code) { return bits_float((uint32_t)code << 16); }

}  // namespace
#endif
