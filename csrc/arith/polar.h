// Polar: what decides bytes in the sums, samples and limits of entries and in the nodes of the code (csrc/polar/,
// docs/FORMAT.md). Functions named four_… take four signed bytes in a word at once.
#ifndef GCOMPRESS_ARITH_POLAR_H
#define GCOMPRESS_ARITH_POLAR_H

#include "base.h"

namespace {

// What a subtree of the code is; everything but GENERAL has a short cut.
enum { GENERAL = 0, ALL_FROZEN = 1, ALL_FREE = 2, REPETITION = 3, SINGLE_PARITY = 4 };
const int MAX_REPETITION = 128;  // 128 * 128 fits 16 bits
const int MAX_PARITY = 64;
const int MAX_LEVELS = 8;    // with that many, labels are the samples themselves
const int8_t ERASED = -128;  // a sample that does not matter: padding, or sent apart
const int16_t WORST = 2047;  // of a path's metric: leaves four bits of a 16-bit key to the number of a candidate

// The same types from those of the two halves alone: a repetition has its one free position last, a parity check its
// one frozen position first.
GC_INLINE uint8_t subtree_type(uint8_t left, uint8_t right, int size) {
    if (left == ALL_FROZEN && right == ALL_FROZEN) return ALL_FROZEN;
    if (left == ALL_FREE && right == ALL_FREE) return ALL_FREE;
    if (left == ALL_FROZEN && size <= MAX_REPETITION && right == (size == 2 ? ALL_FREE : REPETITION)) return REPETITION;
    if (right == ALL_FREE && size >= 4 && size <= MAX_PARITY && left == (size == 4 ? REPETITION : SINGLE_PARITY))
        return SINGLE_PARITY;
    return GENERAL;
}

// What an entry adds to the sums of its row and its column.
GC_INLINE float sum_term(float value) { return magnitude_of(value) * 5.9604644775390625e-8f; }  // 2^-24

GC_INLINE float clamped(float value, float limit) {
    const float low = value < -limit ? -limit : value;
    return low > limit ? limit : low;
}
GC_INLINE int8_t sample_of(float value) { return (int8_t)round_even(clamped(value, 127.0f)); }
GC_INLINE int32_t energy_of(float value) {
    const int32_t rounded = round_even(clamped(value, 32767.0f));
    return rounded * rounded;
}

// The magnitude from which on an entry is an outlier; `of_row` is its row's factor times the slope.
GC_INLINE float outlier_limit(float of_row, float of_column, float intercept, float floor) {
    const float product = of_row * of_column, limit = product + intercept;
    return limit < floor ? floor : limit;
}

GC_INLINE uint32_t four_masks(uint32_t ones) { return ones * 255u; }  // 1 to 0xff in each byte
GC_INLINE uint32_t four_signs(uint32_t a) { return a >> 7 & 0x01010101u; }
GC_INLINE int32_t byte_of(uint32_t a, int number) { return (int8_t)(a >> (8 * number)); }

// Bit k to byte k, and the sign of byte k to bit k.
GC_INLINE uint32_t four_ones(uint32_t bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }
GC_INLINE uint32_t four_bits(uint32_t a) { return four_signs(a) * 0x01020408u >> 24 & 15u; }

// min(127, |a|)
GC_INLINE uint32_t four_magnitudes(uint32_t a) {
    const uint32_t minus = four_signs(a), sum = (a ^ four_masks(minus)) + minus;
    return sum - four_signs(sum);
}

// The check node: the product of signs with the lesser magnitude.
GC_INLINE uint32_t four_check_nodes(uint32_t a, uint32_t b) {
    const uint32_t one = four_magnitudes(a), other = four_magnitudes(b);
    const uint32_t not_less = four_masks(four_signs((one | 0x80808080u) - other)), minus = four_signs(a ^ b);
    const uint32_t least = ((one & ~not_less) | (other & not_less)) ^ four_masks(minus);
    return ((least & 0x7f7f7f7fu) + minus) ^ (least & 0x80808080u);
}

// The variable node: b + a, or b - a where a byte of `c` is 1, saturated at -128 and 127.
GC_INLINE uint32_t four_variable_nodes(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t turned = a ^ four_masks(c);
    const uint32_t sum = ((turned & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu) + c) ^ ((turned ^ b) & 0x80808080u);
    const uint32_t beyond = four_masks(four_signs((turned ^ sum) & (b ^ sum)));
    return (sum & ~beyond) | ((0x7f7f7f7fu + four_signs(b)) & beyond);
}

}  // namespace
#endif
