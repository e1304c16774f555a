// BinMeans: codes of 2 to 8 bits and a table of what they stand for (gcompress/compressors/binmean.py).
#ifndef GCOMPRESS_CPU_BINMEAN_H
#define GCOMPRESS_CPU_BINMEAN_H

#include "../arith/binmean.h"
#include "../gcompress.h"
#include "sums.h"
#include "units.h"
#include "for_bits.h"

namespace {

// The ordered sum of `term(i)` for i from 0 to n - 1.
template <class Term>
double ordered_sum(int64_t n, const Term& term) {
    double total = 0.0;
    for (int64_t block = 0; block < n; block += SUM_BLOCK) {
        LaneSum sum;
        for (int64_t i = block; i < min64(n, block + SUM_BLOCK); i += SUM_LANES) {
            double terms[SUM_LANES] = {0.0};
            if (i + SUM_LANES <= n)
                for (int j = 0; j < SUM_LANES; ++j) terms[j] = term(i + j);  // vectorised
            else
                for (int j = 0; i + j < n; ++j) terms[j] = term(i + j);
            sum.add_doubles(terms);
        }
        total += sum.folded();
    }
    return total;
}

template <int bits>
void binmean_encode_all(const float* x, int64_t n, double range, uint8_t* payload) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {  // vectorised
        const int32_t key = (int32_t)key_of<true>(x[i]);
        largest = largest > key ? largest : key;
    }
    uint8_t* packed = payload + (4 << bits);
    if (largest >= (int32_t)INFINITY_KEY) {
        for (int code = 0; code < 1 << bits; ++code) store<uint32_t>(payload + 4 * code, QUIET_NAN);
        memset(packed, 0, (size_t)((n * bits + 7) / 8));
        return;
    }
    Bins bins = {0.0, 1.0, fixed_factor((uint32_t)largest), 1 << bits};
    bins.shift = ordered_sum(n, [&](int64_t i) { return (double)x[i]; }) / (double)n;
    const double squares = ordered_sum(n, [&](int64_t i) {
        const double centred = (double)x[i] - bins.shift;
        return centred * centred;
    });
    bins.scale = bin_width(squares, n, range, bins.count);
    int64_t sums[1 << bits] = {0}, counts[1 << bits] = {0};
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t block = min64(64, n - i);
        uint8_t codes[64];
        double fixed[64];
        for (int64_t j = 0; j < block; ++j) codes[j] = bin_of(x[i + j], bins);  // vectorised
        for (int64_t j = 0; j < block; ++j) fixed[j] = fixed_of(x[i + j], bins);
        for (int64_t j = 0; j < block; ++j) {
            sums[codes[j]] += (int64_t)fixed[j];
            ++counts[codes[j]];
        }
        if (i + 128 <= n)  // whole words are stored, which reach into the next block's
            pack_64<bits>(codes, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes, block, packed + i / 8 * bits);
    }
    for (int code = 0; code < 1 << bits; ++code)
        store<float>(payload + 4 * code, bin_mean(sums[code], counts[code], bins));
}

template <int bits, bool add>
void binmean_decode_range(const uint8_t* payload, int64_t n, int64_t first, int64_t end, float* out) {
    float table[bits <= 4 ? 16 : 256] = {0}, tail[64] = {0};
    memcpy(table, payload, 4 << bits);
    const uint8_t* packed = payload + (4 << bits);
    for (int64_t i = first; i < end; i += 64, out += 64) {
        const int64_t block = min64(64, end - i);
        uint8_t codes[64];
        if (i + 128 <= n)
            unpack_64<bits>(packed + i / 8 * bits, codes);
        else
            unpack_tail<bits>(packed + i / 8 * bits, min64(64, n - i), codes);
        if (block == 64) {
            look_up_64<add>(codes, table, bits > 4, out);
        } else {
            memcpy(tail, out, (size_t)block * sizeof(float));
            look_up_64<add>(codes, table, bits > 4, tail);
            memcpy(out, tail, (size_t)block * sizeof(float));
        }
    }
}

template <int bits>
void binmean_encode_bits(gc_memory* memory, const float* x, int64_t n, double range, uint8_t* payload) {
    encode_units(
        1, memory, x, n, n,
        [&](const float* source, int64_t, int64_t, int64_t) { binmean_encode_all<bits>(source, n, range, payload); },
        [&](int64_t first, int64_t end, int64_t, float* sent) {
            binmean_decode_range<bits, false>(payload, n, first, end, sent);
        });
}

template <int bits>
void binmean_decode_bits(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int add, float* out) {
    decode_units(threads, more, payload, n, 64, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     binmean_decode_range<bits, decltype(adds)::value>(one, n, first, end, target);
                 });
}

void binmean_encode(gc_memory* memory, const float* x, int64_t n, int bits, double range, uint8_t* payload) {
    GC_FOR_BITS(bits, (binmean_encode_bits<B>(memory, x, n, range, payload)))
}

void binmean_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int bits, int add,
                    float* out) {
    GC_FOR_BITS(bits, (binmean_decode_bits<B>(threads, more, payload, n, add, out)))
}

}  // namespace
#endif
