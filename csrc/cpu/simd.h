// What the compiler does not find by itself, once per instruction set. This header and
// kernels.cc are compiled several times with different flags, so everything in them must
// have internal linkage and no template of the C++ library may be instantiated: the linker
// would keep one copy of it, perhaps the one this processor cannot run.
#ifndef GCOMPRESS_CPU_SIMD_H
#define GCOMPRESS_CPU_SIMD_H

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../arith/base.h"

// What handles 64 entries is inlined always, and what handles the last few never: left to itself, a compiler decides
// anew with every function that the file gains, and speed changes by factors.
#define GC_HOT inline __attribute__((always_inline))
#define GC_COLD __attribute__((noinline))

namespace {

template <class T>
GC_HOT T load(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}
template <class T>
GC_HOT void store(void* p, T value) {
    memcpy(p, &value, sizeof value);
}

// Bit j of the result: keys[j] >= bound, for 64 keys below 2^31 and a bound of at least 1.
GC_HOT uint64_t at_least_64(const uint32_t* keys, uint32_t bound) {
    uint64_t mask = 0;
#if defined(__AVX512F__)
    const __m512i limit = _mm512_set1_epi32((int)bound);
    for (int part = 0; part < 4; ++part) {
        const __m512i key = _mm512_loadu_si512(keys + 16 * part);
        mask |= (uint64_t)_mm512_cmpge_epi32_mask(key, limit) << (16 * part);
    }
#elif defined(__AVX2__)
    const __m256i below = _mm256_set1_epi32((int)bound - 1);
    for (int part = 0; part < 8; ++part) {
        const __m256i key = _mm256_loadu_si256((const __m256i*)(keys + 8 * part));
        const __m256i over = _mm256_cmpgt_epi32(key, below);
        mask |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(over)) << (8 * part);
    }
#else
    for (int j = 0; j < 64; ++j) mask |= (uint64_t)(keys[j] >= bound) << j;
#endif
    return mask;
}

// Bit j of the result: codes[j] == code, for 64 codes.
GC_HOT uint64_t equal_64(const uint8_t* codes, uint8_t code) {
    uint64_t mask = 0;
#if defined(__AVX512BW__)
    mask = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8((char)code));
#elif defined(__AVX2__)
    for (int part = 0; part < 2; ++part) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(codes + 32 * part));
        const __m256i same = _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8((char)code));
        mask |= (uint64_t)(uint32_t)_mm256_movemask_epi8(same) << (32 * part);
    }
#else
    for (int j = 0; j < 64; ++j) mask |= (uint64_t)(codes[j] == code) << j;
#endif
    return mask;
}

// Eight bytes of `bits` significant bits each, packed into the low 8 * bits bits; and back:
// in three steps of twice the width, the upper half of every pair moves beside the lower one.
template <int bits>
GC_HOT uint64_t squeeze_8(uint64_t x) {
    const uint64_t low16 = 0x0001000100010001ull * ((1u << bits) - 1);
    const uint64_t low32 = 0x0000000100000001ull * ((1ull << 2 * bits) - 1);
    const uint64_t low64 = (1ull << 4 * bits) - 1;
    x = (x & low16) | (x & ~low16) >> (8 - bits);
    x = (x & low32) | (x & ~low32) >> 2 * (8 - bits);
    return (x & low64) | (x & ~low64) >> 4 * (8 - bits);
}
template <int bits>
GC_HOT uint64_t spread_8(uint64_t x) {
    const uint64_t low16 = 0x0001000100010001ull * ((1u << bits) - 1);
    const uint64_t low32 = 0x0000000100000001ull * ((1ull << 2 * bits) - 1);
    const uint64_t low64 = (1ull << 4 * bits) - 1;
    x = (x & low64) | (x & ~low64) << 4 * (8 - bits);
    x = (x & low32) | (x & ~low32) << 2 * (8 - bits);
    return (x & low16) | (x & ~low16) << (8 - bits);
}

// 64 codes, one a byte, to 8 * bits bytes and back. Whole words are moved and overlap, so
// both touch up to 8 - bits bytes behind the packed ones.
template <int bits>
GC_HOT void pack_64(const uint8_t* codes, uint8_t* packed) {
#if defined(__AVX512BW__)
    if (bits == 2 || bits == 4) {  // neighbours meet by multiply-add: weights 1 and 2^bits, then 1 and 2^(2 bits)
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes), _mm512_set1_epi16(1 | 256 << bits));
        if (bits == 4) {
            _mm256_storeu_si256((__m256i*)packed, _mm512_cvtepi16_epi8(pairs));
        } else {
            const __m512i quads = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 1 << (16 + 2 * bits)));
            _mm_storeu_si128((__m128i*)packed, _mm512_cvtepi32_epi8(quads));
        }
        return;
    }
#elif defined(__AVX2__)
    if (bits == 2 || bits == 4) {
        const __m256i weights = _mm256_set1_epi16(1 | 256 << bits);
        __m256i low = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)codes), weights);
        __m256i high = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)(codes + 32)), weights);
        if (bits == 4) {
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
            _mm256_storeu_si256((__m256i*)packed, bytes);
        } else {
            low = _mm256_madd_epi16(low, _mm256_set1_epi32(1 | 1 << (16 + 2 * bits)));
            high = _mm256_madd_epi16(high, _mm256_set1_epi32(1 | 1 << (16 + 2 * bits)));
            const __m256i words = _mm256_packus_epi32(low, high);
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
            _mm_storeu_si128((__m128i*)packed, _mm256_castsi256_si128(bytes));
        }
        return;
    }
#endif
    for (int group = 0; group < 8; ++group)
        store<uint64_t>(packed + bits * group, squeeze_8<bits>(load<uint64_t>(codes + 8 * group)));
}
template <int bits>
GC_HOT void unpack_64(const uint8_t* packed, uint8_t* codes) {
#if defined(__AVX512BW__)
    if (bits == 4) {
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)packed));
        const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
        _mm512_storeu_si512(codes, _mm512_and_si512(both, _mm512_set1_epi16(0x0f0f)));
        return;
    }
#elif defined(__AVX2__)
    if (bits == 4) {
        for (int half = 0; half < 2; ++half) {
            const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + 16 * half)));
            const __m256i both = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
            _mm256_storeu_si256((__m256i*)(codes + 32 * half), _mm256_and_si256(both, _mm256_set1_epi16(0x0f0f)));
        }
        return;
    }
#endif
    const uint64_t low = bits == 8 ? ~0ull : (1ull << ((8 * bits) & 63)) - 1;
    for (int group = 0; group < 8; ++group)
        store<uint64_t>(codes + 8 * group, spread_8<bits>(load<uint64_t>(packed + bits * group) & low));
}

// The same for `count` < = 64 codes at the end of a buffer, through a block of its own.
template <int bits>
GC_COLD void pack_tail(const uint8_t* codes, int64_t count, uint8_t* packed) {
    uint8_t padded[64] = {0}, bytes[64 + 8];
    memcpy(padded, codes, (size_t)count);
    pack_64<bits>(padded, bytes);
    memcpy(packed, bytes, (size_t)((count * bits + 7) / 8));
}
template <int bits>
GC_COLD void unpack_tail(const uint8_t* packed, int64_t count, uint8_t* codes) {
    uint8_t bytes[64 + 8] = {0};
    memcpy(bytes, packed, (size_t)((count * bits + 7) / 8));
    unpack_64<bits>(bytes, codes);
}

// out[i] = table[codes[i]] (or +=) for 64 codes; the table has 16 or 256 entries.
template <bool add>
GC_HOT void look_up_64(const uint8_t* codes, const float* table, bool wide, float* out) {
#if defined(__AVX512F__)
    if (!wide) {
        const __m512 entries = _mm512_loadu_ps(table);
        for (int part = 0; part < 4; ++part) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * part)));
            __m512 value = _mm512_permutexvar_ps(index, entries);
            if (add) value = _mm512_add_ps(_mm512_loadu_ps(out + 16 * part), value);
            _mm512_storeu_ps(out + 16 * part, value);
        }
        return;
    }
#elif defined(__AVX2__)
    if (!wide) {
        const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
        for (int part = 0; part < 8; ++part) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + 8 * part)));
            const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            __m256 value =
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), is_high);
            if (add) value = _mm256_add_ps(_mm256_loadu_ps(out + 8 * part), value);
            _mm256_storeu_ps(out + 8 * part, value);
        }
        return;
    }
#endif
    (void)wide;
    for (int j = 0; j < 64; ++j) out[j] = add ? out[j] + table[codes[j]] : table[codes[j]];
}

}  // namespace
#endif
