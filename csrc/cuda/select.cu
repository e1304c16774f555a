// The steps of selecting the k largest (select.cuh); bytes moved: 4 an entry by select_histogram, 4 by
// select_survivors and 2 written for each survivor; the others look at survivors or at sums over tiles only.
#include "select.cuh"

namespace {

// A count of digits; equal neighbours of one thread are added at once, since zeros come in masses.
struct Digits {
    uint32_t* histogram;
    uint32_t last, run;
    GC_INLINE void add(uint32_t digit) {
        if (digit == last) {
            ++run;
            return;
        }
        flush();
        last = digit;
        run = 1;
    }
    GC_INLINE void flush() {
        if (run > 0) atomicAdd(histogram + last, run);
        run = 0;
    }
};

GC_INLINE void publish(HistogramShared* shared, uint32_t* histogram) {
    __syncthreads();
    for (int digit = (int)threadIdx.x; digit < MOST_DIGITS; digit += THREADS)
        if (shared->counts[digit]) atomicAdd(histogram + digit, shared->counts[digit]);
}

}  // namespace

// Blocks go through tiles in turn: `tiles` of them altogether.
GC_KERNEL(select_histogram)(const float* x, const float* residual, int64_t n, int64_t is_signed, int64_t tiles,
                            uint32_t* histogram) {
    GC_SHARED(HistogramShared, shared);
    const Source source = {x, residual};
    const bool aligned = is_aligned(x, 16) && !residual;
    clear(&shared);
    Digits digits = {shared.counts, 0, 0};
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int64_t i = tile * TILE + 4 * threadIdx.x; i < min64(n, (tile + 1) * TILE); i += 4 * THREADS) {
            float four[4];
            if (aligned && i + 4 <= n)
                load_four(x + i, true, four);
            else
                for (int j = 0; j < 4; ++j) four[j] = i + j < n ? source.at(i + j) : 0.0f;
            for (int j = 0; j < 4 && i + j < n; ++j) digits.add(key_of(four[j], is_signed != 0) >> (2 * NEXT_BITS));
        }
    }
    digits.flush();
    publish(&shared, histogram);
}
GC_REGISTER(select_histogram)

// The next digit of the k-th largest key, by one block.
GC_KERNEL(select_digit)(uint32_t* histogram, int64_t bits, int64_t k, Selection* selection) {
    GC_SHARED(ScanShared, scan);
    take_digit(histogram, (int)bits, k, &scan, selection);
}
GC_REGISTER(select_digit)

// The entries that may be among the largest, in order, and the second digits of those in doubt.
GC_KERNEL(select_survivors)(const float* x, const float* residual, float* fresh, uint32_t* poisoned, int64_t n,
                            int64_t is_signed, const Selection* selection, uint16_t* list, uint32_t* counts,
                            uint32_t* histogram) {
    struct Shared {
        HistogramShared histogram;
        TileBits bits;
        ScanShared scan;
    };
    GC_SHARED(Shared, shared);
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t first = (int64_t)blockIdx.x * TILE;
    clear(&shared.histogram);
    Digits digits = {shared.histogram.counts, 0, 0};
    for (int round = 0; round < ROUNDS; ++round) {
        const int place = round * THREADS + (int)threadIdx.x;
        const bool valid = first + place < n;
        const float value = valid ? source.at(first + place) : 0.0f;
        const uint32_t key = key_of(value, is_signed != 0), digit = key >> (2 * NEXT_BITS);
        const uint32_t survivors = __ballot_sync(ALL_LANES, valid && digit >= selection->key);
        if (lane() == 0) shared.bits.words[place >> 5] = survivors;
        if (valid && digit == selection->key) digits.add(key >> NEXT_BITS & ((1 << NEXT_BITS) - 1));
        if (valid && fresh) feedback.keep(first + place, value, 0.0f);  // as if nothing were sent
    }
    digits.flush();
    const uint32_t total = rank_bits(&shared.bits, &shared.scan);
    for (int round = 0; round < ROUNDS; ++round) {
        const int place = round * THREADS + (int)threadIdx.x;
        if (shared.bits.has(place)) list[first + shared.bits.rank(place)] = (uint16_t)place;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
    publish(&shared.histogram, histogram);
}
GC_REGISTER(select_survivors)

// The last digits of the survivors whose first two are right.
GC_KERNEL(select_refine)(const float* x, const float* residual, int64_t n, int64_t is_signed,
                         const Selection* selection, const uint16_t* list, const uint32_t* counts,
                         uint32_t* histogram) {
    GC_SHARED(HistogramShared, shared);
    const Source source = {x, residual};
    const Candidates candidates = {list, counts, n};
    clear(&shared);
    Digits digits = {shared.counts, 0, 0};
    for (int place = (int)threadIdx.x; place < candidates.count(); place += THREADS) {
        const uint32_t key = key_of(source.at(candidates.entry(place)), is_signed != 0);
        if (key >> NEXT_BITS == selection->key) digits.add(key & ((1 << NEXT_BITS) - 1));
    }
    digits.flush();
    publish(&shared, histogram);
}
GC_REGISTER(select_refine)

// How many of a tile are above the k-th largest key, and how many equal to it. `list` null: of all entries.
GC_KERNEL(select_count)(const float* x, const float* residual, int64_t n, int64_t is_signed, const Selection* selection,
                        const uint16_t* list, const uint32_t* counts, uint32_t* above, uint32_t* equal) {
    GC_SHARED(ScanShared, scan);
    const Source source = {x, residual};
    const Candidates candidates = {list, counts, n};
    uint32_t own_above = 0, own_equal = 0, total_above, total_equal;
    for (int place = (int)threadIdx.x; place < candidates.count(); place += THREADS) {
        const uint32_t key = key_of(source.at(candidates.entry(place)), is_signed != 0);
        own_above += key > selection->key;
        own_equal += key == selection->key;
    }
    scanned(own_above, &scan, &total_above);
    scanned(own_equal, &scan, &total_equal);
    if (threadIdx.x != 0) return;
    above[blockIdx.x] = total_above;
    equal[blockIdx.x] = total_equal;
}
GC_REGISTER(select_count)

// From numbers of each tile to those of all tiles before it, in place; a null `equal` is left out. One block.
GC_KERNEL(select_scan)(uint32_t* above, uint32_t* equal, int64_t tiles, Selection* selection) {
    GC_SHARED(ScanShared, scan);
    uint32_t before_above = 0, before_equal = 0;
    for (int64_t first = 0; first < tiles; first += THREADS) {
        const int64_t tile = first + threadIdx.x;
        uint32_t total;
        const uint32_t own = scanned(tile < tiles ? above[tile] : 0, &scan, &total);
        if (tile < tiles) above[tile] = before_above + own;
        before_above += total;
        if (!equal) continue;
        const uint32_t ties = scanned(tile < tiles ? equal[tile] : 0, &scan, &total);
        if (tile < tiles) equal[tile] = before_equal + ties;
        before_equal += total;
    }
    if (threadIdx.x == 0) selection->total = kept_before(*selection, before_above, before_equal);
}
GC_REGISTER(select_scan)

// Threshold: the largest key, and the selection of all that reach `threshold`, or that part of the largest.
GC_KERNEL(largest_key)(const float* x, int64_t n, uint32_t* largest) {
    const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    uint32_t own = 0;
    for (int64_t j = i; j < min64(n, i + 4); ++j) own = key_of<true>(x[j]) > own ? key_of<true>(x[j]) : own;
    for (int distance = 16; distance > 0; distance /= 2) {
        const uint32_t other = __shfl_xor_sync(ALL_LANES, own, distance);
        own = other > own ? other : own;
    }
    if (lane() == 0) atomicMax(largest, own);
}
GC_REGISTER(largest_key)

GC_KERNEL(threshold_key)(const uint32_t* largest, double threshold, int64_t relative, Selection* selection) {
    if (threadIdx.x != 0) return;
    const float bound = relative ? (float)threshold * bits_float(*largest) : (float)threshold;
    uint32_t key = float_bits(bound);
    if (relative && *largest >= INFINITY_KEY) key = INFINITY_KEY;
    selection->key = (key > 1 ? key : 1) - 1;
    selection->ties = 0;
}
GC_REGISTER(threshold_key)
