// What encoders and decoders have in common that code a tensor unit by unit (a unit: entries that share a scale): error
// feedback while a unit is still in the cache, and several payloads in one pass over the output.
#ifndef GCOMPRESS_CPU_UNITS_H
#define GCOMPRESS_CPU_UNITS_H

#include "../arith/base.h"
#include "../gcompress.h"
#include "simd.h"

namespace {

const int64_t STRETCH =
    2560;  // entries that stay in the nearest cache with what is made of them: 40 words, 8 groups of trits

// Where the stretch that begins at `first` ends: behind whole units, or within a longer one.
inline int64_t stretch_end(int64_t first, int64_t n, int64_t unit) {
    if (unit <= STRETCH) return min64(n, first + STRETCH / unit * unit);
    return min64(n, min64(first + STRETCH, (first / unit + 1) * unit));
}

// The entries [first, end) of x + residual, in `fresh`.
inline void correct(const gc_memory* memory, const float* x, int64_t first, int64_t end) {
    if (!memory->residual) {
        memcpy(memory->fresh + first, x + first, (size_t)(end - first) * sizeof(float));
        return;
    }
    for (int64_t i = first; i < end; ++i) memory->fresh[i] = x[i] + memory->residual[i];  // vectorised
}

// Take what was sent from the entries of `fresh` from `first` on.
inline void keep_lost(gc_memory* memory, int64_t first, int64_t count, const float* sent) {
    float* fresh = memory->fresh + first;
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {  // vectorised
        const float lost = fresh[i] - sent[i];
        const int32_t key = (int32_t)(float_bits(lost) & 0x7fffffffu);
        largest = largest > key ? largest : key;
        fresh[i] = lost;
    }
    if (largest >= (int32_t)INFINITY_KEY) memory->poisoned = 1;
}

// All entries of x + residual, in `fresh`.
inline void correct_all(gc_memory* memory, const float* x, int64_t n) {
    int32_t largest = 0;
    for (int64_t first = 0; first < n; first += STRETCH) {
        const int64_t end = min64(n, first + STRETCH);
        correct(memory, x, first, end);
        for (int64_t i = first; i < end; ++i) {  // vectorised
            const int32_t key = (int32_t)(float_bits(memory->fresh[i]) & 0x7fffffffu);
            largest = largest > key ? largest : key;
        }
    }
    if (largest >= (int32_t)INFINITY_KEY) memory->poisoned = 1;
}

// Encode by `encode(x, first, end)`, where `first` is the beginning of a unit. With a memory, of x + residual, whose
// fresh residual `decode(first, end, sent)` tells: stretches in order, from the beginning on.
template <class Encode, class Decode>
void encode_units(gc_memory* memory, const float* x, int64_t n, int64_t unit, const Encode& encode,
                  const Decode& decode) {
    if (!memory) {
        encode(x, (int64_t)0, n);
        return;
    }
    const int64_t step = unit > STRETCH ? unit : STRETCH / unit * unit;
    float sent[STRETCH];
    for (int64_t first = 0; first < n; first += step) {
        const int64_t end = min64(n, first + step);
        correct(memory, x, first, end);
        encode(memory->fresh, first, end);
        for (int64_t i = first; i < end;) {
            const int64_t stop = stretch_end(i, end, unit);
            decode(i, stop, sent);
            keep_lost(memory, i, stop - i, sent);
            i = stop;
        }
    }
}

inline void multiply(float* values, int64_t count, float factor) {
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;  // vectorised
}

// Decode by `decode(payload, number, first, end, add, out)`, `out` being the place of entry `first`: all at once, or the
// stretches of all payloads in turn. Returns the first result that is not GC_OK.
template <class Decode>
int decode_units(const gc_more* more, const uint8_t* payload, int64_t n, int64_t unit, int add, float* out,
                 const Decode& decode) {
    if (!more) return decode(payload, (int64_t)0, (int64_t)0, n, add != 0, out);
    for (int64_t first = 0; first < n;) {
        const int64_t end = stretch_end(first, n, unit);
        if (int error = decode(payload, (int64_t)0, first, end, add != 0, out + first)) return error;
        for (int64_t r = 0; r < more->count; ++r)
            if (int error = decode(more->payloads[r], r + 1, first, end, true, out + first)) return error;
        multiply(out + first, end - first, more->factor);
        first = end;
    }
    return GC_OK;
}

}  // namespace
#endif
