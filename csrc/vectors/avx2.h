// Vectors of 32 bytes: AVX2 with F16C.
#ifndef GCOMPRESS_VECTORS_AVX2_H
#define GCOMPRESS_VECTORS_AVX2_H

#include <immintrin.h>

#include "vectors.h"

namespace {

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
inline Bytes every_byte(int8_t a) { GC_PAIR(_mm256_set1_epi8(a), _mm256_set1_epi8(a)); }
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
inline Bytes magnitude_to_128(Bytes a) { GC_PAIR(_mm256_abs_epi8(a.low), _mm256_abs_epi8(a.high)); }
inline Bytes least(Bytes a, Bytes b) { GC_PAIR(_mm256_min_epu8(a.low, b.low), _mm256_min_epu8(a.high, b.high)); }
inline __m256i shortfall_half(__m256i a) {
    return _mm256_subs_epi8(_mm256_setzero_si256(), _mm256_min_epi8(a, _mm256_setzero_si256()));
}
inline Bytes shortfall(Bytes a) { GC_PAIR(shortfall_half(a.low), shortfall_half(a.high)); }
inline Bytes different(Bytes a, Bytes b) { GC_PAIR(a.low ^ b.low, a.high ^ b.high); }
inline Bytes choose(Signs where, Bytes a, Bytes b) {
    GC_PAIR(_mm256_blendv_epi8(b.low, a.low, where.low), _mm256_blendv_epi8(b.high, a.high, where.high));
}
inline Signs less(Bytes a, Bytes b) { GC_PAIR(_mm256_cmpgt_epi8(b.low, a.low), _mm256_cmpgt_epi8(b.high, a.high)); }
inline Signs equal(Bytes a, Bytes b) { GC_PAIR(_mm256_cmpeq_epi8(a.low, b.low), _mm256_cmpeq_epi8(a.high, b.high)); }
inline Signs negative(Bytes a) {
    GC_PAIR(_mm256_cmpgt_epi8(_mm256_setzero_si256(), a.low), _mm256_cmpgt_epi8(_mm256_setzero_si256(), a.high));
}
inline Signs has_bit(Bytes a, int bit) {  // by the top of its byte, which alone is looked at
    GC_PAIR(_mm256_slli_epi16(a.low, 7 - bit), _mm256_slli_epi16(a.high, 7 - bit));
}
inline Signs no_signs() { return zero_bytes(); }
inline Bytes cleared(Bytes a, Signs where) {
    GC_PAIR(_mm256_andnot_si256(where.low, a.low), _mm256_andnot_si256(where.high, a.high));
}
inline Signs exclusive_or(Signs a, Signs b) { return different(a, b); }
inline Signs both(Signs a, Signs b) { GC_PAIR(a.low & b.low, a.high & b.high); }
inline Signs without(Signs a, Signs b) { GC_PAIR(a.low & ~b.low, a.high & ~b.high); }
inline uint64_t word_of(Signs a) {
    return (uint32_t)_mm256_movemask_epi8(a.low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(a.high) << 32;
}
inline Signs signs_of(uint64_t word) {
    const __m256i all = _mm256_set1_epi64x((long long)word),
                  bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i second = _mm256_or_si256(first, _mm256_set1_epi8(4));
    const __m256i low = _mm256_shuffle_epi8(all, first), high = _mm256_shuffle_epi8(all, second);
    GC_PAIR(_mm256_cmpeq_epi8(low & bits, bits), _mm256_cmpeq_epi8(high & bits, bits));
}
inline Bytes bytes_of(Signs a) { return a; }
inline Signs signs_in(Bytes a) { return a; }
inline Bytes doubled_plus(Bytes a, Signs bit) {
    GC_PAIR(_mm256_sub_epi8(_mm256_add_epi8(a.low, a.low), bit.low),
            _mm256_sub_epi8(_mm256_add_epi8(a.high, a.high), bit.high));
}

enum { HAS_SHUFFLES = 1 };
inline Bytes shuffled(Bytes a, Bytes index) {
    GC_PAIR(_mm256_shuffle_epi8(a.low, index.low), _mm256_shuffle_epi8(a.high, index.high));
}
inline Bytes lower_four(Bytes index) { return index; }
inline Bytes repeat_16(const int8_t* p) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    GC_PAIR(both, both);
}
inline void interleave_halves(__m256i low, __m256i high, uint16_t* values) {
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    _mm256_storeu_si256((__m256i*)values, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i*)(values + 16), _mm256_permute2x128_si256(first, second, 0x31));
}
inline void interleave_bytes(Bytes low, Bytes high, uint16_t* values) {
    interleave_halves(low.low, high.low, values);
    interleave_halves(low.high, high.high, values + 32);
}

typedef int16_t Shorts __attribute__((vector_size(32)));
inline Shorts least(Shorts a, Shorts b) { return (Shorts)_mm256_min_epi16((__m256i)a, (__m256i)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)_mm256_shuffle_epi8((__m256i)a, (__m256i)index); }
const int MOST_SHORTS = 4;
struct Metrics {
    Shorts part[MOST_SHORTS];
};
inline Metrics widen(Bytes a) {
    return {{(Shorts)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a.low)),
             (Shorts)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(a.low, 1)),
             (Shorts)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a.high)),
             (Shorts)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(a.high, 1))}};
}
inline Bytes narrow(const Metrics& a) {  // values beyond -128 … 127 become those
    const __m256i low = _mm256_packs_epi16((__m256i)a.part[0], (__m256i)a.part[1]);
    const __m256i high = _mm256_packs_epi16((__m256i)a.part[2], (__m256i)a.part[3]);
    GC_PAIR(_mm256_permute4x64_epi64(low, 0xd8), _mm256_permute4x64_epi64(high, 0xd8));
}
inline Signs negative(const Metrics& a) { return negative(narrow(a)); }

typedef __m256i ByteSum;
inline ByteSum no_sum() { return _mm256_setzero_si256(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {  // 128 more for every byte
    const __m256i zero = _mm256_setzero_si256(), top = _mm256_set1_epi8(-128);
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(a.low ^ top, zero));
    return _mm256_add_epi64(sum, _mm256_sad_epu8(a.high ^ top, zero));
}
inline int64_t folded(ByteSum sum, int64_t rows) {
    int64_t parts[4];
    memcpy(parts, &sum, sizeof parts);
    return parts[0] + parts[1] + parts[2] + parts[3] - 128 * LANES * rows;
}

typedef __m256i Dots;
inline Dots no_dots() { return _mm256_setzero_si256(); }
inline Dots with_half_products(Dots sum, __m256i a_low, __m256i a_high, __m256i b_low, __m256i b_high) {
    sum = _mm256_add_epi32(sum,
                           _mm256_madd_epi16(_mm256_unpacklo_epi8(a_low, a_high), _mm256_unpacklo_epi8(b_low, b_high)));
    return _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_unpackhi_epi8(a_low, a_high), _mm256_unpackhi_epi8(b_low, b_high)));
}
inline Dots with_products(Dots sum, Bytes a_low, Bytes a_high, Bytes b_low, Bytes b_high) {
    sum = with_half_products(sum, a_low.low, a_high.low, b_low.low, b_high.low);
    return with_half_products(sum, a_low.high, a_high.high, b_low.high, b_high.high);
}

enum { WIDE = 8 };
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256i Lanes;  // by their top bits
GC_HOT Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
GC_HOT void store_floats(float* p, Floats a) { _mm256_storeu_ps(p, a); }
GC_HOT void stream_floats(float* p, Floats a) { _mm256_stream_ps(p, a); }
GC_HOT void finish_streams() { _mm_sfence(); }
GC_HOT Floats every_float(float a) { return _mm256_set1_ps(a); }
GC_HOT Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
GC_HOT Ints every_int(int32_t a) { return _mm256_set1_epi32(a); }
GC_HOT Lanes above(Ints a, Ints b) { return _mm256_cmpgt_epi32(a, b); }
GC_HOT Lanes top_bits(Ints a) { return a; }
template <class Test>
GC_HOT uint64_t word_where(const Test& test) {
    uint64_t word = 0;
    for (int part = 0; part < 8; ++part)
        word |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(test(8 * part))) << (8 * part);
    return word;
}
GC_HOT __m256 bits_to_tops(uint64_t bits) {
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32((int)(uint32_t)bits), to_top));
}
GC_HOT Floats choose_by_bits(uint64_t bits, Floats ones, Floats zeros) {
    return _mm256_blendv_ps(zeros, ones, bits_to_tops(bits));
}
GC_HOT Floats negate_by_bits(uint64_t bits, Floats a) {
    return _mm256_xor_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0f), bits_to_tops(bits)));
}

GC_HOT Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
GC_HOT Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
GC_HOT Ints rounded(Floats a) { return _mm256_cvtps_epi32(a); }
template <class From>
GC_HOT Bytes limited_bytes(const From& from, int more) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), all = _mm256_set1_epi16((short)more);
    __m256i half[2];
    for (int k = 0; k < 2; ++k) {
        const __m256i low = _mm256_add_epi16(_mm256_packs_epi32(from(32 * k), from(32 * k + 8)), all);
        const __m256i high = _mm256_add_epi16(_mm256_packs_epi32(from(32 * k + 16), from(32 * k + 24)), all);
        half[k] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    }
    GC_PAIR(half[0], half[1]);
}

struct Table16 {
    __m256 low, high;
};
GC_HOT Table16 load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
GC_HOT Ints widened(const uint8_t* codes) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes)); }
GC_HOT Floats looked_up_16(__m256 low, __m256 high, Ints index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
GC_HOT Floats looked_up(const Table16& table, const uint8_t* codes) {
    return looked_up_16(table.low, table.high, widened(codes));
}
struct PointTable {
    __m256 eighth[4];
};
GC_HOT PointTable load_points(const float* p) {
    return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24)}};
}
GC_HOT Floats looked_up(const PointTable& points, const uint8_t* labels, int levels) {
    const __m256i index = widened(labels);
    if (levels <= 3) return _mm256_permutevar8x32_ps(points.eighth[0], index);
    const __m256 value = looked_up_16(points.eighth[0], points.eighth[1], index);
    if (levels <= 4) return value;
    return _mm256_blendv_ps(value, looked_up_16(points.eighth[2], points.eighth[3], index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
}

// By shuffles of 16 bytes, among which bits 4, 5 and 6 of the magnitude choose; that of 128 finds 0.
#define GC_TABLES
const int TABLE_LEVELS = 3;
inline bool has_tables() { return true; }
struct Table128 {
    const int8_t* at;
};
inline Table128 load_table_128(const int8_t* p) { return {p}; }
inline __m256i looked_up_half(const int8_t* table, __m256i magnitude) {
    __m256i part[8];
    for (int k = 0; k < 8; ++k)
        part[k] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(table + 16 * k))),
                                      magnitude);
    const __m256i bit4 = _mm256_slli_epi16(magnitude, 3), bit5 = _mm256_slli_epi16(magnitude, 2);
    const __m256i bit6 = _mm256_slli_epi16(magnitude, 1);
    for (int k = 0; k < 4; ++k) part[k] = _mm256_blendv_epi8(part[2 * k], part[2 * k + 1], bit4);
    for (int k = 0; k < 2; ++k) part[k] = _mm256_blendv_epi8(part[2 * k], part[2 * k + 1], bit5);
    return _mm256_blendv_epi8(part[0], part[1], bit6);
}
inline Bytes looked_up(const Table128& table, Bytes magnitude) {
    GC_PAIR(looked_up_half(table.at, magnitude.low), looked_up_half(table.at, magnitude.high));
}

inline Bytes negated_samples(Bytes found, Signs minus, Bytes) {
    GC_PAIR(_mm256_sub_epi8(found.low ^ minus.low, minus.low), _mm256_sub_epi8(found.high ^ minus.high, minus.high));
}

GC_HOT __m256i packed_pairs(__m256i codes, int bits) {
    return _mm256_maddubs_epi16(codes, _mm256_set1_epi16((short)(1 | 256 << bits)));
}
GC_HOT void pack_fours(Bytes codes, uint8_t* packed) {
    const __m256i bytes = _mm256_packus_epi16(packed_pairs(codes.low, 4), packed_pairs(codes.high, 4));
    _mm256_storeu_si256((__m256i*)packed, _mm256_permute4x64_epi64(bytes, 0xd8));
}
GC_HOT void pack_twos(Bytes codes, uint8_t* packed) {
    const __m256i low = _mm256_madd_epi16(packed_pairs(codes.low, 2), _mm256_set1_epi32(1 | 1 << 20));
    const __m256i high = _mm256_madd_epi16(packed_pairs(codes.high, 2), _mm256_set1_epi32(1 | 1 << 20));
    const __m256i words = _mm256_packus_epi32(low, high), order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
    _mm_storeu_si128((__m128i*)packed, _mm256_castsi256_si128(bytes));
}
GC_HOT void unpack_fours(const uint8_t* packed, uint8_t* codes) {
    for (int half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + 16 * half)));
        const __m256i both = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
        _mm256_storeu_si256((__m256i*)(codes + 32 * half), _mm256_and_si256(both, _mm256_set1_epi16(0x0f0f)));
    }
}
GC_HOT void unpack_twos(const uint8_t* packed, uint8_t* codes) {
    for (int half = 0; half < 2; ++half) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(packed + 8 * half)));
        const __m256i pairs = _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12));
        const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6));
        _mm256_storeu_si256((__m256i*)(codes + 32 * half), _mm256_and_si256(both, _mm256_set1_epi8(3)));
    }
}

enum { HAS_HALVES = 1 };
GC_HOT void store_halves(uint16_t* p, Floats a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
GC_HOT Floats load_halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline Bytes rounded_bytes(const float* x, float scale) {
    const __m256 factor = _mm256_set1_ps(scale), top = _mm256_set1_ps(127.0f), bottom = _mm256_set1_ps(-127.0f);
    __m256i part[8];
    for (int k = 0; k < 8; ++k) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * k), factor);
        part[k] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, bottom), top));
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i half[2];
    for (int k = 0; k < 2; ++k) {
        const __m256i low = _mm256_packs_epi32(part[4 * k], part[4 * k + 1]);
        const __m256i high = _mm256_packs_epi32(part[4 * k + 2], part[4 * k + 3]);
        half[k] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    }
    GC_PAIR(half[0], half[1]);
}
#undef GC_PAIR

}  // namespace
#endif
