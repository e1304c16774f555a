// Entropy: the bytes of another payload by rANS. Planes are counted, copied and their tables built in parallel; coding
// itself is one chain of 32 states, so one warp does it, a symbol a lane: the format's nature, and slow beside all else
// here. Moves each byte of the inner payload twice (counting, coding) and writes what it codes to twice.
#include "../arith/entropy.h"
#include "device.cuh"

namespace {

// What the steps of encoding, and of decoding, tell each other.
struct EntropyState {
    uint32_t coded;                      // whether any plane is
    uint32_t failed;                     // words did not fit, or bytes are no payload
    int64_t tables, raw, states, total;  // where parts begin, in bytes of the payload, and its size
    int64_t words;                       // bytes of them
    uint32_t state[STATES];
};

enum { CHUNK = 1 << 16 };  // bytes of a plane that a block counts or copies

// Gamma codes of all frequencies plus 1, to zeros.
GC_INLINE void write_gammas(const uint16_t* frequency, uint8_t* target) {
    uint64_t pending = 0;
    int filled = 0;
    for (int s = 0; s < 256; ++s) {
        const uint32_t value = (uint32_t)frequency[s] + 1;
        const int low = 31 - leading_zeros(value);
        pending |= 1ull << (filled + low) | (uint64_t)(value & ((1u << low) - 1)) << (filled + low + 1);
        for (filled += 2 * low + 1; filled >= 8; filled -= 8, pending >>= 8) *target++ = (uint8_t)pending;
    }
    if (filled > 0) *target = (uint8_t)pending;
}

// The bytes read of at most `size`, or 0 if they are no table.
GC_INLINE int64_t read_gammas(const uint8_t* source, int64_t size, uint16_t* frequency) {
    int64_t first = 0, sum = 0;
    for (int s = 0; s < 256; ++s) {
        const int64_t left = 8 * size - first;
        const int count = (int)min64(2 * PROBABILITY_BITS + 1, left);
        const uint32_t bits = count > 0 ? (uint32_t)load_bits(source, first, count) : 0;
        const int low = bits ? __ffs(bits) - 1 : 32;
        if (low > PROBABILITY_BITS) return 0;
        const uint32_t value = (1u << low | (bits >> (low + 1) & ((1u << low) - 1))) - 1;
        frequency[s] = (uint16_t)value;
        sum += value;
        first += 2 * low + 1;
    }
    const int64_t bytes = (first + 7) / 8;
    return sum == TOTAL && bytes <= size ? bytes : 0;
}

GC_INLINE uint32_t lanes_before() { return (1u << lane()) - 1; }

}  // namespace

// Blocks: `planes` times the chunks of the longest one.
GC_KERNEL(entropy_histogram)(const uint8_t* bytes, const Plane* planes, int64_t plane_count, uint64_t* histograms) {
    struct Shared {
        uint32_t counts[256];
    };
    GC_SHARED(Shared, shared);
    const int64_t number = blockIdx.x % plane_count, start = blockIdx.x / plane_count * CHUNK;
    const Plane plane = planes[number];
    shared.counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = start + threadIdx.x; i < min64(plane.count, start + CHUNK); i += THREADS)
        atomicAdd(shared.counts + bytes[plane.offset + i * plane.stride], 1u);
    __syncthreads();
    if (shared.counts[threadIdx.x])
        atomicAdd(histograms + 256 * number + threadIdx.x, (uint64_t)shared.counts[threadIdx.x]);
}
GC_REGISTER(entropy_histogram)

// Frequencies, and which planes are worth coding: a plane a thread, one block.
GC_KERNEL(entropy_plan)(const Plane* planes, int64_t plane_count, const int64_t* histograms, uint16_t* frequencies,
                        EntropyState* state, uint8_t* modes) {
    struct Shared {
        int64_t saved[MAX_PLANES];
    };
    GC_SHARED(Shared, shared);
    const int64_t p = threadIdx.x;
    if (p < plane_count) {
        shared.saved[p] = 0;
        if (planes[p].count >= SMALLEST_CODED) {
            frequencies_of(histograms + 256 * p, planes[p].count, frequencies + 256 * p);
            shared.saved[p] = bytes_saved(histograms + 256 * p, frequencies + 256 * p, planes[p].count);
        }
        modes[p] = shared.saved[p] > 0;
    }
    __syncthreads();
    if (p != 0) return;
    int64_t gain = 0;
    for (int64_t q = 0; q < plane_count; ++q) gain += shared.saved[q] > 0 ? shared.saved[q] : 0;
    state->coded = gain > STATE_BYTES;
    state->failed = 0;
}
GC_REGISTER(entropy_plan)

// The words of all planes, from the last symbol to the first, backwards from the end of `words`. One block.
GC_KERNEL(entropy_code)(const uint8_t* bytes, const Plane* planes, int64_t plane_count, const uint8_t* modes,
                        const uint16_t* frequencies, uint8_t* words, int64_t capacity, EntropyState* all) {
    struct Shared {
        uint32_t places[256];  // a symbol's frequency, and its start above
        ScanShared scan;
    };
    GC_SHARED(Shared, shared);
    if (!all->coded) return;
    uint32_t state = LOWEST_STATE;
    int64_t end = capacity;  // of what is free
    bool failed = false;
    for (int64_t p = plane_count - 1; p >= 0; --p) {
        if (!modes[p]) continue;
        const uint32_t own = frequencies[256 * p + threadIdx.x];
        uint32_t total;
        const uint32_t start = scanned(own, &shared.scan, &total);
        shared.places[threadIdx.x] = own | start << 16;
        __syncthreads();
        const Plane plane = planes[p];
        const int64_t last = (plane.count - 1) / STATES * STATES;
        for (int64_t first = last; first >= 0 && warp() == 0 && !failed; first -= STATES) {
            failed = end < 2 * STATES;
            if (failed) break;
            const bool valid = first + lane() < plane.count;
            const uint32_t place = shared.places[valid ? bytes[plane.offset + (first + lane()) * plane.stride] : 0];
            const uint32_t frequency = place & 0xffff;
            const bool full = valid && state >> 19 >= frequency;
            const uint32_t fulls = __ballot_sync(ALL_LANES, full);
            end -= 2 * __popc(fulls);
            if (full) {
                uint8_t* word = words + end + 2 * __popc(fulls & lanes_before());
                word[0] = (uint8_t)state;
                word[1] = (uint8_t)(state >> 8);
                state >>= 16;
            }
            if (valid) state = (state / frequency << PROBABILITY_BITS) + state % frequency + (place >> 16);
        }
    }
    if (warp() != 0) return;
    all->state[lane()] = state;
    if (lane() != 0) return;
    all->words = capacity - end;
    all->failed = failed;
}
GC_REGISTER(entropy_code)

// Where everything goes, or that nothing is coded: the size, modes, tables and states. One block.
GC_KERNEL(entropy_layout)(const Plane* planes, int64_t plane_count, int64_t size, const uint16_t* frequencies,
                          int64_t* places, EntropyState* state, uint8_t* payload) {
    uint8_t* modes = payload + 4;
    if (threadIdx.x == 0) {
        int64_t raw = 0, tables = 0;
        for (int64_t p = 0; p < plane_count; ++p) {
            if (modes[p])
                tables += table_bytes(frequencies + 256 * p);
            else
                raw += planes[p].count;
        }
        state->total = 4 + plane_count + tables + raw + STATE_BYTES + state->words;
        if (!state->coded || state->failed || state->total >= 4 + plane_count + size) {
            state->coded = 0;
            state->total = 4 + plane_count + size;
            tables = 0;
        }
        int64_t table_place = 4 + plane_count, raw_place = table_place + tables;
        for (int64_t p = 0; p < plane_count; ++p) {
            if (!state->coded) modes[p] = 0;
            places[p] = modes[p] ? table_place : raw_place;
            if (modes[p])
                table_place += table_bytes(frequencies + 256 * p);
            else
                raw_place += planes[p].count;
        }
        state->states = raw_place;
        store_u32(payload, (uint32_t)state->total);
    }
    __syncthreads();
    const int64_t p = threadIdx.x;
    if (p < plane_count && modes[p]) write_gammas(frequencies + 256 * p, payload + places[p]);
    if (state->coded && p < STATES) store_u32(payload + state->states + 4 * p, state->state[p]);
}
GC_REGISTER(entropy_layout)

// Planes that are not coded, to the payload (`back` 0) or from it.
GC_KERNEL(entropy_raw)(uint8_t* bytes, const Plane* planes, int64_t plane_count, const uint8_t* modes,
                       const int64_t* places, const EntropyState* state, int64_t back, uint8_t* payload) {
    const int64_t number = blockIdx.x % plane_count, start = blockIdx.x / plane_count * CHUNK;
    const Plane plane = planes[number];
    if (modes[number] || state->failed & (uint32_t)back) return;
    for (int64_t i = start + threadIdx.x; i < min64(plane.count, start + CHUNK); i += THREADS) {
        uint8_t* inner = bytes + plane.offset + i * plane.stride;
        uint8_t* own = payload + places[number] + i;
        if (back)
            *inner = *own;
        else
            *own = *inner;
    }
}
GC_REGISTER(entropy_raw)

GC_KERNEL(entropy_words)(const uint8_t* words, int64_t capacity, const EntropyState* state, uint8_t* payload) {
    if (!state->coded) return;
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t i = first; i < min64(state->words, first + 4); ++i)
        payload[state->states + STATE_BYTES + i] = words[capacity - state->words + i];
}
GC_REGISTER(entropy_words)

// Reads what stands before the words, and checks it. One block.
GC_KERNEL(entropy_parse)(const uint8_t* payload, int64_t size, const Plane* planes, int64_t plane_count,
                         uint16_t* frequencies, int64_t* places, EntropyState* state) {
    if (threadIdx.x != 0) return;
    const uint8_t* modes = payload + 4;
    int64_t place = 4 + plane_count;
    bool coded = false, failed = place > size;
    for (int64_t p = 0; p < plane_count && !failed; ++p) {
        failed = modes[p] > 1;
        if (!modes[p] || failed) continue;
        const int64_t used = read_gammas(payload + place, size - place, frequencies + 256 * p);
        failed = used == 0;
        place += used;
        coded = true;
    }
    for (int64_t p = 0; p < plane_count && !failed; ++p) {
        if (modes[p]) continue;
        places[p] = place;
        place += planes[p].count;
        failed = place > size;
    }
    if (!failed) failed = coded ? size - place < STATE_BYTES : place != size;
    state->coded = coded;
    state->failed = failed;
    state->states = place;
}
GC_REGISTER(entropy_parse)

// The symbols of the coded planes. One block; sets `failed` where the words do not end as they must.
GC_KERNEL(entropy_decode)(const uint8_t* payload, int64_t size, const Plane* planes, int64_t plane_count,
                          const uint16_t* frequencies, EntropyState* all, uint8_t* bytes) {
    struct Shared {
        uint32_t table[TOTAL];
        ScanShared scan;
    };
    GC_SHARED(Shared, shared);
    if (all->failed || !all->coded) return;
    const uint8_t* modes = payload + 4;
    const uint8_t* words = payload + all->states + STATE_BYTES;
    const uint8_t* const end = payload + size;
    uint32_t state = load_u32(payload + all->states + 4 * lane());
    bool failed = __ballot_sync(ALL_LANES, state < LOWEST_STATE || state >> 31) != 0;
    for (int64_t p = 0; p < plane_count; ++p) {
        if (!modes[p]) continue;
        const uint32_t own = frequencies[256 * p + threadIdx.x];
        uint32_t total;
        const uint32_t start = scanned(own, &shared.scan, &total);  // behind its barriers the last table is read
        for (uint32_t i = 0; i < own; ++i) shared.table[start + i] = slot_of((int)threadIdx.x, own, i);
        __syncthreads();
        const Plane plane = planes[p];
        for (int64_t first = 0; first < plane.count && warp() == 0 && !failed; first += STATES) {
            const bool valid = first + lane() < plane.count;
            if (valid) {
                const uint32_t slot = shared.table[state & (TOTAL - 1)];
                bytes[plane.offset + (first + lane()) * plane.stride] = (uint8_t)slot;
                state = next_state(state, slot);
            }
            const bool low = valid && state < LOWEST_STATE;
            const uint32_t lows = __ballot_sync(ALL_LANES, low);
            failed = end - words < 2 * __popc(lows);
            if (low && !failed) {
                const uint8_t* word = words + 2 * __popc(lows & lanes_before());
                state = state << 16 | (uint32_t)word[0] | (uint32_t)word[1] << 8;
            }
            words += 2 * __popc(lows);
        }
    }
    if (warp() != 0) return;
    failed = __ballot_sync(ALL_LANES, failed || words != end || state != LOWEST_STATE) != 0;
    if (lane() == 0 && failed) all->failed = 1;
}
GC_REGISTER(entropy_decode)
