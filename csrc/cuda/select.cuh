// The k largest of n without sorting: exact, ties to the lowest index, whatever order threads come in.
//
// Keys are selected by digits of 11, 10 and 10 bits (select.cu). Only the first histogram and the search for those
// that may be among the largest read all of x: 8 bytes an entry. Those survivors, k and what shares their first digit,
// are listed tile by tile, two bytes each, and all else looks at them alone.
//
// Within a tile entries are bits of 128 words, by ballots, so that counting bits gives every entry its rank.
#ifndef GCOMPRESS_CUDA_SELECT_CUH
#define GCOMPRESS_CUDA_SELECT_CUH

#include "device.cuh"

namespace {

enum { TILE_WORDS = TILE / 32, ROUNDS = TILE / THREADS };
enum { FIRST_BITS = 11, NEXT_BITS = 10, MOST_DIGITS = 1 << FIRST_BITS };  // of a key's digits

// Which entries are kept: all with a key above `key`, and the first `ties` equal to it. While digits are being found
// `key` is those found so far.
struct Selection {
    uint32_t key, padding;
    int64_t ties;   // of all tiles
    int64_t total;  // entries kept, once tiles are counted
};

struct HistogramShared {
    uint32_t counts[MOST_DIGITS];
};

GC_INLINE void clear(HistogramShared* shared) {
    for (int digit = (int)threadIdx.x; digit < MOST_DIGITS; digit += THREADS) shared->counts[digit] = 0;
    __syncthreads();
}

// The next digit of the k-th largest key: from the top, the first with which k entries are reached. A block calls it; it
// leaves a clear histogram. `k`: 0 for all digits but the first.
GC_INLINE void take_digit(uint32_t* histogram, int bits, int64_t k, ScanShared* scan, Selection* selection) {
    const int digits = 1 << bits, each = digits / THREADS, top = digits - 1 - each * (int)threadIdx.x;
    const int64_t wanted = k ? k : selection->ties;
    const uint32_t prefix = k ? 0 : selection->key;
    uint32_t own = 0, total;
    for (int i = 0; i < each; ++i) own += histogram[top - i];
    int64_t above = scanned(own, scan, &total);  // behind its barriers all have read the selection
    for (int i = 0; i < each; ++i) {
        const uint32_t here = histogram[top - i];
        if (above < wanted && wanted <= above + here) {
            selection->key = prefix << bits | (uint32_t)(top - i);
            selection->ties = wanted - above;
        }
        above += here;
        histogram[top - i] = 0;
    }
}

struct SelectShared {
    HistogramShared histogram;
    ScanShared scan;
    Selection selection;
};

// The selection of the k largest of `count` keys, by one block.
template <class KeyAt>
GC_INLINE void select_in_block(const KeyAt& key_at, int count, int64_t k, SelectShared* shared) {
    clear(&shared->histogram);
    for (int digit = 0, shift = 31 - FIRST_BITS; digit < 3; ++digit, shift -= NEXT_BITS) {
        const int bits = digit == 0 ? FIRST_BITS : NEXT_BITS;
        const uint32_t prefix = digit == 0 ? 0 : shared->selection.key;
        for (int place = (int)threadIdx.x; place < count; place += THREADS) {
            const uint32_t key = key_at(place);
            if (key >> (shift + bits) == prefix)
                atomicAdd(shared->histogram.counts + (key >> shift & ((1u << bits) - 1)), 1u);
        }
        __syncthreads();
        take_digit(shared->histogram.counts, bits, digit == 0 ? k : 0, &shared->scan, &shared->selection);
        __syncthreads();
    }
}

// Survivors of a tile, or all of its entries where `list` is null, in the order of their indices.
struct Candidates {
    const uint16_t* list;
    const uint32_t* counts;
    int64_t n;
    GC_INLINE int64_t first() const { return (int64_t)blockIdx.x * TILE; }
    GC_INLINE int count() const { return list ? (int)counts[blockIdx.x] : (int)min64(TILE, n - first()); }
    GC_INLINE int64_t entry(int place) const { return first() + (list ? (int)list[first() + place] : place); }
};

GC_INLINE uint32_t key_of(float value, bool is_signed) {
    return is_signed ? key_of<true>(value) : key_of<false>(value);
}

struct TileBits {
    uint32_t words[TILE_WORDS], before[TILE_WORDS];
    GC_INLINE bool has(int place) const { return words[place >> 5] >> (place & 31) & 1; }
    GC_INLINE uint32_t rank(int place) const {
        return before[place >> 5] + (uint32_t)__popc(words[place >> 5] & ((1u << (place & 31)) - 1));
    }
};

// Counts the bits before each word; all threads call it once the words are written, and may read it behind it.
GC_INLINE uint32_t rank_bits(TileBits* bits, ScanShared* scan) {
    __syncthreads();
    uint32_t total;
    const int word = (int)threadIdx.x;
    const uint32_t before = scanned(word < TILE_WORDS ? (uint32_t)__popc(bits->words[word]) : 0, scan, &total);
    if (word < TILE_WORDS) bits->before[word] = before;
    __syncthreads();
    return total;
}

GC_INLINE uint32_t lowest_bits(uint32_t word, int64_t count) {
    uint32_t lowest = 0;
    for (; word && count > 0; word &= word - 1, --count) lowest |= word & (0u - word);
    return lowest;
}

struct KeptShared {
    TileBits kept, equal;
    ScanShared scan;
};

// The kept places of a tile as ranked bits. `key_at(place)` is a candidate's key; `equal_before` counts the ties of
// the tiles before.
template <class KeyAt>
GC_INLINE uint32_t keep_places(const KeyAt& key_at, int count, const Selection& selection, uint32_t equal_before,
                               KeptShared* shared) {
    for (int round = 0; round < ROUNDS; ++round) {
        const int place = round * THREADS + (int)threadIdx.x;
        const uint32_t key = place < count ? key_at(place) : 0;
        const uint32_t above = __ballot_sync(ALL_LANES, place < count && key > selection.key);
        const uint32_t equal = __ballot_sync(ALL_LANES, place < count && key == selection.key);
        if (lane() == 0) {
            shared->kept.words[place >> 5] = above;
            shared->equal.words[place >> 5] = equal;
        }
    }
    rank_bits(&shared->equal, &shared->scan);
    const int word = (int)threadIdx.x;
    if (word < TILE_WORDS) {
        const int64_t ties = selection.ties - equal_before - shared->equal.before[word];
        shared->kept.words[word] |= lowest_bits(shared->equal.words[word], ties);
    }
    return rank_bits(&shared->kept, &shared->scan);
}

// The rank over all tiles of a tile's first kept entry.
GC_INLINE int64_t kept_before(const Selection& selection, uint32_t above_before, uint32_t equal_before) {
    return (int64_t)above_before + min64(equal_before, selection.ties);
}

}  // namespace
#endif
