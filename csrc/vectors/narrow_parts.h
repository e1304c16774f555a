// Vectors of 16 bytes: what the compiler's notation cannot say, by SSE2, by NEON (GC_NEON), or plainly.
#ifndef GCOMPRESS_VECTORS_NARROW_PARTS_H
#define GCOMPRESS_VECTORS_NARROW_PARTS_H

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(GC_NEON)
#include <arm_neon.h>
#endif

#include "narrow.h"

namespace {

#if defined(__SSE2__)
inline Part add_saturated_part(Part a, Part b) { return (Part)_mm_adds_epi8((__m128i)a, (__m128i)b); }
inline Part subtract_saturated_part(Part a, Part b) { return (Part)_mm_subs_epi8((__m128i)a, (__m128i)b); }
inline Part least_part(Part a, Part b) { return (Part)_mm_min_epu8((__m128i)a, (__m128i)b); }  // unsigned
inline Part check_node_part(Part a, Part b) {  // SSE2 compares unsigned bytes: with the top bit changed, signed ones
    const Part top = Part{} + (int8_t)-128;
    const __m128i one = (__m128i)(a ^ top), other = (__m128i)(b ^ top);
    const Part turned = subtract_saturated_part(Part{}, (Part)_mm_max_epu8(one, other) ^ top) ^ top;
    return (Part)_mm_max_epu8(_mm_min_epu8(one, other), (__m128i)turned) ^ top;
}
inline Shorts least(Shorts a, Shorts b) { return (Shorts)_mm_min_epi16((__m128i)a, (__m128i)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)_mm_max_epi16((__m128i)a, (__m128i)b); }
GC_HOT Floats least(Floats a, Floats b) { return (Floats)_mm_min_ps((__m128)a, (__m128)b); }
GC_HOT Floats most(Floats a, Floats b) { return (Floats)_mm_max_ps((__m128)a, (__m128)b); }
GC_HOT Ints rounded(Floats a) { return (Ints)_mm_cvtps_epi32((__m128)a); }
// The lower bytes of 16 values; values of each with the other's behind; the top bits of 16 ints in those of bytes.
GC_HOT Part low_bytes(Shorts a, Shorts b) { return (Part)_mm_packus_epi16((__m128i)(a & 255), (__m128i)(b & 255)); }
GC_HOT Part limited_part(Shorts a, Shorts b) { return (Part)_mm_packus_epi16((__m128i)a, (__m128i)b); }  // 0 to 255
GC_HOT Shorts low_shorts(Ints a, Ints b) { return (Shorts)_mm_packs_epi32((__m128i)a, (__m128i)b); }  // which they fit
GC_HOT Part interleaved_low(Part a, Part b) { return (Part)_mm_unpacklo_epi8((__m128i)a, (__m128i)b); }
GC_HOT Part interleaved_high(Part a, Part b) { return (Part)_mm_unpackhi_epi8((__m128i)a, (__m128i)b); }
GC_HOT Part tops_of(Ints a, Ints b, Ints c, Ints d) {
    const __m128i low = _mm_packs_epi32((__m128i)a, (__m128i)b), high = _mm_packs_epi32((__m128i)c, (__m128i)d);
    return (Part)_mm_packs_epi16(low, high);
}
GC_HOT uint64_t word_of_tops(const Bytes& a) {
    uint64_t word = 0;
    for (int k = 0; k < 4; ++k) word |= (uint64_t)(uint32_t)_mm_movemask_epi8((__m128i)a.part[k]) << (16 * k);
    return word;
}
GC_HOT void stream_floats(float* p, Floats a) { _mm_stream_ps(p, (__m128)a); }
GC_HOT void finish_streams() { _mm_sfence(); }
#elif defined(GC_NEON)
inline Part add_saturated_part(Part a, Part b) { return (Part)vqaddq_s8((int8x16_t)a, (int8x16_t)b); }
inline Part subtract_saturated_part(Part a, Part b) { return (Part)vqsubq_s8((int8x16_t)a, (int8x16_t)b); }
inline Part least_part(Part a, Part b) { return (Part)vminq_u8((uint8x16_t)a, (uint8x16_t)b); }
inline Part check_node_part(Part a, Part b) {
    const int8x16_t low = vminq_s8((int8x16_t)a, (int8x16_t)b), high = vmaxq_s8((int8x16_t)a, (int8x16_t)b);
    return (Part)vmaxq_s8(low, vqnegq_s8(high));
}
inline Shorts least(Shorts a, Shorts b) { return (Shorts)vminq_s16((int16x8_t)a, (int16x8_t)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)vmaxq_s16((int16x8_t)a, (int16x8_t)b); }
GC_HOT Floats least(Floats a, Floats b) { return (Floats)vminq_f32((float32x4_t)a, (float32x4_t)b); }
GC_HOT Floats most(Floats a, Floats b) { return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
GC_HOT Ints rounded(Floats a) { return (Ints)vcvtnq_s32_f32((float32x4_t)a); }
GC_HOT Part low_bytes(Shorts a, Shorts b) { return (Part)vuzp1q_s8((int8x16_t)a, (int8x16_t)b); }
GC_HOT Part limited_part(Shorts a, Shorts b) { return (Part)vqmovun_high_s16(vqmovun_s16((int16x8_t)a), (int16x8_t)b); }
GC_HOT Shorts low_shorts(Ints a, Ints b) { return (Shorts)vuzp1q_s16((int16x8_t)a, (int16x8_t)b); }
GC_HOT Part interleaved_low(Part a, Part b) { return (Part)vzip1q_s8((int8x16_t)a, (int8x16_t)b); }
GC_HOT Part interleaved_high(Part a, Part b) { return (Part)vzip2q_s8((int8x16_t)a, (int8x16_t)b); }
GC_HOT Part tops_of(Ints a, Ints b, Ints c, Ints d) {
    const int16x8_t low = vuzp2q_s16((int16x8_t)a, (int16x8_t)b), high = vuzp2q_s16((int16x8_t)c, (int16x8_t)d);
    return (Part)vuzp2q_s8((int8x16_t)low, (int8x16_t)high);
}
GC_HOT uint64_t word_of_tops(const Bytes& a) {  // bits of their own meet by sums of neighbours
    const uint8x16_t bits = (uint8x16_t)vdupq_n_u64(0x8040201008040201ull);
    uint8x16_t own[4];
    for (int k = 0; k < 4; ++k) own[k] = vandq_u8(vcltzq_s8((int8x16_t)a.part[k]), bits);
    const uint8x16_t sums = vpaddq_u8(vpaddq_u8(own[0], own[1]), vpaddq_u8(own[2], own[3]));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)), 0);
}
GC_HOT void stream_floats(float* p, Floats a) { store(p, a); }
GC_HOT void finish_streams() {}
#else
inline Part select_of(Part where, Part a, Part b) { return (where & a) | (~where & b); }
inline Part saturate(Part sum, Part overflow, Part a) { return select_of(overflow >> 7, (a >> 7) ^ 127, sum); }
inline Part add_saturated_part(Part a, Part b) {
    const Part sum = (Part)((UnsignedPart)a + (UnsignedPart)b);
    return saturate(sum, (a ^ sum) & (b ^ sum), a);
}
inline Part subtract_saturated_part(Part a, Part b) {
    const Part difference = (Part)((UnsignedPart)a - (UnsignedPart)b);
    return saturate(difference, (a ^ b) & (a ^ difference), a);
}
inline Part least_part(Part a, Part b) { return select_of((Part)((UnsignedPart)a < (UnsignedPart)b), a, b); }
inline Part check_node_part(Part a, Part b) {
    const Part low = select_of((Part)(a < b), a, b), high = a ^ b ^ low, turned = subtract_saturated_part(Part{}, high);
    return select_of((Part)(low < turned), turned, low);
}
inline Shorts least(Shorts a, Shorts b) { return ((a < b) & a) | (~(a < b) & b); }
inline Shorts most(Shorts a, Shorts b) { return ((a < b) & b) | (~(a < b) & a); }
GC_HOT Floats least(Floats a, Floats b) { return a < b ? a : b; }
GC_HOT Floats most(Floats a, Floats b) { return a < b ? b : a; }
GC_HOT Ints rounded(Floats a) {  // as round_even does
    const Floats magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    return (Ints)(a + magic) - (Ints)magic;
}
GC_HOT Part low_bytes(Shorts a, Shorts b) {
    Part result;
    for (int k = 0; k < 16; ++k) result[k] = (int8_t)(k < 8 ? a[k] : b[k - 8]);
    return result;
}
GC_HOT Part limited_part(Shorts a, Shorts b) {
    const Shorts top = Shorts{} + (int16_t)255;
    return low_bytes(least(most(a, Shorts{}), top), least(most(b, Shorts{}), top));
}
GC_HOT Shorts low_shorts(Ints a, Ints b) {
    Shorts result;
    for (int k = 0; k < 8; ++k) result[k] = (int16_t)(k < 4 ? a[k] : b[k - 4]);
    return result;
}
GC_HOT Part interleaved_low(Part a, Part b) {
    Part result;
    for (int k = 0; k < 16; ++k) result[k] = k % 2 ? b[k / 2] : a[k / 2];
    return result;
}
GC_HOT Part interleaved_high(Part a, Part b) {
    Part result;
    for (int k = 0; k < 16; ++k) result[k] = k % 2 ? b[8 + k / 2] : a[8 + k / 2];
    return result;
}
GC_HOT Part tops_of(Ints a, Ints b, Ints c, Ints d) {
    int32_t ints[16];
    int8_t bytes[16];
    store(ints, a), store(ints + 4, b), store(ints + 8, c), store(ints + 12, d);
    for (int k = 0; k < 16; ++k) bytes[k] = (int8_t)(ints[k] >> 31);  // vectorised
    return load<Part>(bytes);
}
GC_HOT uint64_t word_of_tops(const Bytes& a) {
    uint64_t word = 0;
    for (int group = 0; group < 8; ++group) {  // eight low bits meet in the top byte of a product
        const uint64_t ones = load<uint64_t>((const char*)&a + 8 * group) >> 7 & 0x0101010101010101ull;
        word |= ((ones * 0x0102040810204080ull) >> 56) << (8 * group);
    }
    return word;
}
GC_HOT void stream_floats(float* p, Floats a) { store(p, a); }
GC_HOT void finish_streams() {}
#endif

// Sums of bytes, and of products of 16-bit values that are given by their lower and upper bytes.
#if defined(__SSE2__)
typedef Pair ByteSum;
inline ByteSum with_bytes(ByteSum sum, const Bytes& a) {  // 128 more for every byte
    for (int k = 0; k < 4; ++k) sum += (Pair)_mm_sad_epu8((__m128i)(a.part[k] ^ (int8_t)-128), _mm_setzero_si128());
    return sum;
}
inline int64_t folded(ByteSum sum, int64_t rows) { return sum[0] + sum[1] - 128 * LANES * rows; }
inline Ints multiply_add(Ints sum, Part a, Part b) { return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
typedef Pair ByteSum;
#if defined(GC_NEON)
inline ByteSum with_bytes(ByteSum sum, const Bytes& a) {
    int16x8_t shorts = vpaddlq_s8((int8x16_t)a.part[0]);
    for (int k = 1; k < 4; ++k) shorts = vpadalq_s8(shorts, (int8x16_t)a.part[k]);
    return (Pair)vpadalq_s32((int64x2_t)sum, vpaddlq_s16(shorts));
}
inline Ints multiply_add(Ints sum, Part a, Part b) {
    const int16x8_t one = (int16x8_t)a, other = (int16x8_t)b;
    const int32x4_t low = vmlal_s16((int32x4_t)sum, vget_low_s16(one), vget_low_s16(other));
    return (Ints)vmlal_high_s16(low, one, other);
}
#else
inline ByteSum with_bytes(ByteSum sum, const Bytes& a) {
    int8_t bytes[LANES];
    int16_t total = 0;
    memcpy(bytes, &a, sizeof bytes);
    for (int j = 0; j < LANES; ++j) total = (int16_t)(total + bytes[j]);  // vectorised
    sum[0] += total;
    return sum;
}
inline Ints multiply_add(Ints sum, Part a, Part b) {
    const Shorts one = (Shorts)a, other = (Shorts)b;
    for (int k = 0; k < 8; ++k) sum[k % 4] = (int32_t)((uint32_t)sum[k % 4] + (uint32_t)(one[k] * other[k]));
    return sum;
}
#endif
inline int64_t folded(ByteSum sum, int64_t) { return sum[0] + sum[1]; }
#endif
inline ByteSum no_sum() { return ByteSum{}; }
typedef Ints Dots;
inline Dots no_dots() { return Dots{}; }
inline Dots with_products(Dots sum, const Bytes& a_low, const Bytes& a_high, const Bytes& b_low, const Bytes& b_high) {
    for (int k = 0; k < 4; ++k) {
        sum = multiply_add(sum, interleaved_low(a_low.part[k], a_high.part[k]),
                           interleaved_low(b_low.part[k], b_high.part[k]));
        sum = multiply_add(sum, interleaved_high(a_low.part[k], a_high.part[k]),
                           interleaved_high(b_low.part[k], b_high.part[k]));
    }
    return sum;
}

// Shuffles and tables, which NEON has and SSE2 has not.
#if defined(GC_NEON)
enum { HAS_SHUFFLES = 1, HAS_HALVES = 1 };
inline Part shuffled_part(Part a, Part index) { return (Part)vqtbl1q_s8((int8x16_t)a, (uint8x16_t)index); }
inline Signs signs_of(uint64_t word) {
    const uint8x16_t all = vreinterpretq_u8_u64(vdupq_n_u64(word)),
                     bits = (uint8x16_t)vdupq_n_u64(0x8040201008040201ull);
    const UnsignedPart first = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    Signs result;
    for (int k = 0; k < 4; ++k)
        result.part[k] = (Part)vtstq_u8(vqtbl1q_u8(all, (uint8x16_t)(first + (uint8_t)(2 * k))), bits);
    return result;
}
typedef uint8x16x4_t Table16;
GC_HOT Table16 load_table(const float* p) {
    Table16 table;
    for (int k = 0; k < 4; ++k) table.val[k] = vreinterpretq_u8_f32(vld1q_f32(p + 4 * k));
    return table;
}
GC_HOT Floats looked_up(const Table16& table, const uint8_t* codes) {  // the four bytes of each float
    const Ints wide = {codes[0], codes[1], codes[2], codes[3]};
    return (Floats)vqtbl4q_u8(table, (uint8x16_t)(wide * 0x04040404 + 0x03020100));
}
#define GC_TABLES
const int TABLE_LEVELS = 5;
inline bool has_tables() { return true; }
struct Table128 {
    const int8_t* at;
};
inline Table128 load_table_128(const int8_t* p) { return {p}; }
inline Bytes looked_up(const Table128& table,
                       const Bytes& magnitude) {  // an index beyond a table finds 0, or changes nothing
    const int8x16x4_t low = vld1q_s8_x4(table.at), high = vld1q_s8_x4(table.at + 64);
    Bytes result;
    for (int k = 0; k < 4; ++k) {
        const uint8x16_t index = (uint8x16_t)magnitude.part[k];
        result.part[k] = (Part)vqtbx4q_s8(vqtbl4q_s8(low, index), high, vsubq_u8(index, vdupq_n_u8(64)));
    }
    return result;
}
GC_HOT void store_halves(uint16_t* p, Floats a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a))); }
GC_HOT Floats load_halves(const uint16_t* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
enum { HAS_SHUFFLES = 0, HAS_HALVES = 0 };
inline Part shuffled_part(Part a, Part index) {
    Part result;
    for (int k = 0; k < 16; ++k) result[k] = a[index[k]];
    return result;
}
inline Signs signs_of(uint64_t word) {
    const int64_t ones = 0x0101010101010101ll, bits = (int64_t)0x8040201008040201ull;
    Signs result;
    for (int k = 0; k < 4; ++k, word >>= 16) {
        const Pair bytes = {(int64_t)(word & 255) * ones, (int64_t)(word >> 8 & 255) * ones};
        const Part own = (Part)Pair{bits, bits};
        result.part[k] = (Part)(((Part)bytes & own) == own);
    }
    return result;
}
struct Table16 {
    const float* at;
};
GC_HOT Table16 load_table(const float* p) { return {p}; }
GC_HOT Floats looked_up(const Table16& table, const uint8_t* codes) {
    return Floats{table.at[codes[0]], table.at[codes[1]], table.at[codes[2]], table.at[codes[3]]};
}
#define GC_TABLES
const int TABLE_LEVELS = 0;
inline bool has_tables() { return false; }
struct Table128 {};
inline Table128 load_table_128(const int8_t*) { return {}; }
inline Bytes looked_up(const Table128&, const Bytes& magnitude) { return magnitude; }
GC_HOT void store_halves(uint16_t*, Floats) {}
GC_HOT Floats load_halves(const uint16_t*) { return Floats{}; }
#endif

// round(x scale) clamped to -127 … 127, for 64 entries.
inline Bytes rounded_bytes(const float* x, float scale) {
    const Floats top = {127.0f, 127.0f, 127.0f, 127.0f};
    Bytes result;
    for (int k = 0; k < 4; ++k) {
        Shorts eight[2];
        for (int half = 0; half < 2; ++half) {
            Ints four[2];
            for (int quarter = 0; quarter < 2; ++quarter) {
                const Floats value = load<Floats>(x + 16 * k + 8 * half + 4 * quarter) * scale;
                four[quarter] = rounded(least(most(value, -top), top));
            }
            eight[half] = low_shorts(four[0], four[1]);
        }
        result.part[k] = low_bytes(eight[0], eight[1]);
    }
    return result;
}

}  // namespace
#endif
