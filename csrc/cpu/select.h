// The k largest of n without sorting: exact, ties to the lowest index, one pass as a rule.
#ifndef GCOMPRESS_CPU_SELECT_H
#define GCOMPRESS_CPU_SELECT_H

#include "simd.h"

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

// Radix selection: three histograms of 11, 10 and 10 bits, from the top.
template <class Keys>
Selection radix_select(const Keys& key, int64_t n, int64_t k) {
    int64_t histogram[2][2048];  // two, so that equal neighbours do not wait for each other
    const int shifts[3] = {20, 10, 0}, digit_bits[3] = {11, 10, 10};
    uint32_t prefix = 0;
    for (int pass = 0; pass < 3; ++pass) {
        const int shift = shifts[pass], above = shift + digit_bits[pass];
        const uint32_t digit_mask = (1u << digit_bits[pass]) - 1;
        memset(histogram, 0, sizeof histogram);
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t value = key(i);
            if (pass == 0 || value >> above == prefix) ++histogram[i & 1][(value >> shift) & digit_mask];
        }
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

// The keys of at least `bound`, which is at least 1, to `keys`; returns how many, or -1 where there is no room.
template <bool is_signed>
GC_HOT int64_t keys_from(uint32_t bound, const float* x, int64_t n, uint32_t* keys, int64_t capacity) {
    int64_t found = 0;
    uint32_t block[64];
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t count = min64(64, n - i);
        uint64_t mask;
        if (count == 64) {
            keys_64<is_signed>(x + i, block);
            mask = at_least_64(block, bound);
        } else {
            mask = 0;
            for (int64_t j = 0; j < count; ++j) {
                block[j] = key_of<is_signed>(x[i + j]);
                mask |= (uint64_t)(block[j] >= bound) << j;
            }
        }
        if (found + 64 > capacity) return -1;
        for (; mask; mask &= mask - 1) keys[found++] = block[__builtin_ctzll(mask)];
    }
    return found;
}

// A sample gives a bound that about 1.3 k entries reach; one pass collects those, and the
// exact selection looks at them alone. When the sample misled (too few or too many reach
// the bound), or n is small, the selection looks at everything: same result, slower.
template <bool is_signed>
Selection select_largest(const float* x, int64_t n, int64_t k, uint32_t* workspace, int64_t capacity) {
    const FloatKeys<is_signed> all{x};
    const int64_t sample = min64(min64(16384, capacity), n / 8) / 4 * 4;
    const double expected = (double)sample * (double)k / (double)n;
    const int64_t sample_rank = (int64_t)(expected + 4.0 * __builtin_sqrt(expected) + 4.0);
    if (n < 8192 || sample_rank > sample / 2) return radix_select(all, n, k);

    // Four neighbours at a time, since reaching for a sample costs a cache miss.
    const int64_t runs = sample / 4, stride = n / runs;
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t jitter = (int64_t)(((uint64_t)run * 0x9E3779B97F4A7C15ull >> 33) % (uint64_t)(stride - 3));
        for (int j = 0; j < 4; ++j) workspace[4 * run + j] = all(run * stride + jitter + j);
    }
    const uint32_t bound = radix_select(StoredKeys{workspace}, sample, sample_rank).threshold;
    if (bound == 0) return radix_select(all, n, k);

    const int64_t found = keys_from<is_signed>(bound, x, n, workspace, capacity);
    if (found < k) return radix_select(all, n, k);
    return radix_select(StoredKeys{workspace}, found, k);
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
inline Selection select_of_chunk(const float* x, int64_t n, int64_t k, uint32_t* workspace) {
    int64_t width = n;
    while (width / 2 >= 2 * k && width >= 128) width /= 2;
    for (int64_t i = 0; i < width; ++i) workspace[i] = key_of<true>(x[i]);  // vectorised
    for (int64_t first = width; first + width <= n; first += width)
        for (int64_t i = 0; i < width; ++i) {  // vectorised
            const int32_t key = (int32_t)key_of<true>(x[first + i]), largest = (int32_t)workspace[i];
            workspace[i] = (uint32_t)(key > largest ? key : largest);
        }
    const Selection selection = bit_select(workspace, width, k);
    if (width == n) return selection;
    uint32_t* keys = workspace + width;
    const uint32_t bound = selection.threshold > 0 ? selection.threshold : 1;
    const int64_t found = keys_from<true>(bound, x, n, keys, n + 64);
    return found < k ? Selection{0, k - found} : bit_select(keys, found, k);
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
