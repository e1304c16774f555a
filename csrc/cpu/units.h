// What encoders and decoders have in common that code a tensor unit by unit (a unit: entries that share a scale): error
// feedback while a unit is still in the cache, and several payloads in one pass over the output.
#ifndef GCOMPRESS_CPU_UNITS_H
#define GCOMPRESS_CPU_UNITS_H

#include "../arith/base.h"
#include "../gcompress.h"
#include "simd.h"
#include "threads.h"

namespace {

// Entries that stay in the nearest cache with what is made of them: 40 words of 64 bits, 8 groups of trits.
const int64_t STRETCH = 2560;

// Where the stretch that begins at `first` ends: behind whole units, or within a longer one.
template <int64_t stretch>
inline int64_t stretch_end(int64_t first, int64_t n, int64_t unit) {
    if (unit <= stretch) return min64(n, first + stretch / unit * unit);
    return min64(n, min64(first + stretch, (first / unit + 1) * unit));
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
    if (largest >= (int32_t)INFINITY_KEY) set_shared(memory->poisoned);
}

// All entries of x + residual, in `fresh`.
inline void correct_all(const Shares& shares, gc_memory* memory, const float* x) {
    on_shares(shares, [=](int, int64_t from, int64_t to) {
        int32_t largest = 0;
        for (int64_t first = from; first < to; first += STRETCH) {
            const int64_t end = min64(to, first + STRETCH);
            correct(memory, x, first, end);
            for (int64_t i = first; i < end; ++i) {  // vectorised
                const int32_t key = (int32_t)(float_bits(memory->fresh[i]) & 0x7fffffffu);
                largest = largest > key ? largest : key;
            }
        }
        if (largest >= (int32_t)INFINITY_KEY) set_shared(memory->poisoned);
    });
}

// The entries [first, end) of x + residual were encoded: keep what `decode(first, end, sent)` tells of them, stretches in
// order.
template <int64_t stretch, class Decode>
void keep_decoded(gc_memory* memory, int64_t first, int64_t end, int64_t unit, const Decode& decode) {
    float sent[stretch];
    while (first < end) {
        const int64_t stop = stretch_end<stretch>(first, end, unit);
        decode(first, stop, sent);
        keep_lost(memory, first, stop - first, sent);
        first = stop;
    }
}

// Encode units one after the other that are so long that threads take parts of a unit.
template <int64_t stretch, class Encode, class Decode>
void encode_long_units(int threads, gc_memory* memory, const float* x, int64_t n, int64_t unit, const Encode& encode,
                       const Decode& decode) {
    for (int64_t first = 0; first < n; first += unit) {
        const int64_t end = min64(n, first + unit);
        const Shares shares = shares_of(threads, end - first, stretch);
        on_shares(shares, [&](int, int64_t from, int64_t to) { correct(memory, x, first + from, first + to); });
        encode(memory->fresh, first, end, end);
        on_shares(shares, [&](int, int64_t from, int64_t to) {
            keep_decoded<stretch>(memory, first + from, first + to, unit,
                                  [&](int64_t start, int64_t stop, float* sent) { decode(start, stop, end, sent); });
        });
    }
}

// Encode by `encode(x, first, end, limit)`, where `first` is the beginning of a unit; codes of entries from `limit` on may be
// neither written nor read. With a memory: x + residual, of which what `decode(first, end, limit, sent)` does not give
// back is kept.
template <int64_t stretch = STRETCH, class Encode, class Decode>
void encode_units(int threads, gc_memory* memory, const float* x, int64_t n, int64_t unit, const Encode& encode,
                  const Decode& decode) {
    const Shares shares = shares_of(threads, n, unit);
    if (memory && shares.count == 1 && shares_of(threads, n, stretch).count > 1)
        return encode_long_units<stretch>(threads, memory, x, n, unit, encode, decode);
    on_shares(shares, [&](int, int64_t from, int64_t to) {
        if (!memory) {
            encode(x, from, to, to);
            return;
        }
        const int64_t step = unit > stretch ? unit : stretch / unit * unit;
        for (int64_t first = from; first < to; first += step) {
            const int64_t end = min64(to, first + step);
            correct(memory, x, first, end);
            encode(memory->fresh, first, end, to);
            keep_decoded<stretch>(memory, first, end, unit,
                                  [&](int64_t start, int64_t stop, float* sent) { decode(start, stop, to, sent); });
        }
    });
}

inline void multiply(float* values, int64_t count, float factor) {
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;  // vectorised
}

// Decode the entries [from, to) by `decode(payload, number, first, end, add, out)`, `out` being the place of entry `first`:
// the stretches of all payloads in turn. Returns the first result that is not GC_OK.
template <int64_t stretch = STRETCH, class Decode>
int decode_in_turn(const gc_more* more, const uint8_t* payload, int64_t from, int64_t to, int64_t unit, int add,
                   float* out, const Decode& decode) {
    const gc_more none = {nullptr, 0, 1.0f};
    if (!more) more = &none;
    for (int64_t first = from; first < to;) {
        const int64_t end = stretch_end<stretch>(first, to, unit);
        if (int error = decode(payload, (int64_t)0, first, end, add != 0, out + first)) return error;
        for (int64_t r = 0; r < more->count; ++r)
            if (int error = decode(more->payloads[r], r + 1, first, end, true, out + first)) return error;
        multiply(out + first, end - first, more->factor);
        first = end;
    }
    return GC_OK;
}

// What shares return, in one: the first that is not GC_OK.
inline int first_error(const int* results, int count) {
    for (int k = 0; k < count; ++k)
        if (results[k] != GC_OK) return results[k];
    return GC_OK;
}

template <bool flag>
struct Flag {
    static const bool value = flag;
};

// All entries by a decoder that cannot fail and remembers nothing: `decode(add, payload, first, end, out)`, add: a Flag.
// Threads may take parts of a long unit.
template <int64_t stretch = STRETCH, class Decode>
void decode_units(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t unit, int add,
                  float* out, const Decode& decode) {
    on_shares(shares_of(threads, n, unit > stretch ? stretch : unit), [&](int, int64_t from, int64_t to) {
        decode_in_turn<stretch>(more, payload, from, to, unit, add, out,
                                [&](const uint8_t* one, int64_t, int64_t first, int64_t end, bool adds, float* target) {
                                    if (adds)
                                        decode(Flag<true>(), one, first, end, target);
                                    else
                                        decode(Flag<false>(), one, first, end, target);
                                    return (int)GC_OK;
                                });
    });
}

}  // namespace
#endif
