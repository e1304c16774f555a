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

// Entries that are coded while those behind them are fetched: few enough that these stay in the nearest cache as well, and
// that the processor can wait for all of them at the same time.
const int64_t FETCHED = 512;

// Where the stretch that begins at `first` ends: behind whole units, or within a longer one.
template <int64_t stretch>
inline int64_t stretch_end(int64_t first, int64_t n, int64_t unit) {
    if (unit <= stretch) return min64(n, first + stretch / unit * unit);
    return min64(n, min64(first + stretch, (first / unit + 1) * unit));
}

// From how many entries on a tensor is larger than the nearer caches: what is written of it goes past them, since to fetch
// what is overwritten and to push out what will be read costs more than to fetch it again when it is used.
const int64_t LARGE = 1 << 16;

// How many of `count` entries from `out` on come before the first one that a vector may be streamed to.
inline int64_t before_streams(const float* out, int64_t count) {
    const int64_t entries = (int64_t)((0 - (uintptr_t)out) % sizeof(Floats) / sizeof(float));
    return min64(count, entries);
}

// Copy to memory that is not read again soon.
inline void copy_past_caches(float* out, const float* values, int64_t count) {
    int64_t i = 0;
    for (const int64_t end = before_streams(out, count); i < end; ++i) out[i] = values[i];
    for (; i + WIDE <= count; i += WIDE) stream_floats(out + i, load_floats(values + i));
    for (; i < count; ++i) out[i] = values[i];
}

// Ask for 64 entries that will be read soon, and need not exist.
GC_HOT void fetch_64(const float* x) {
    for (int i = 0; i < 64; i += 16) __builtin_prefetch(x + i, 0, 3);
}

// The entries [first, end) of x + residual, in `fresh`.
inline void correct(const gc_memory* memory, const float* x, int64_t first, int64_t end) {
    if (!memory->residual) {
        if (x != memory->fresh) memcpy(memory->fresh + first, x + first, (size_t)(end - first) * sizeof(float));
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

// Where vectors add up what numbers differ from themselves: not 0 if one of them is not finite.
struct Finite {
    Floats differences = every_float(0.0f);
    float others = 0.0f;
    GC_HOT void look(Floats x) { differences = differences + (x - x); }
    void look(float x) { others += x - x; }
    bool all() const {
        float lanes[WIDE], sum = others;
        store_floats(lanes, differences);
        for (int j = 0; j < WIDE; ++j) sum += lanes[j];
        return sum == 0.0f;
    }
};

// All entries of x + residual, in `fresh`; returns the largest magnitude's bits.
inline int32_t correct_all(const Shares& shares, gc_memory* memory, const float* x) {
    int32_t of_all = 0;
    on_shares(shares, [&](int, int64_t from, int64_t to) {
        int32_t largest = 0;
        for (int64_t first = from; first < to; first += STRETCH) {
            const int64_t end = min64(to, first + STRETCH);
            correct(memory, x, first, end);
            for (int64_t i = first; i < end; ++i) {  // vectorised
                const int32_t key = (int32_t)(float_bits(memory->fresh[i]) & 0x7fffffffu);
                largest = largest > key ? largest : key;
            }
        }
        raise_shared(&of_all, largest);
    });
    if (of_all >= (int32_t)INFINITY_KEY) set_shared(memory->poisoned);
    return of_all;
}

// x + residual, of which a selection takes entries (select.h).
struct Corrected {
    enum Keep { NOTHING, TO_READ_AGAIN, FOR_LATER };  // but for NOTHING, `fresh` is not the residual's place
    gc_memory* memory;
    const float* x;
    Keep keep;  // whether it is written to `fresh`, and if so, whether it is read there at once
    float at(int64_t i) const { return memory->residual ? x[i] + memory->residual[i] : x[i]; }
    const float* part(int64_t first, int64_t count, float* values) const {
        const float* residual = memory->residual ? memory->residual + first : nullptr;
        float* target = keep == TO_READ_AGAIN ? memory->fresh + first : values;
        Finite finite;
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) {
            fetch_64(x + first + FETCHED + i);
            if (residual) fetch_64(residual + FETCHED + i);
            for (int j = 0; j < 64; j += WIDE) {
                const Floats value = load_floats(x + first + i + j);
                const Floats sum = residual ? value + load_floats(residual + i + j) : value;
                finite.look(sum);
                store_floats(target + i + j, sum);
            }
        }
        for (; i < count; ++i) {
            target[i] = at(first + i);
            finite.look(target[i]);
        }
        if (!finite.all()) set_shared(memory->poisoned);
        if (keep == FOR_LATER) copy_past_caches(memory->fresh + first, values, count);
        return target;
    }
    void done() const { finish_streams(); }
    const float* all(const Shares& shares) const {
        correct_all(shares, memory, x);
        return memory->fresh;
    }
};

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

// One stretch, whole units: x + residual in `values`, and behind `encode`, which gets that, what
// `decode(sent)` does not give back, in `fresh`. The stretch behind it is fetched meanwhile, since the processor would wait
// for memory here and compute there.
template <class Encode, class Decode>
void encode_stretch(gc_memory* memory, const float* x, int64_t first, int64_t count, bool past_caches, float* values,
                    float* sent, const Encode& encode, const Decode& decode) {
    const float* residual = memory->residual;
    float* fresh = memory->fresh + first;
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        fetch_64(x + first + count + i);
        for (int j = 0; j < 64; j += WIDE) {
            const Floats value = load_floats(x + first + i + j);
            store_floats(values + i + j, residual ? value + load_floats(residual + first + i + j) : value);
        }
    }
    for (; i < count; ++i) values[i] = residual ? x[first + i] + residual[first + i] : x[first + i];
    encode(values);
    decode(sent);
    Finite finite;
    const auto keep_one = [&](int64_t k) {
        fresh[k] = values[k] - sent[k];
        finite.look(fresh[k]);
    };
    i = 0;
    for (const int64_t end = before_streams(fresh, count); i < end; ++i) keep_one(i);
    for (; i + 64 <= count; i += 64) {
        if (residual) fetch_64(residual + first + count + i);
        for (int j = 0; j < 64; j += WIDE) {
            const Floats lost = load_floats(values + i + j) - load_floats(sent + i + j);
            finite.look(lost);
            if (past_caches)
                stream_floats(fresh + i + j, lost);
            else
                store_floats(fresh + i + j, lost);
        }
    }
    for (; i < count; ++i) keep_one(i);
    if (!finite.all()) set_shared(memory->poisoned);
}

// The same for the entries [first, end), which were encoded without being written to `fresh`.
template <class Decode>
void keep_corrected(gc_memory* memory, const float* x, int64_t first, int64_t end, bool past_caches,
                    const Decode& decode) {
    alignas(64) float values[FETCHED], sent[FETCHED];
    for (; first < end; first += FETCHED) {
        const int64_t count = min64(FETCHED, end - first);
        encode_stretch(
            memory, x, first, count, past_caches, values, sent, [](const float*) {},
            [&](float* decoded) { decode(first, first + count, decoded); });
    }
    finish_streams();
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
        const int64_t longest = 4096;  // of a unit that stays in the nearest cache with what is made of it
        if (unit > longest) {
            for (int64_t first = from; first < to; first += unit) {
                const int64_t end = min64(to, first + unit);
                correct(memory, x, first, end);
                encode(memory->fresh, first, end, to);
                keep_decoded<stretch>(memory, first, end, unit,
                                      [&](int64_t start, int64_t stop, float* sent) { decode(start, stop, to, sent); });
            }
            return;
        }
        // A residual that is replaced in its place was made for this call, and is in the cache.
        const bool past_caches = to - from >= LARGE && memory->residual != memory->fresh;
        const int64_t step = unit > FETCHED ? unit : FETCHED / unit * unit;
        alignas(64) float values[longest], sent[longest];
        for (int64_t first = from; first < to; first += step) {
            const int64_t end = min64(to, first + step);
            encode_stretch(
                memory, x, first, end - first, past_caches, values, sent,
                [&](const float* fresh) { encode(fresh - first, first, end, to); },
                [&](float* decoded) { decode(first, end, to, decoded); });
        }
        if (past_caches) finish_streams();
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
    const gc_more none = {nullptr, 0, 1.0f, 0};
    if (!more) more = &none;
    const bool past_caches = !add && !more->again && to - from >= LARGE;
    alignas(64) float values[stretch];
    for (int64_t first = from; first < to;) {
        const int64_t end = stretch_end<stretch>(first, to, unit);
        float* target = past_caches ? values : out + first;
        if (int error = decode(payload, (int64_t)0, first, end, add != 0, target)) return error;
        for (int64_t r = 0; r < more->count; ++r)
            if (int error = decode(more->payloads[r], r + 1, first, end, true, target)) return error;
        multiply(target, end - first, more->factor);
        if (past_caches) copy_past_caches(out + first, values, end - first);
        first = end;
    }
    if (past_caches) finish_streams();
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
