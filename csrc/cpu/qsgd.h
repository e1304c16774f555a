// QSGD: random rounding to multiples of norm / s (gcompress/compressors/qsgd.py).
#ifndef GCOMPRESS_CPU_QSGD_H
#define GCOMPRESS_CPU_QSGD_H

#include "../arith/qsgd.h"
#include "../gcompress.h"
#include "quantize.h"
#include "sums.h"
#include "units.h"
#include "for_bits.h"

namespace {

struct Magnitudes {
    double squares;   // ordered sum; not finite if an entry is not
    int32_t largest;  // key
};

// Of one bucket, in one pass.
inline Magnitudes magnitudes_of(const float* x, int64_t count) {
    Magnitudes all = {0.0, 0};
    for (int64_t block = 0; block < count; block += SUM_BLOCK) {
        const int64_t end = min64(count, block + SUM_BLOCK);
        LaneSum sum;
        for (int64_t i = block; i < end; i += SUM_LANES) {
            float tail[SUM_LANES] = {0};
            const float* source = x + i;
            if (end - i < SUM_LANES) {
                memcpy(tail, source, (size_t)(end - i) * sizeof(float));
                source = tail;
            }
            sum.add_products(source, source);
        }
        all.squares += sum.folded();
        int32_t largest = 0;
        for (int64_t i = block; i < end; ++i) {  // vectorised
            const int32_t key = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
            largest = largest > key ? largest : key;
        }
        all.largest = largest > all.largest ? largest : all.largest;
    }
    return all;
}

template <int bits>
void qsgd_encode_range(const float* x, int64_t n, int64_t bucket, bool largest_norm, uint32_t seed, int64_t from,
                       int64_t to, int64_t limit, uint8_t* payload) {
    const int levels = (1 << (bits - 1)) - 1;
    uint8_t* packed = payload + 4 * ((n + bucket - 1) / bucket);
    QsgdScale scale = {0.0f, 0.0f, true};
    float tail[64] = {0};
    uint8_t codes[64];
    for (int64_t i = from; i < to; i += 64) {
        if (i % bucket == 0) {
            const Magnitudes all = magnitudes_of(x + i, min64(bucket, n - i));
            scale = qsgd_scale(all.squares, all.largest, largest_norm, levels);
            store<float>(payload + 4 * (i / bucket), qsgd_sent_step(scale));
        }
        const int64_t size = min64(64, n - i);
        const float* source = x + i;
        if (size < 64 || !scale.finite) {  // of a bucket that is not finite only the signs are coded
            for (int64_t j = 0; j < 64; ++j)
                tail[j] =
                    j < size ? (scale.finite ? source[j] : bits_float(float_bits(source[j]) & 0x80000000u)) : 0.0f;
            source = tail;
        }
        for (int j = 0; j < 64; ++j)  // vectorised
            codes[j] = qsgd_code(source[j], scale.inverse, uniform((uint32_t)i + (uint32_t)j, seed), levels);
        if (i + 128 <= limit)
            pack_64<bits>(codes, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes, size, packed + i / 8 * bits);
    }
}

template <int bits, bool add>
void qsgd_decode_range(const uint8_t* payload, int64_t n, int64_t bucket, int64_t from, int64_t to, int64_t limit,
                       float* out) {
    const float levels = (float)((1 << (bits - 1)) - 1);
    const uint8_t* packed = payload + 4 * ((n + bucket - 1) / bucket);
    uint8_t codes[64];
    float step = 0.0f, values[64];
    for (int64_t i = from; i < to; i += 64, out += 64) {
        if (i == from || i % bucket == 0) step = load<float>(payload + 4 * (i / bucket));
        const int64_t size = min64(64, n - i);
        if (i + 128 <= limit)
            unpack_64<bits>(packed + i / 8 * bits, codes);
        else
            unpack_tail<bits>(packed + i / 8 * bits, size, codes);
        for (int j = 0; j < 64; ++j) values[j] = qsgd_value(codes[j], levels, step);  // vectorised
        if (add)
            for (int64_t j = 0; j < size; ++j) out[j] += values[j];
        else
            memcpy(out, values, (size_t)size * sizeof(float));
    }
}

template <int bits>
void qsgd_encode_bits(int threads, gc_memory* memory, const float* x, int64_t n, int64_t bucket, bool largest_norm,
                      uint32_t seed, uint8_t* payload) {
    encode_units(
        threads, memory, x, n, bucket,
        [&](const float* source, int64_t first, int64_t end, int64_t limit) {
            qsgd_encode_range<bits>(source, n, bucket, largest_norm, seed, first, end, limit, payload);
        },
        [&](int64_t first, int64_t end, int64_t limit, float* sent) {
            qsgd_decode_range<bits, false>(payload, n, bucket, first, end, limit, sent);
        });
}

template <int bits>
void qsgd_decode_bits(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t bucket, int add,
                      float* out) {
    decode_units(threads, more, payload, n, bucket, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     qsgd_decode_range<bits, decltype(adds)::value>(one, n, bucket, first, end, n, target);
                 });
}

void qsgd_encode(int threads, gc_memory* memory, const float* x, int64_t n, int bits, int64_t bucket, int largest_norm,
                 uint32_t seed, uint8_t* payload) {
    GC_FOR_BITS(bits, (qsgd_encode_bits<B>(threads, memory, x, n, bucket, largest_norm != 0, seed, payload)))
}

void qsgd_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add,
                 float* out) {
    GC_FOR_BITS(bits, (qsgd_decode_bits<B>(threads, more, payload, n, bucket, add, out)))
}

}  // namespace
#endif
