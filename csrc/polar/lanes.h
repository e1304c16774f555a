// Polar: 64 signed bytes side by side and 64 bits, in whatever vectors there are: what every step of the code works on.
//
// A tile is N rows of 64 lanes, one block a lane: entry (row, lane) is byte 64 row + lane, so nothing is transposed. A
// row of 64 values is one `Bytes`, its 64 bits one `Signs`.
#ifndef GCOMPRESS_POLAR_LANES_H
#define GCOMPRESS_POLAR_LANES_H

#include "../arith/polar.h"
#include "../cpu/simd.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

const int LANES = 64;
const int MAX_BLOCK = 16384;
const uint8_t PADDING_ROW = 255;

// 64 signed bytes (sums saturate at -128 and 127, magnitudes at 127), and 64 bits in the form that is cheapest to select by.
#if defined(__AVX512BW__)
typedef __m512i Bytes;
typedef uint64_t Signs;
inline Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(int8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes add_saturated(Bytes a, Bytes b) { return _mm512_adds_epi8(a, b); }
inline Bytes check_node(Bytes a, Bytes b) {
    return _mm512_max_epi8(_mm512_min_epi8(a, b), _mm512_subs_epi8(zero_bytes(), _mm512_max_epi8(a, b)));
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) { return _mm512_mask_subs_epi8(_mm512_adds_epi8(b, a), c, b, a); }
inline Bytes magnitude(Bytes a) { return _mm512_abs_epi8(_mm512_max_epi8(a, _mm512_set1_epi8(-127))); }
inline Bytes least(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
inline Signs negative(Bytes a) { return _mm512_movepi8_mask(a); }
inline Signs equal(Bytes a, Bytes b) { return _mm512_cmpeq_epi8_mask(a, b); }
inline Signs no_signs() { return 0; }
inline Signs exclusive_or(Signs a, Signs b) { return a ^ b; }
inline Signs both(Signs a, Signs b) { return a & b; }
inline Signs without(Signs a, Signs b) { return a & ~b; }
inline uint64_t word_of(Signs a) { return a; }
inline Bytes doubled_plus(Bytes a, Signs bit) {  // 2 a + bit
    const __m512i twice = _mm512_add_epi8(a, a);
    return _mm512_mask_sub_epi8(twice, bit, twice, _mm512_set1_epi8(-1));
}
#elif defined(__AVX2__)
struct Bytes {
    __m256i low, high;
};
typedef Bytes Signs;  // 0 or -1
#define GC_PAIR(expression_low, expression_high)      \
    Bytes result = {expression_low, expression_high}; \
    return result
inline Bytes load_bytes(const int8_t* p) {
    GC_PAIR(_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32)));
}
inline void store_bytes(int8_t* p, Bytes a) {
    _mm256_storeu_si256((__m256i*)p, a.low);
    _mm256_storeu_si256((__m256i*)(p + 32), a.high);
}
inline Bytes zero_bytes() { GC_PAIR(_mm256_setzero_si256(), _mm256_setzero_si256()); }
inline Bytes add_saturated(Bytes a, Bytes b) {
    GC_PAIR(_mm256_adds_epi8(a.low, b.low), _mm256_adds_epi8(a.high, b.high));
}
inline __m256i check_node_half(__m256i a, __m256i b) {
    return _mm256_max_epi8(_mm256_min_epi8(a, b), _mm256_subs_epi8(_mm256_setzero_si256(), _mm256_max_epi8(a, b)));
}
inline Bytes check_node(Bytes a, Bytes b) { GC_PAIR(check_node_half(a.low, b.low), check_node_half(a.high, b.high)); }
inline __m256i variable_node_half(__m256i a, __m256i b, __m256i c) {
    return _mm256_blendv_epi8(_mm256_adds_epi8(b, a), _mm256_subs_epi8(b, a), c);
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    GC_PAIR(variable_node_half(a.low, b.low, c.low), variable_node_half(a.high, b.high, c.high));
}
inline __m256i magnitude_half(__m256i a) { return _mm256_abs_epi8(_mm256_max_epi8(a, _mm256_set1_epi8(-127))); }
inline Bytes magnitude(Bytes a) { GC_PAIR(magnitude_half(a.low), magnitude_half(a.high)); }
inline Bytes least(Bytes a, Bytes b) { GC_PAIR(_mm256_min_epu8(a.low, b.low), _mm256_min_epu8(a.high, b.high)); }
inline Signs equal(Bytes a, Bytes b) { GC_PAIR(_mm256_cmpeq_epi8(a.low, b.low), _mm256_cmpeq_epi8(a.high, b.high)); }
inline Signs negative(Bytes a) {
    GC_PAIR(_mm256_cmpgt_epi8(_mm256_setzero_si256(), a.low), _mm256_cmpgt_epi8(_mm256_setzero_si256(), a.high));
}
inline Signs no_signs() { return zero_bytes(); }
inline Signs exclusive_or(Signs a, Signs b) { GC_PAIR(a.low ^ b.low, a.high ^ b.high); }
inline Signs both(Signs a, Signs b) { GC_PAIR(a.low & b.low, a.high & b.high); }
inline Signs without(Signs a, Signs b) { GC_PAIR(a.low & ~b.low, a.high & ~b.high); }
inline uint64_t word_of(Signs a) {
    return (uint32_t)_mm256_movemask_epi8(a.low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(a.high) << 32;
}
inline Bytes doubled_plus(Bytes a, Signs bit) {
    GC_PAIR(_mm256_sub_epi8(_mm256_add_epi8(a.low, a.low), bit.low),
            _mm256_sub_epi8(_mm256_add_epi8(a.high, a.high), bit.high));
}
#undef GC_PAIR
#else
// Four vectors of 16 bytes in the compiler's own notation: SSE2, NEON or whatever there is.
typedef int8_t Part __attribute__((vector_size(16)));
struct Bytes {
    Part part[4];
};
typedef Bytes Signs;  // 0 or -1
#if defined(__SSE2__)
inline Part add_saturated_part(Part a, Part b) { return (Part)_mm_adds_epi8((__m128i)a, (__m128i)b); }
inline Part subtract_saturated_part(Part a, Part b) { return (Part)_mm_subs_epi8((__m128i)a, (__m128i)b); }
#else
typedef uint8_t UnsignedPart __attribute__((vector_size(16)));
inline Part saturate(Part sum, Part overflow, Part a) {
    return (sum & ~(overflow >> 7)) | (((a >> 7) ^ 127) & (overflow >> 7));
}
inline Part add_saturated_part(Part a, Part b) {
    const Part sum = (Part)((UnsignedPart)a + (UnsignedPart)b);
    return saturate(sum, (a ^ sum) & (b ^ sum), a);
}
inline Part subtract_saturated_part(Part a, Part b) {
    const Part difference = (Part)((UnsignedPart)a - (UnsignedPart)b);
    return saturate(difference, (a ^ b) & (a ^ difference), a);
}
#endif
#define GC_PARTS(expression)                                   \
    Bytes result;                                              \
    for (int k = 0; k < 4; ++k) result.part[k] = (expression); \
    return result
inline Part select(Part where, Part a, Part b) { return (where & a) | (~where & b); }
inline Part larger(Part a, Part b) { return select(a > b, a, b); }
inline Part smaller(Part a, Part b) { return select(a > b, b, a); }
inline Bytes load_bytes(const int8_t* p) { return load<Bytes>(p); }
inline void store_bytes(int8_t* p, Bytes a) { store(p, a); }
inline Bytes zero_bytes() { GC_PARTS(Part{}); }
inline Bytes add_saturated(Bytes a, Bytes b) { GC_PARTS(add_saturated_part(a.part[k], b.part[k])); }
inline Bytes check_node(Bytes a, Bytes b) {
    GC_PARTS(larger(smaller(a.part[k], b.part[k]), subtract_saturated_part(Part{}, larger(a.part[k], b.part[k]))));
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    GC_PARTS(
        select(c.part[k], subtract_saturated_part(b.part[k], a.part[k]), add_saturated_part(b.part[k], a.part[k])));
}
inline Bytes magnitude(Bytes a) {
    GC_PARTS(select(a.part[k] < 0, subtract_saturated_part(Part{}, a.part[k]), a.part[k]));
}
inline Bytes least(Bytes a, Bytes b) { GC_PARTS(smaller(a.part[k], b.part[k])); }
inline Signs equal(Bytes a, Bytes b) { GC_PARTS(a.part[k] == b.part[k]); }
inline Signs negative(Bytes a) { GC_PARTS(a.part[k] < 0); }
inline Signs no_signs() { return zero_bytes(); }
inline Signs exclusive_or(Signs a, Signs b) { GC_PARTS(a.part[k] ^ b.part[k]); }
inline Signs both(Signs a, Signs b) { GC_PARTS(a.part[k] & b.part[k]); }
inline Signs without(Signs a, Signs b) { GC_PARTS(a.part[k] & ~b.part[k]); }
inline uint64_t word_of(Signs a) {
    uint64_t word = 0;
    for (int group = 0; group < 8; ++group) {  // eight low bits meet in the top byte of a product
        const uint64_t ones = load<uint64_t>((const char*)&a + 8 * group) & 0x0101010101010101ull;
        word |= ((ones * 0x0102040810204080ull) >> 56) << (8 * group);
    }
    return word;
}
inline Bytes doubled_plus(Bytes a, Signs bit) { GC_PARTS(((a.part[k] & 127) << 1) - bit.part[k]); }
#undef GC_PARTS
#endif

// a, or -a where c.
inline Bytes negate_where(Bytes a, Signs c) { return variable_node(a, zero_bytes(), c); }

// The sum of 64 signed bytes, in parts that `folded` adds up.
#if defined(__AVX512BW__)
typedef __m512i ByteSum;
inline ByteSum no_sum() { return _mm512_setzero_si512(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {  // 128 more for every byte
    return _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_xor_si512(a, _mm512_set1_epi8(-128)), zero_bytes()));
}
inline int64_t folded(ByteSum sum, int64_t rows) { return _mm512_reduce_add_epi64(sum) - 128 * LANES * rows; }
#elif defined(__AVX2__)
typedef __m256i ByteSum;
inline ByteSum no_sum() { return _mm256_setzero_si256(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {
    const __m256i zero = _mm256_setzero_si256(), top = _mm256_set1_epi8(-128);
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(a.low ^ top, zero));
    return _mm256_add_epi64(sum, _mm256_sad_epu8(a.high ^ top, zero));
}
inline int64_t folded(ByteSum sum, int64_t rows) {
    int64_t parts[4];
    memcpy(parts, &sum, sizeof parts);
    return parts[0] + parts[1] + parts[2] + parts[3] - 128 * LANES * rows;
}
#else
typedef int64_t ByteSum;
inline ByteSum no_sum() { return 0; }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {
    int8_t bytes[LANES];
    int16_t total = 0;
    store_bytes(bytes, a);
    for (int j = 0; j < LANES; ++j) total = (int16_t)(total + bytes[j]);  // vectorised
    return sum + total;
}
inline int64_t folded(ByteSum sum, int64_t) { return sum; }
#endif

// A row of `lanes` bytes, the rest 0; and its first `lanes` bytes to memory.
inline Bytes load_lanes(const int8_t* p, int lanes) {
    if (lanes == LANES) return load_bytes(p);
    int8_t row[LANES] = {0};
    memcpy(row, p, (size_t)lanes);
    return load_bytes(row);
}
inline void store_lanes(int8_t* p, Bytes a, int lanes) {
    if (lanes == LANES) return store_bytes(p, a);
    int8_t row[LANES];
    store_bytes(row, a);
    memcpy(p, row, (size_t)lanes);
}

// Signs from a word, the inverse of word_of.
inline Signs signs_of(uint64_t word) {
#if defined(__AVX512BW__)
    return word;
#elif defined(__AVX2__)
    const __m256i all = _mm256_set1_epi64x((long long)word),
                  bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i second = _mm256_or_si256(first, _mm256_set1_epi8(4));
    const __m256i low = _mm256_shuffle_epi8(all, first), high = _mm256_shuffle_epi8(all, second);
    Signs result = {_mm256_cmpeq_epi8(low & bits, bits), _mm256_cmpeq_epi8(high & bits, bits)};
    return result;
#else
    int8_t bytes[LANES];
    for (int j = 0; j < LANES; ++j) bytes[j] = (int8_t)-(int)(word >> j & 1);
    return load_bytes(bytes);
#endif
}

}  // namespace
#endif
