// Casts to 16, 8 and 4 bit floats (gcompress/compressors/casts.py).
#ifndef GCOMPRESS_CPU_CAST_H
#define GCOMPRESS_CPU_CAST_H

#include "../arith/cast.h"
#include "../gcompress.h"
#include "select.h"
#include "simd.h"
#include "units.h"

namespace {

// 64 scaled entries to codes. `ordinary`: all are finite and `tops` is TOP.
template <int form>
GC_HOT void encode_64(const float* x, const float* factors, bool ordinary, const int32_t* tops,
                      typename Cast<form>::Code* codes) {
    typedef Cast<form> C;
    const int to_sign = 32 - C::WIDTH;
    if (!ordinary) {
        for (int j = 0; j < 64; ++j) {
            const uint32_t pattern = float_bits(x[j] * factors[j]);
            const int32_t code = any_code<form>(pattern & 0x7fffffffu, tops[j]);
            codes[j] = (typename C::Code)((uint32_t)code | (pattern >> 31 << (C::WIDTH - 1)));
        }
        return;
    }
    if (form == GC_FP16 && HAS_HALVES) {
        for (int j = 0; j < 64; j += WIDE)
            store_halves((uint16_t*)codes + j, load_floats(x + j) * load_floats(factors + j));
        return;
    }
    for (int j = 0; j < 64; ++j) {  // vectorised
        const uint32_t pattern = float_bits(x[j] * factors[j]);
        const uint32_t sign = pattern >> to_sign & 1u << (C::WIDTH - 1);
        codes[j] = (typename C::Code)((uint32_t)finite_code<form>(pattern & 0x7fffffffu) | sign);
    }
}

template <int form>
inline CastScale scale_of(const float* x, int64_t count) {
    int32_t largest = 0, top = 0;
    for (int64_t i = 0; i < count; ++i) {  // vectorised
        const int32_t key = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
        top = top > key ? top : key;
    }
    largest = top;
    if (top >= (int32_t)INFINITY_KEY) {
        largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t key = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
            if (key < (int32_t)INFINITY_KEY && key > largest) largest = key;
        }
    }
    return cast_scale<form>(largest, top);
}

#if defined(__AVX512BW__)
// Codes of 16 scaled finite entries, as finite_code has them, with their signs.
GC_HOT __m128i mxfp4_codes(__m512 scaled) {
    const __m512i pattern = _mm512_castps_si512(scaled), smallest = _mm512_set1_epi32(127 << 23);
    const __m512i key = _mm512_and_si512(pattern, _mm512_set1_epi32(0x7fffffff));
    const __m512i exponent = _mm512_max_epi32(_mm512_and_si512(key, _mm512_set1_epi32(INFINITY_KEY)), smallest);
    const __m512i unit = _mm512_add_epi32(exponent, _mm512_set1_epi32(22 << 23));
    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(key), _mm512_castsi512_ps(unit));
    const __m512i units = _mm512_sub_epi32(_mm512_castps_si512(sum), unit);
    __m512i code = _mm512_add_epi32(units, _mm512_srli_epi32(_mm512_sub_epi32(exponent, smallest), 22));
    code = _mm512_min_epi32(code, _mm512_set1_epi32(Cast<GC_MXFP4>::TOP));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(pattern, 28), _mm512_set1_epi32(8));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

// Two buckets of 32 entries; false, and nothing done, if one of them is not ordinary.
GC_HOT bool encode_ordinary_mxfp4(const float* x, uint8_t* scales, uint8_t* packed) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    uint8_t codes[64];
    CastScale scale[2];
    for (int half = 0; half < 2; ++half) {
        const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x + 32 * half), magnitude);
        const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 32 * half + 16), magnitude);
        const int32_t top = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
        scale[half] = cast_scale<GC_MXFP4>(top, top);
    }
    if (!scale[0].ordinary || !scale[1].ordinary) return false;
    for (int j = 0; j < 64; j += 16) {
        const __m512 factor = _mm512_set1_ps(scale[j / 32].factor);
        _mm_storeu_si128((__m128i*)(codes + j), mxfp4_codes(_mm512_mul_ps(_mm512_loadu_ps(x + j), factor)));
    }
    scales[0] = scale[0].byte;
    scales[1] = scale[1].byte;
    pack_64<4>(codes, packed);
    return true;
}

GC_HOT void decode_mxfp4(const uint8_t* codes, const uint8_t* scales, bool add, float* out) {
    const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    for (int j = 0; j < 64; j += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + j)));
        const __m512 value =
            _mm512_mul_ps(_mm512_permutexvar_ps(code, values), _mm512_set1_ps(cast_back(scales[j / 32])));
        _mm512_storeu_ps(out + j, add ? _mm512_add_ps(_mm512_loadu_ps(out + j), value) : value);
    }
}
#endif

template <int form>
void cast_encode_range(const float* x, int64_t n, int64_t bucket, int64_t from, int64_t to, uint8_t* payload) {
    typedef Cast<form> C;
    uint8_t* packed = payload + (n + bucket - 1) / bucket;
    payload += from / bucket;
    float tail[64] = {0}, factors[64] = {0};
    int32_t tops[64] = {0};
    bool ordinary = true;
    typename C::Code codes[64];
    for (int64_t i = from; i < to; i += 64) {
        const int64_t size = min64(64, n - i);
#if defined(__AVX512BW__)
        if (form == GC_MXFP4 && bucket == 32 && i + 128 <= n && encode_ordinary_mxfp4(x + i, payload, packed + i / 2)) {
            payload += 2;
            continue;
        }
#endif
        if (bucket < 64 || i % bucket == 0) {
            for (int64_t j = 0; j < size; j += bucket) {  // more than one bucket only if they are small
                const CastScale scale = scale_of<form>(x + i + j, min64(bucket, n - i - j));
                *payload++ = scale.byte;
                ordinary = scale.ordinary && (ordinary || j == 0);
                for (int64_t f = j; f < min64(64, j + bucket); ++f) {
                    factors[f] = scale.factor;
                    tops[f] = scale.top;
                }
            }
        }
        const float* source = x + i;
        if (size < 64) {
            memcpy(tail, source, (size_t)size * sizeof(float));
            source = tail;
        }
        encode_64<form>(source, factors, ordinary, tops, codes);
        uint8_t* target = packed + i * C::WIDTH / 8;
        if (form != GC_MXFP4)
            memcpy(target, codes, (size_t)size * sizeof *codes);
        else if (i + 128 <= n)
            pack_64<4>((const uint8_t*)codes, target);
        else
            pack_tail<4>((const uint8_t*)codes, size, target);
    }
}

template <int form, bool add>
void cast_decode_range(const uint8_t* payload, int64_t n, int64_t bucket, int64_t from, int64_t to, float* out) {
    typedef Cast<form> C;
    const uint8_t* packed = payload + (n + bucket - 1) / bucket;
    payload += from / bucket;
    float factors[64] = {0}, values[64];
    typename C::Code codes[64] = {0};
    int64_t next = from;  // bucket
    for (int64_t i = from; i < to; i += 64) {
        const int64_t size = min64(64, n - i);
        float* target = out + (i - from);
        if (i == next || bucket < 64) {
            next = (i / bucket + 1) * bucket;
            for (int64_t j = 0; j < size; j += bucket) {
                const uint32_t scale = *payload++;
                const float factor = cast_back(scale);
                for (int64_t f = j; f < min64(64, j + bucket); ++f) factors[f] = factor;
            }
        }
        const uint8_t* source = packed + i * C::WIDTH / 8;
        if (form != GC_MXFP4 && size == 64)
            memcpy(codes, source, sizeof codes);
        else if (form != GC_MXFP4)
            memcpy(codes, source, (size_t)size * sizeof *codes);
        else if (i + 128 <= n)
            unpack_64<4>(source, (uint8_t*)codes);
        else
            unpack_tail<4>(source, size, (uint8_t*)codes);
        if (size == 64) {
#if defined(__AVX512BW__)
            if (form == GC_MXFP4 && bucket == 32) {
                decode_mxfp4((const uint8_t*)codes, payload - 2, add, target);
                continue;
            }
#endif
            if (form == GC_FP16 && HAS_HALVES) {
                for (int j = 0; j < 64; j += WIDE) {
                    const Floats value = load_halves((const uint16_t*)codes + j) * load_floats(factors + j);
                    store_floats(target + j, add ? load_floats(target + j) + value : value);
                }
                continue;
            }
            uint32_t wide[64];  // all lanes of one width: what follows is half as long
            for (int j = 0; j < 64; ++j) wide[j] = codes[j];
            for (int j = 0; j < 64; ++j) {  // vectorised
                const float value = from_code<form>(wide[j]) * factors[j];
                target[j] = add ? target[j] + value : value;
            }
        } else {
            for (int j = 0; j < 64; ++j) values[j] = from_code<form>(codes[j]) * factors[j];
            for (int64_t j = 0; j < size; ++j) target[j] = add ? target[j] + values[j] : values[j];
        }
    }
}

template <int form>
void cast_encode_form(int threads, gc_memory* memory, const float* x, int64_t n, int64_t bucket, uint8_t* payload) {
    encode_units(
        threads, memory, x, n, bucket < 64 ? 64 : bucket,
        [&](const float* source, int64_t first, int64_t end, int64_t) {
            cast_encode_range<form>(source, n, bucket, first, end, payload);
        },
        [&](int64_t first, int64_t end, int64_t, float* sent) {
            cast_decode_range<form, false>(payload, n, bucket, first, end, sent);
        });
}

void cast_encode(int threads, gc_memory* memory, const float* x, int64_t n, int form, int64_t bucket,
                 uint8_t* payload) {
    if (form == GC_FP16)
        cast_encode_form<GC_FP16>(threads, memory, x, n, bucket, payload);
    else if (form == GC_FP8)
        cast_encode_form<GC_FP8>(threads, memory, x, n, bucket, payload);
    else
        cast_encode_form<GC_MXFP4>(threads, memory, x, n, bucket, payload);
}

template <int form>
void cast_decode_form(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t bucket, int add,
                      float* out) {
    decode_units(threads, more, payload, n, bucket < 64 ? 64 : bucket, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     cast_decode_range<form, decltype(adds)::value>(one, n, bucket, first, end, target);
                 });
}

void cast_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int form, int64_t bucket, int add,
                 float* out) {
    if (form == GC_FP16)
        cast_decode_form<GC_FP16>(threads, more, payload, n, bucket, add, out);
    else if (form == GC_FP8)
        cast_decode_form<GC_FP8>(threads, more, payload, n, bucket, add, out);
    else
        cast_decode_form<GC_MXFP4>(threads, more, payload, n, bucket, add, out);
}

template <bool stochastic>
void bf16_encode_rounding(int threads, gc_memory* memory, const float* x, int64_t n, uint32_t seed, uint8_t* payload) {
    encode_units(
        threads, memory, x, n, 64,
        [&](const float* source, int64_t first, int64_t end, int64_t) {
            uint16_t codes[64];
            for (int64_t i = first; i < end; i += 64) {
                const int64_t size = min64(64, end - i);
                if (size == 64)
                    for (int j = 0; j < 64; ++j)  // vectorised
                        codes[j] = to_bf16(source[i + j], stochastic, (uint32_t)i + (uint32_t)j, seed);
                else
                    for (int64_t j = 0; j < size; ++j)
                        codes[j] = to_bf16(source[i + j], stochastic, (uint32_t)(i + j), seed);
                memcpy(payload + 2 * i, codes, (size_t)size * sizeof *codes);
            }
        },
        [&](int64_t first, int64_t end, int64_t, float* sent) {
            for (int64_t i = first; i < end; ++i) sent[i - first] = from_bf16(load<uint16_t>(payload + 2 * i));
        });
}

void bf16_encode(int threads, gc_memory* memory, const float* x, int64_t n, int stochastic, uint32_t seed,
                 uint8_t* payload) {
    if (stochastic)
        bf16_encode_rounding<true>(threads, memory, x, n, seed, payload);
    else
        bf16_encode_rounding<false>(threads, memory, x, n, seed, payload);
}

void bf16_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int add, float* out) {
    decode_units(threads, more, payload, n, 64, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     const uint8_t* codes = one + 2 * first;
                     for (int64_t i = 0; i < end - first; ++i) {  // vectorised
                         const float value = from_bf16(load<uint16_t>(codes + 2 * i));
                         target[i] = adds.value ? target[i] + value : value;
                     }
                 });
}

}  // namespace
#endif
