// The k largest of n without sorting: exact, ties to the lowest index, one pass as a rule.
#ifndef GCOMPRESS_CPU_SELECT_H
#define GCOMPRESS_CPU_SELECT_H

#include "simd.h"
#include "threads.h"

namespace {

// Which entries are kept: all with a key above `threshold`, and the first `ties` equal to it.
struct Selection {
    uint32_t threshold;
    int64_t ties;
};

template <bool is_signed>
struct FloatKeys {
    const float* x;
    uint32_t operator()(int64_t i) const { return key_of<is_signed>(x[i]); }
};
struct StoredKeys {
    const uint32_t* keys;
    uint32_t operator()(int64_t i) const { return keys[i]; }
};

const int DIGITS = 2048;
const int64_t FEW_ENTRIES = 8192;  // with fewer, comparisons take less time than a histogram does
const int64_t FEW_KEYS = 1 << 15;  // that are there already: with fewer, a thread is not worth its start

// How often every digit occurs in a range of keys, of those that have the prefix above it.
template <class Keys>
void count_digits(const Keys& key, int64_t from, int64_t to, int pass, int shift, int above, uint32_t prefix,
                  uint32_t digit_mask, int64_t (*histogram)[DIGITS]) {
    for (int64_t i = from; i < to; ++i) {
        const uint32_t value = key(i);
        if (pass == 0 || value >> above == prefix) ++histogram[i & 1][(value >> shift) & digit_mask];
    }
}

// Radix selection: three histograms of 11, 10 and 10 bits, from the top.
template <class Keys>
Selection radix_select(const Shares& shares, const Keys& key, int64_t k) {
    int64_t histogram[2][DIGITS];  // two, so that equal neighbours do not wait for each other
    const int shifts[3] = {20, 10, 0}, digit_bits[3] = {11, 10, 10};
    uint32_t prefix = 0;
    for (int pass = 0; pass < 3; ++pass) {
        const int shift = shifts[pass], above = shift + digit_bits[pass];
        const uint32_t digit_mask = (1u << digit_bits[pass]) - 1;
        memset(histogram, 0, sizeof histogram);
        if (shares.count == 1)
            count_digits(key, 0, shares.n, pass, shift, above, prefix, digit_mask, histogram);
        else
            on_shares(shares, [&](int, int64_t from, int64_t to) {
                int64_t mine[2][DIGITS] = {{0}};
                count_digits(key, from, to, pass, shift, above, prefix, digit_mask, mine);
                for (int digit = 0; digit < DIGITS; ++digit)
                    add_to_shared(histogram[0] + digit, mine[0][digit] + mine[1][digit]);
            });
        uint32_t digit = digit_mask;
        for (;; --digit) {
            const int64_t count = histogram[0][digit] + histogram[1][digit];
            if (count >= k || digit == 0) break;
            k -= count;
        }
        prefix = prefix << digit_bits[pass] | digit;
    }
    return Selection{prefix, k};
}

template <bool is_signed>
GC_HOT void keys_64(const float* x, uint32_t* keys) {
    for (int j = 0; j < 64; ++j) keys[j] = key_of<is_signed>(x[j]);  // vectorised
}

// The keys of at least `bound`, which is at least 1, of entries from `*next` to `end`, and where these are from `origin` on,
// unless `places` is null; returns how many. `*next` is `end` afterwards, or where there was no room for 64 more.
template <bool is_signed>
GC_HOT int64_t keys_from(uint32_t bound, const float* x, int64_t* next, int64_t end, int64_t capacity, uint32_t* keys,
                         uint32_t* places, int64_t origin) {
    int64_t found = 0, i = *next;
    const Ints below = every_int((int32_t)bound - 1), magnitude = every_int(0x7fffffff);
    for (; i < end && found + 64 <= capacity; i += 64) {
        const int64_t count = min64(64, end - i);
        uint64_t mask = 0;
        if (count < 64) {
            for (int64_t j = 0; j < count; ++j) mask |= (uint64_t)(key_of<is_signed>(x[i + j]) >= bound) << j;
        } else if (is_signed) {
            mask = word_where([&](int j) { return above(load_ints(x + i + j) & magnitude, below); });
        } else {
            uint32_t block[64];
            keys_64<is_signed>(x + i, block);
            mask = at_least_64(block, bound);
        }
        for (; mask; mask &= mask - 1, ++found) {
            const int j = __builtin_ctzll(mask);
            keys[found] = key_of<is_signed>(x[i + j]);
            if (places) places[found] = (uint32_t)(i + j - origin);
        }
    }
    *next = min64(i, end);
    return found;
}

// Where a selection takes its entries from: `at(i)` is one of them; `part(first, count, values)` is where `count` of them
// lie, which may be in `values`; `done()` ends a thread's parts; `all(shares)` is where all lie.
struct Entries {
    const float* x;
    float at(int64_t i) const { return x[i]; }
    const float* part(int64_t first, int64_t, float*) const { return x + first; }
    void done() const {}
    const float* all(const Shares&) const { return x; }
};
// Entries at a time, few enough that they stay in the nearest cache, where those that follow come meanwhile.
const int64_t SELECTED_AT_ONCE = 512;

// What of a share is kept, and how many kept entries lie before it.
struct ShareSelection {
    Selection selection;
    int64_t before;
};

// From how many keys of each share are above the threshold and how many equal it: ties count from the first entry on.
inline void divide_selection(const Selection& whole, int count, const int64_t* above, const int64_t* equal,
                             ShareSelection* of_shares) {
    Selection left = whole;
    int64_t before = 0;
    for (int k = 0; k < count; ++k) {
        of_shares[k] = {left, before};
        const int64_t ties = min64(equal[k], left.ties);
        left.ties -= ties;
        before += above[k] + ties;
    }
}

inline void count_beside(const uint32_t* keys, int64_t count, uint32_t threshold, int64_t* above, int64_t* equal) {
    int32_t over = 0, at = 0;
    for (int64_t i = 0; i < count; ++i) {  // vectorised
        over += (int32_t)keys[i] > (int32_t)threshold;
        at += keys[i] == threshold;
    }
    *above += over;
    *equal += at;
}

// The selection from all entries.
template <bool is_signed>
Selection select_from_all(const Shares& shares, const float* x, int64_t k, ShareSelection* of_shares) {
    const Selection whole = radix_select(shares, FloatKeys<is_signed>{x}, k);
    int64_t above[MOST_THREADS] = {0}, equal[MOST_THREADS] = {0};
    const Shares others = {shares.begin(shares.count - 1), shares.each, shares.count - 1};  // nothing follows the last
    if (others.count > 0)
        on_shares(others, [&](int share, int64_t from, int64_t to) {
            uint32_t keys[64];
            int64_t counts[2] = {0, 0};
            for (int64_t i = from; i < to; i += 64) {  // shares but the last one end with a whole block
                keys_64<is_signed>(x + i, keys);
                count_beside(keys, 64, whole.threshold, counts, counts + 1);
            }
            above[share] = counts[0];
            equal[share] = counts[1];
        });
    divide_selection(whole, shares.count, above, equal, of_shares);
    return whole;
}

// The entries that reach a bound, in parts that each belong to one share: of each entry its key and, unless `places` is
// null, its place in the share. The parts of a share are in order.
struct Found {
    enum { MOST_PARTS = 512 };
    uint32_t *keys, *places;
    int64_t capacity;     // of either
    int64_t part, taken;  // the room of a part, and how many parts there are
    uint8_t share_of[MOST_PARTS];
    int64_t counts[MOST_PARTS];
};

// The keys from `*next` on that reach `bound`, in a part of its own; returns how many.
template <bool is_signed, class Source>
int64_t fill_part(const Source& source, uint32_t bound, int64_t from, int64_t* next, int64_t to, int64_t number,
                  Found* found) {
    alignas(64) float values[SELECTED_AT_ONCE];
    uint32_t* keys = found->keys + number * found->part;
    uint32_t* places = found->places ? found->places + number * found->part : nullptr;
    int64_t count = 0;
    while (*next < to) {
        const int64_t first = *next, end = min64(to, first + SELECTED_AT_ONCE);
        const float* x = source.part(first, end - first, values) - first;
        count += keys_from<is_signed>(bound, x, next, end, found->part - count, keys + count,
                                      places ? places + count : nullptr, from);
        if (*next < end) break;
    }
    source.done();
    found->counts[number] = count;
    return count;
}

// The selection from entries that reach `bound`; false where fewer than k do, or too many for the workspace. Several
// threads take parts of it as they need them, and leave keys of 0 behind what they find.
template <bool is_signed, class Source>
bool select_from_found(const Shares& shares, const Source& source, int64_t k, uint32_t bound, Found* found,
                       Selection* whole, ShareSelection* of_shares) {
    if (shares.count == 1) {
        int64_t next = 0;
        found->part = found->capacity;
        found->taken = 1;
        found->share_of[0] = 0;
        const int64_t count = fill_part<is_signed>(source, bound, 0, &next, shares.n, 0, found);
        if (next < shares.n || count < k) return false;
        *whole = radix_select({count, count, 1}, StoredKeys{found->keys}, k);
        of_shares[0] = {*whole, 0};
        return true;
    }
    const int64_t even = found->capacity / Found::MOST_PARTS, part = even > 1024 ? even : 1024;
    const int64_t parts = found->capacity / part;
    found->part = part;
    int64_t taken = 0, total = 0;
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        int64_t mine = 0;
        for (int64_t next = from; next < to;) {
            const int64_t number = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
            if (number >= parts) return;
            const int64_t here = fill_part<is_signed>(source, bound, from, &next, to, number, found);
            memset(found->keys + number * part + here, 0, (size_t)(part - here) * sizeof(uint32_t));
            found->share_of[number] = (uint8_t)share;
            mine += here;
        }
        add_to_shared(&total, mine);
    });
    if (taken > parts || total < k) return false;
    found->taken = taken;
    *whole = radix_select(shares_of(shares.count, taken * part, 64, FEW_KEYS), StoredKeys{found->keys}, k);
    int64_t above[MOST_THREADS] = {0}, equal[MOST_THREADS] = {0};
    for (int64_t number = 0; number < taken; ++number)
        count_beside(found->keys + number * part, found->counts[number], whole->threshold,
                     above + found->share_of[number], equal + found->share_of[number]);
    divide_selection(*whole, shares.count, above, equal, of_shares);
    return true;
}

// The selection of k of n stored keys, bit by bit: for so few that a histogram would take longer.
inline Selection bit_select(const uint32_t* keys, int64_t n, int64_t k) {
    uint32_t threshold = 0;
    int32_t above = 0;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        const int32_t bound = (int32_t)(threshold | bit);
        int32_t reached = 0;
        for (int64_t i = 0; i < n; ++i) reached += (int32_t)keys[i] >= bound;  // vectorised
        if (reached >= k)
            threshold = (uint32_t)bound;
        else
            above = reached;  // of the least bound that fewer than k reach, in the end the one above the threshold
    }
    return Selection{threshold, k - above};
}

// The k largest of a chunk. Where many are dropped: of as many maxima as are at least 2 k, each of entries of its own, k
// reach the k-th largest, so that no other entry is among the k largest than those that reach it. `workspace` holds
// 2 n + 64 words.
template <bool is_signed>
Selection select_of_chunk(const float* x, int64_t n, int64_t k, uint32_t* workspace) {
    int64_t width = n;
    while (width / 2 >= 2 * k && width >= 128) width /= 2;
    for (int64_t i = 0; i < width; ++i) workspace[i] = key_of<is_signed>(x[i]);  // vectorised
    for (int64_t first = width; first + width <= n; first += width)
        for (int64_t i = 0; i < width; ++i) {  // vectorised
            const int32_t key = (int32_t)key_of<is_signed>(x[first + i]), largest = (int32_t)workspace[i];
            workspace[i] = (uint32_t)(key > largest ? key : largest);
        }
    const Selection selection = bit_select(workspace, width, k);
    if (width == n) return selection;
    uint32_t* keys = workspace + width;
    const uint32_t bound = selection.threshold > 0 ? selection.threshold : 1;
    int64_t next = 0;
    const int64_t found = keys_from<is_signed>(bound, x, &next, n, n + 64, keys, nullptr, 0);
    return found < k ? Selection{0, k - found} : bit_select(keys, found, k);
}

// A sample gives a bound that about 1.3 k entries reach; one pass collects those, and the exact selection looks at them
// alone. When the sample misled (too few or too many reach the bound), or n is small, the selection looks at everything:
// same result, slower. `found`: with its workspace; afterwards what was collected, or `taken` is 0.
template <bool is_signed, class Source>
Selection select_largest(const Shares& shares, const Source& source, int64_t k, Found* found,
                         ShareSelection* of_shares) {
    const int64_t n = shares.n, sample = min64(min64(16384, found->capacity), n / 64) / 8 * 8;
    const double expected = (double)sample * (double)k / (double)n;
    const int64_t sample_rank = (int64_t)(expected + 4.0 * __builtin_sqrt(expected) + 4.0);
    if (n >= FEW_ENTRIES && sample_rank <= sample / 2) {
        // Eight neighbours at a time, since reaching for a sample costs a cache miss.
        const int64_t runs = sample / 8, stride = n / runs;
        uint32_t* keys = found->keys;
        on_shares(shares_of(shares.count, runs, 64, 1024), [=](int, int64_t from, int64_t to) {
            for (int64_t run = from; run < to; ++run) {
                const int64_t jitter =
                    (int64_t)(((uint64_t)run * 0x9E3779B97F4A7C15ull >> 40) * (uint64_t)(stride - 7) >> 24);
                for (int j = 0; j < 8; ++j) keys[8 * run + j] = key_of<is_signed>(source.at(run * stride + jitter + j));
            }
        });
        const uint32_t bound = radix_select({sample, sample, 1}, StoredKeys{keys}, sample_rank).threshold;
        Selection whole;
        if (bound > 0 && select_from_found<is_signed>(shares, source, k, bound, found, &whole, of_shares)) return whole;
    }
    found->taken = 0;
    const float* all = source.all(shares);
    if (n >= FEW_ENTRIES || found->capacity < 2 * n + 64) return select_from_all<is_signed>(shares, all, k, of_shares);
    of_shares[0] = {select_of_chunk<is_signed>(all, n, k, found->keys), 0};
    return of_shares[0].selection;
}

// The kept entries of one block of up to 64 keys, as a bit mask; counts the ties down.
GC_HOT uint64_t kept_of_block(const uint32_t* keys, int64_t count, Selection* selection) {
    const uint64_t valid = count == 64 ? ~0ull : (1ull << count) - 1;
    const uint32_t threshold = selection->threshold;
    uint64_t kept = threshold == 0x7fffffffu ? 0 : at_least_64(keys, threshold + 1) & valid;
    if (selection->ties > 0) {
        uint64_t equal = (threshold == 0 ? ~0ull : at_least_64(keys, threshold)) & valid & ~kept;
        for (; equal && selection->ties > 0; equal &= equal - 1, --selection->ties) kept |= equal & (0 - equal);
    }
    return kept;
}

}  // namespace
#endif
