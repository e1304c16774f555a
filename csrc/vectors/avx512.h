// Vectors of 64 bytes: AVX-512 with its F, BW, VL and DQ parts, and VBMI for tables where there is that.
#ifndef GCOMPRESS_VECTORS_AVX512_H
#define GCOMPRESS_VECTORS_AVX512_H

#include <immintrin.h>

#include "vectors.h"

namespace {

typedef __m512i Bytes;
typedef uint64_t Signs;
inline Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(int8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes every_byte(int8_t a) { return _mm512_set1_epi8(a); }
inline Bytes add_saturated(Bytes a, Bytes b) { return _mm512_adds_epi8(a, b); }
inline Bytes check_node(Bytes a, Bytes b) {
    return _mm512_max_epi8(_mm512_min_epi8(a, b), _mm512_subs_epi8(zero_bytes(), _mm512_max_epi8(a, b)));
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) { return _mm512_mask_subs_epi8(_mm512_adds_epi8(b, a), c, b, a); }
inline Bytes magnitude(Bytes a) { return _mm512_abs_epi8(_mm512_max_epi8(a, _mm512_set1_epi8(-127))); }
inline Bytes magnitude_to_128(Bytes a) { return _mm512_abs_epi8(a); }
inline Bytes least(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
inline Bytes shortfall(Bytes a) { return _mm512_subs_epi8(zero_bytes(), _mm512_min_epi8(a, zero_bytes())); }
inline Bytes different(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes choose(Signs where, Bytes a, Bytes b) { return _mm512_mask_mov_epi8(b, where, a); }
inline Signs less(Bytes a, Bytes b) { return _mm512_cmplt_epi8_mask(a, b); }
inline Signs negative(Bytes a) { return _mm512_movepi8_mask(a); }
inline Signs equal(Bytes a, Bytes b) { return _mm512_cmpeq_epi8_mask(a, b); }
inline Signs has_bit(Bytes a, int bit) { return _mm512_test_epi8_mask(a, _mm512_set1_epi8((char)(1 << bit))); }
inline Signs no_signs() { return 0; }
inline Bytes cleared(Bytes a, Signs where) { return _mm512_maskz_mov_epi8(~where, a); }
inline Signs exclusive_or(Signs a, Signs b) { return a ^ b; }
inline Signs both(Signs a, Signs b) { return a & b; }
inline Signs without(Signs a, Signs b) { return a & ~b; }
inline uint64_t word_of(Signs a) { return a; }
inline Signs signs_of(uint64_t word) { return word; }
inline Bytes bytes_of(Signs a) { return _mm512_movm_epi8(a); }
inline Signs signs_in(Bytes a) { return _mm512_movepi8_mask(a); }
inline Bytes doubled_plus(Bytes a, Signs bit) {  // 2 a + bit
    const __m512i twice = _mm512_add_epi8(a, a);
    return _mm512_mask_sub_epi8(twice, bit, twice, _mm512_set1_epi8(-1));
}

// Shuffles stay within 16 bytes.
enum { HAS_SHUFFLES = 1 };
inline Bytes shuffled(Bytes a, Bytes index) { return _mm512_shuffle_epi8(a, index); }
inline Bytes lower_four(Bytes index) { return index; }  // of an index below 128: a shuffle looks at no others
inline Bytes repeat_16(const int8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
// values[j] = low byte j + 256 high byte j
inline void interleave_bytes(Bytes low, Bytes high, uint16_t* values) {
    for (int half = 0; half < 2; ++half) {
        const __m256i a = half ? _mm512_extracti64x4_epi64(low, 1) : _mm512_castsi512_si256(low);
        const __m256i b = half ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high);
        const __m512i upper = _mm512_slli_epi16(_mm512_cvtepu8_epi16(b), 8);
        _mm512_storeu_si512(values + 32 * half, _mm512_or_si512(_mm512_cvtepu8_epi16(a), upper));
    }
}

typedef int16_t Shorts __attribute__((vector_size(64)));
inline Shorts least(Shorts a, Shorts b) { return (Shorts)_mm512_min_epi16((__m512i)a, (__m512i)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)_mm512_max_epi16((__m512i)a, (__m512i)b); }
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)_mm512_shuffle_epi8((__m512i)a, (__m512i)index); }
const int MOST_SHORTS = 2;
struct Metrics {
    Shorts part[MOST_SHORTS];
};
inline Metrics widen(Bytes a) {
    return {{(Shorts)_mm512_cvtepi8_epi16(_mm512_castsi512_si256(a)),
             (Shorts)_mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(a, 1))}};
}
inline Bytes narrow(const Metrics& a) {  // values from -128 to 127
    const __m256i low = _mm512_cvtepi16_epi8((__m512i)a.part[0]), high = _mm512_cvtepi16_epi8((__m512i)a.part[1]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline Signs negative(const Metrics& a) {
    return (uint64_t)_mm512_movepi16_mask((__m512i)a.part[0]) | (uint64_t)_mm512_movepi16_mask((__m512i)a.part[1])
                                                                    << 32;
}

typedef __m512i ByteSum;
inline ByteSum no_sum() { return _mm512_setzero_si512(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {  // 128 more for every byte
    return _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_xor_si512(a, _mm512_set1_epi8(-128)), zero_bytes()));
}
inline int64_t folded(ByteSum sum, int64_t rows) { return _mm512_reduce_add_epi64(sum) - 128 * LANES * rows; }

// Sums of products of 16-bit values, given by their lower and upper bytes; a part of 32 bits grows by four of them.
typedef __m512i Dots;
inline Dots no_dots() { return _mm512_setzero_si512(); }
inline Dots with_products(Dots sum, Bytes a_low, Bytes a_high, Bytes b_low, Bytes b_high) {
    sum = _mm512_add_epi32(sum,
                           _mm512_madd_epi16(_mm512_unpacklo_epi8(a_low, a_high), _mm512_unpacklo_epi8(b_low, b_high)));
    return _mm512_add_epi32(
        sum, _mm512_madd_epi16(_mm512_unpackhi_epi8(a_low, a_high), _mm512_unpackhi_epi8(b_low, b_high)));
}

enum { WIDE = 16 };
typedef __m512 Floats;
typedef __m512i Ints;
typedef __mmask16 Lanes;
GC_HOT Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
GC_HOT void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
GC_HOT void stream_floats(float* p, Floats a) { _mm512_stream_ps(p, a); }
GC_HOT void finish_streams() { _mm_sfence(); }
GC_HOT Floats every_float(float a) { return _mm512_set1_ps(a); }
GC_HOT Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
GC_HOT Ints every_int(int32_t a) { return _mm512_set1_epi32(a); }
GC_HOT Lanes above(Ints a, Ints b) { return _mm512_cmpgt_epi32_mask(a, b); }
GC_HOT Lanes top_bits(Ints a) { return _mm512_movepi32_mask(a); }
// 64 decisions, `test(j)` being those on the lanes from j on.
template <class Test>
GC_HOT uint64_t word_where(const Test& test) {
    uint64_t word = 0;
    for (int part = 0; part < 4; ++part) word |= (uint64_t)test(16 * part) << (16 * part);
    return word;
}
// Of `ones` where a bit is 1, of `zeros` where it is 0; and a, its sign changed where it is 1.
GC_HOT Floats choose_by_bits(uint64_t bits, Floats ones, Floats zeros) {
    return _mm512_mask_blend_ps((__mmask16)bits, zeros, ones);
}
GC_HOT Floats negate_by_bits(uint64_t bits, Floats a) {
    return _mm512_mask_mov_ps(a, (__mmask16)bits, _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)));
}

// Of finite floats.
GC_HOT Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
GC_HOT Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// To the nearest, ties to even, of values below 2^22; and 64 of these, given by their lanes from j on, each with `more`
// added, as bytes from 0 to 255. All of them fit into 16 bits.
GC_HOT Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
template <class From>
GC_HOT Bytes limited_bytes(const From& from, int more) {
    const __m512i all = _mm512_set1_epi16((short)more);
    const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(from(0), from(16)), all);
    const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(from(32), from(48)), all);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

typedef __m512 Table16;
GC_HOT Table16 load_table(const float* p) { return _mm512_loadu_ps(p); }
GC_HOT Ints widened(const uint8_t* codes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes)); }
GC_HOT Floats looked_up(const Table16& table, const uint8_t* codes) {
    return _mm512_permutexvar_ps(widened(codes), table);
}
// Of up to 32 entries, of which labels of `levels` bits choose.
struct PointTable {
    __m512 low, high;
};
GC_HOT PointTable load_points(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
GC_HOT Floats looked_up(const PointTable& points, const uint8_t* labels, int levels) {
    const __m512i index = widened(labels);
    return levels < 5 ? _mm512_permutexvar_ps(index, points.low)
                      : _mm512_permutex2var_ps(points.low, index, points.high);
}

// 128 bytes by a magnitude. What is found is negated where the sample was, and 0 where the sample's magnitude is 128.
#define GC_TABLES __attribute__((target("avx512f,avx512bw,avx512vbmi")))
const int TABLE_LEVELS = 5;  // by then as many tables as entries in a row
inline bool has_tables() { return __builtin_cpu_supports("avx512vbmi"); }
struct Table128 {
    __m512i low, high;
};
GC_TABLES inline Table128 load_table_128(const int8_t* p) {
    return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
}
GC_TABLES inline Bytes looked_up(const Table128& table, Bytes magnitude) {
    return _mm512_permutex2var_epi8(table.low, magnitude, table.high);
}

inline Bytes negated_samples(Bytes found, Signs minus, Bytes samples) {
    const Signs there = _mm512_cmpneq_epi8_mask(samples, _mm512_set1_epi8(-128));
    return _mm512_maskz_mov_epi8(there, _mm512_mask_sub_epi8(found, minus, zero_bytes(), found));
}

// 64 codes, one a byte: neighbours meet by multiply-add, weights 1 and 2^bits, then 1 and 2^(2 bits).
GC_HOT __m512i packed_pairs(Bytes codes, int bits) {
    return _mm512_maddubs_epi16(codes, _mm512_set1_epi16((short)(1 | 256 << bits)));
}
GC_HOT void pack_fours(Bytes codes, uint8_t* packed) {
    _mm256_storeu_si256((__m256i*)packed, _mm512_cvtepi16_epi8(packed_pairs(codes, 4)));
}
GC_HOT void pack_twos(Bytes codes, uint8_t* packed) {
    const __m512i quads = _mm512_madd_epi16(packed_pairs(codes, 2), _mm512_set1_epi32(1 | 1 << 20));
    _mm_storeu_si128((__m128i*)packed, _mm512_cvtepi32_epi8(quads));
}
GC_HOT void unpack_fours(const uint8_t* packed, uint8_t* codes) {
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)packed));
    const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
    _mm512_storeu_si512(codes, _mm512_and_si512(both, _mm512_set1_epi16(0x0f0f)));
}
GC_HOT void unpack_twos(const uint8_t* packed, uint8_t* codes) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
    const __m512i pairs = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6));
    _mm512_storeu_si512(codes, _mm512_and_si512(both, _mm512_set1_epi8(3)));
}

enum { HAS_HALVES = 1 };
GC_HOT void store_halves(uint16_t* p, Floats a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
GC_HOT Floats load_halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// round(x scale) clamped to -127 … 127, for 64 entries.
inline Bytes rounded_bytes(const float* x, float scale) {
    const __m512 factor = _mm512_set1_ps(scale), top = _mm512_set1_ps(127.0f), bottom = _mm512_set1_ps(-127.0f);
    __m512i part[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * k), factor);
        part[k] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, bottom), top));
    }
    const __m512i low = _mm512_packs_epi32(part[0], part[1]), high = _mm512_packs_epi32(part[2], part[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

}  // namespace
#endif
