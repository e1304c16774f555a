// The Hadamard transform of 2^k floats in place, not normalised: strides 1, 2, 4, … in turn, so that every instruction
// set rounds alike. A butterfly makes (a + b, a - b) of (a, b).
#ifndef GCOMPRESS_CPU_HADAMARD_H
#define GCOMPRESS_CPU_HADAMARD_H

#include "simd.h"

namespace {

typedef float Wide __attribute__((vector_size(4 * WIDE)));

// The strides below one register, for `count` floats, a multiple of WIDE.
inline void hadamard_within(float* y, int64_t count) {
#if defined(__AVX512F__)
    // p + (v with the sign of the upper ones changed), p being v with the halves of a pair exchanged
    const __m512i top = _mm512_set1_epi32((int)0x80000000u);
    const __m512i m1 = _mm512_maskz_mov_epi32(0xaaaa, top), m2 = _mm512_maskz_mov_epi32(0xcccc, top);
    const __m512i m4 = _mm512_maskz_mov_epi32(0xf0f0, top), m8 = _mm512_maskz_mov_epi32(0xff00, top);
    for (int64_t i = 0; i < count; i += 16) {
        __m512 v = _mm512_loadu_ps(y + i);
        v = _mm512_add_ps(_mm512_permute_ps(v, 0xb1), _mm512_xor_ps(v, _mm512_castsi512_ps(m1)));
        v = _mm512_add_ps(_mm512_permute_ps(v, 0x4e), _mm512_xor_ps(v, _mm512_castsi512_ps(m2)));
        v = _mm512_add_ps(_mm512_shuffle_f32x4(v, v, 0xb1), _mm512_xor_ps(v, _mm512_castsi512_ps(m4)));
        v = _mm512_add_ps(_mm512_shuffle_f32x4(v, v, 0x4e), _mm512_xor_ps(v, _mm512_castsi512_ps(m8)));
        _mm512_storeu_ps(y + i, v);
    }
#elif defined(__AVX2__)
    const __m256 m1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 m2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 m4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    for (int64_t i = 0; i < count; i += 8) {
        __m256 v = _mm256_loadu_ps(y + i);
        v = _mm256_add_ps(_mm256_permute_ps(v, 0xb1), _mm256_xor_ps(v, m1));
        v = _mm256_add_ps(_mm256_permute_ps(v, 0x4e), _mm256_xor_ps(v, m2));
        v = _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, m4));
        _mm256_storeu_ps(y + i, v);
    }
#else
    for (int64_t i = 0; i < count; i += 4) {
        const float a = y[i] + y[i + 1], b = y[i] - y[i + 1], c = y[i + 2] + y[i + 3], d = y[i + 2] - y[i + 3];
        y[i] = a + c;
        y[i + 1] = b + d;
        y[i + 2] = a - c;
        y[i + 3] = b - d;
    }
#endif
}

inline void load_wide(Wide* value, const float* p) { memcpy(value, p, sizeof *value); }
inline void store_wide(float* p, const Wide* value) { memcpy(p, value, sizeof *value); }

void hadamard(float* y, int64_t size) {
    if (size < WIDE) {
        for (int64_t stride = 1; stride < size; stride *= 2)
            for (int64_t i = 0; i < size; ++i) {
                if (i & stride) continue;
                const float a = y[i], b = y[i + stride];
                y[i] = a + b;
                y[i + stride] = a - b;
            }
        return;
    }
    hadamard_within(y, size);
    int64_t stride = WIDE;
    for (; 2 * stride < size; stride *= 4) {  // two strides at a time
        for (int64_t base = 0; base < size; base += 4 * stride) {
            for (int64_t i = base; i < base + stride; i += WIDE) {
                Wide a, b, c, d;
                load_wide(&a, y + i);
                load_wide(&b, y + i + stride);
                load_wide(&c, y + i + 2 * stride);
                load_wide(&d, y + i + 3 * stride);
                const Wide ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
                const Wide first = ab + cd, second = a_b + c_d, third = ab - cd, fourth = a_b - c_d;
                store_wide(y + i, &first);
                store_wide(y + i + stride, &second);
                store_wide(y + i + 2 * stride, &third);
                store_wide(y + i + 3 * stride, &fourth);
            }
        }
    }
    if (stride < size) {
        for (int64_t i = 0; i < stride; i += WIDE) {
            Wide a, b;
            load_wide(&a, y + i);
            load_wide(&b, y + i + stride);
            const Wide sum = a + b, difference = a - b;
            store_wide(y + i, &sum);
            store_wide(y + i + stride, &difference);
        }
    }
}

}  // namespace
#endif
