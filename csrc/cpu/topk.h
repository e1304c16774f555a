// TopK: the largest entries and three codings of their indices (gcompress/compressors/topk.py).
#ifndef GCOMPRESS_CPU_TOPK_H
#define GCOMPRESS_CPU_TOPK_H

#include "../gcompress.h"
#include "select.h"
#include "simd.h"

namespace {

struct BitWriter {
    uint8_t* target;
    uint64_t pending;
    int filled;
    void put(uint64_t value, int bits) {  // bits <= 32
        pending |= value << filled;
        for (filled += bits; filled >= 8; filled -= 8, pending >>= 8) *target++ = (uint8_t)pending;
    }
    void finish() {
        if (filled > 0) *target++ = (uint8_t)pending;
    }
};

struct BitReader {
    const uint8_t* source;
    const uint8_t* end;
    uint64_t pending;
    int filled;
    uint64_t get(int bits) {
        for (; filled < bits; filled += 8) pending |= (uint64_t)(source < end ? *source++ : 0) << filled;
        const uint64_t value = pending & ((1ull << bits) - 1);
        pending >>= bits;
        filled -= bits;
        return value;
    }
};

inline int64_t bytes_of_bits(int64_t bits) { return (bits + 7) / 8; }

void encode_selected(const float* x, int64_t n, int64_t k, Selection selection, int form, int width, uint8_t* payload) {
    uint8_t* values = payload;
    uint8_t* index = payload + 4 * k;
    BitWriter low = {index, 0, 0};
    uint8_t* high = index + bytes_of_bits(k * width);
    if (form == GC_INDEX_GAPS) memset(high, 0, (size_t)bytes_of_bits(k + ((n - 1) >> width)));
    const uint64_t low_mask = (1ull << width) - 1;
    uint32_t keys[64] = {0};
    int64_t written = 0;
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t block = min64(64, n - i);
        if (block == 64)
            keys_64<true>(x + i, keys);
        else
            for (int64_t j = 0; j < block; ++j) keys[j] = key_of<true>(x[i + j]);
        uint64_t kept = kept_of_block(keys, block, &selection);
        if (form == GC_INDEX_BITMAP) memcpy(index + i / 8, &kept, (size_t)bytes_of_bits(block));
        for (; kept; kept &= kept - 1, ++written) {
            const int64_t entry = i + __builtin_ctzll(kept);
            store<float>(values + 4 * written, x[entry]);
            if (form == GC_INDEX_FIXED) {
                low.put((uint64_t)entry, width);
            } else if (form == GC_INDEX_GAPS) {
                low.put((uint64_t)entry & low_mask, width);
                const int64_t position = (entry >> width) + written;
                high[position >> 3] |= (uint8_t)(1u << (position & 7));
            }
        }
    }
    if (form != GC_INDEX_BITMAP) low.finish();
}

void topk_encode(const float* x, int64_t n, int64_t k, int form, int width, uint32_t* workspace, int64_t capacity,
                 uint8_t* payload) {
    encode_selected(x, n, k, select_largest<true>(x, n, k, workspace, capacity), form, width, payload);
}

// Threshold (gcompress/compressors/threshold.py): the largest key, how many reach `key`, and those k.
uint32_t largest_key(const float* x, int64_t n) {
    int32_t largest = 0;  // signed, which every instruction set can compare
    for (int64_t i = 0; i < n; ++i) {
        const int32_t key = (int32_t)key_of<true>(x[i]);
        largest = key > largest ? key : largest;
    }
    return (uint32_t)largest;
}

int64_t count_keys(const float* x, int64_t n, uint32_t key) {
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += 4096) {
        int32_t part = 0;
        const int64_t end = min64(n, first + 4096);
        for (int64_t i = first; i < end; ++i) part += (int32_t)key_of<true>(x[i]) >= (int32_t)key;
        count += part;
    }
    return count;
}

void keys_encode(const float* x, int64_t n, int64_t k, uint32_t key, int form, int width, uint8_t* payload) {
    encode_selected(x, n, k, Selection{key - 1, 0}, form, width, payload);
}

// Hybrid (gcompress/compressors/combine.py): what is left beside the outliers, in their place; and both together.
void hybrid_split(const float* x, int64_t n, float* outliers) {
    for (int64_t i = 0; i < n; ++i) outliers[i] = outliers[i] == 0.0f ? x[i] : 0.0f;  // vectorised
}

void hybrid_merge(const float* outliers, int64_t n, float* rest) {
    for (int64_t i = 0; i < n; ++i) rest[i] = outliers[i] == 0.0f ? rest[i] : outliers[i];  // vectorised
}

template <bool add>
int topk_decode_form(const uint8_t* payload, int64_t n, int64_t k, int form, int width, float* out) {
    if (!add) memset(out, 0, (size_t)n * sizeof(float));
    const uint8_t* index = payload + 4 * k;
    int64_t previous = -1, taken = 0;
    const auto place = [&](int64_t entry) {
        if (taken >= k) return (int)GC_BAD_COUNT;
        if (entry <= previous || entry >= n) return (int)GC_BAD_INDEX;
        const float value = load<float>(payload + 4 * taken++);
        out[entry] = add ? out[entry] + value : value;
        previous = entry;
        return (int)GC_OK;
    };
    if (form == GC_INDEX_FIXED) {
        BitReader reader = {index, index + bytes_of_bits(k * width), 0, 0};
        for (int64_t i = 0; i < k; ++i)
            if (int error = place((int64_t)reader.get(width))) return error;
        return GC_OK;
    }
    // A bitmap of the kept entries is the gap form with no low bits and no shift by the rank.
    const bool gaps = form == GC_INDEX_GAPS;
    BitReader low = {index, index + bytes_of_bits(k * width), 0, 0};
    const uint8_t* bitmap = gaps ? low.end : index;
    const int64_t bytes = bytes_of_bits(gaps ? k + ((n - 1) >> width) : n);
    for (int64_t first = 0; first < bytes; first += 8) {
        uint64_t word = 0;
        memcpy(&word, bitmap + first, (size_t)min64(8, bytes - first));
        for (; word; word &= word - 1) {
            const int64_t position = 8 * first + __builtin_ctzll(word);
            const int64_t entry = gaps ? (int64_t)((uint64_t)(position - taken) << width | low.get(width)) : position;
            if (int error = place(entry)) return error;
        }
    }
    return taken == k ? GC_OK : GC_BAD_COUNT;
}

int topk_decode(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int add, float* out) {
    return add ? topk_decode_form<true>(payload, n, k, form, width, out)
               : topk_decode_form<false>(payload, n, k, form, width, out);
}

}  // namespace
#endif
