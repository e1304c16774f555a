// Eden: random rotation of blocks, Lloyd-Max levels, a scale per block (gcompress/compressors/eden.py).
#ifndef GCOMPRESS_CPU_EDEN_H
#define GCOMPRESS_CPU_EDEN_H

#include "../arith/eden.h"
#include "../gcompress.h"
#include "hadamard.h"
#include "select.h"
#include "sums.h"
#include "units.h"
#include "for_bits.h"

namespace {

// Signs change where the bit of an entry is set, 32 a word.
inline void flip_signs(float* y, int64_t count, uint32_t word, uint32_t seed) {
    for (int64_t i = 0; i < count; i += 32, ++word) {
        const uint32_t bits = hashed(word, seed);
        if (count - i >= 32) {
            for (int j = 0; j < 32; ++j)  // vectorised
                y[i + j] = flipped(y[i + j], bits, j);
        } else {
            for (int64_t j = 0; j < count - i; ++j) y[i + j] = flipped(y[i + j], bits, j);
        }
    }
}

struct EdenBlock {
    int64_t entries, part;  // part: the power of two that one transform takes
    uint32_t word, seed;
    float root;
    EdenBlock(int64_t first, int64_t entries_, uint32_t seed_)
        : entries(entries_),
          part((int64_t)1 << (63 - __builtin_clzll((uint64_t)entries_))),
          word((uint32_t)(first / 32)),
          seed(seed_),
          root(eden_root(part)) {}
    bool whole() const { return part == entries; }
    void transform(float* y) const {
        hadamard(y, part);
        for (int64_t i = 0; i < part; ++i) y[i] *= root;
    }
    void rotate(float* y) const {
        flip_signs(y, entries, word, seed);
        if (whole()) return hadamard(y, part);
        transform(y);
        flip_signs(y + entries - part, part, word + EDEN_TAIL_WORDS, seed);
        transform(y + entries - part);
    }
    void rotate_back(float* y) const {  // all but the first signs
        if (whole()) return hadamard(y, part);
        transform(y + entries - part);
        flip_signs(y + entries - part, part, word + EDEN_TAIL_WORDS, seed);
        transform(y);
    }
};

// The rotated entries that are sent, when not all are.
struct EdenPositions {
    int64_t entries, step, next;
    EdenPositions(int64_t entries_, uint32_t block, uint32_t seed) : entries(entries_) {
        const uint32_t word = hashed(block + EDEN_PART_WORDS, seed);
        step = eden_step(word, entries);
        next = eden_start(word, entries);
    }
    int64_t take() {
        const int64_t position = next;
        next += step;
        next -= next >= entries ? entries : 0;
        return position;
    }
};

// Levels of b bits in units of 1/8192 deviation, the borders between them, and from 5 bits on a table by which the
// class is found: that at the beginning of each bin of 64 units, none of which has two borders.
template <int bits>
struct EdenLevels {
    enum { CLASSES = 1 << (bits - 1), BINS_PER = 64, BIN_COUNT = 640 };
    float level[CLASSES], border[CLASSES];
    int32_t start[BIN_COUNT];
    explicit EdenLevels(const float* levels) {
        for (int m = 0; m < CLASSES; ++m) {
            level[m] = levels[m];
            border[m] = m + 1 < CLASSES ? eden_border(levels[m], levels[m + 1]) : bits_float(INFINITY_KEY);
        }
        if (bits < 5) return;
        for (int bin = 0, m = 0; bin < BIN_COUNT; ++bin) {
            while ((float)(bin * BINS_PER) >= border[m]) ++m;
            start[bin] = m;
        }
    }
    // Codes and levels of 64 entries.
    void classify(const float* y, float to_units, uint8_t* codes, float* chosen) const {
        float units[64];
        int32_t number[64];
        for (int j = 0; j < 64; ++j) units[j] = __builtin_fabsf(y[j]) * to_units;  // all loops vectorised
        if (bits < 5) {
            for (int j = 0; j < 64; ++j) {
                number[j] = 0;
                chosen[j] = level[0];
            }
            for (int k = 0; k + 1 < CLASSES; ++k) {
                const float from = border[k], value = level[k + 1];
                for (int j = 0; j < 64; ++j) {
                    number[j] += units[j] >= from;
                    chosen[j] = units[j] >= from ? value : chosen[j];
                }
            }
        } else {
            const float last = (float)(BIN_COUNT * BINS_PER - 1);
            for (int j = 0; j < 64; ++j)
                number[j] = start[(uint32_t)(int32_t)(units[j] < last ? units[j] : last) / BINS_PER];
            for (int j = 0; j < 64; ++j) number[j] += units[j] >= border[number[j]];
            for (int j = 0; j < 64; ++j) chosen[j] = level[number[j]];
        }
        for (int j = 0; j < 64; ++j) {
            const uint32_t minus = float_bits(y[j]) >> 31 << (bits - 1);
            codes[j] = (uint8_t)((uint32_t)number[j] | minus);
        }
    }
};

// The ordered sum of products of `count` pairs; both arrays hold zeros up to the next multiple of 16.
inline double ordered_products(const float* a, const float* b, int64_t count) {
    double total = 0.0;
    for (int64_t block = 0; block < count; block += SUM_BLOCK) {
        LaneSum sum;
        for (int64_t i = block; i < min64(count, block + SUM_BLOCK); i += SUM_LANES) sum.add_products(a + i, b + i);
        total += sum.folded();
    }
    return total;
}

// Codes of one block; returns its scale.
template <int bits>
float eden_encode_block(const float* x, const EdenBlock& block, int64_t sent, uint32_t number, bool unbiased,
                        const EdenLevels<bits>& levels, uint8_t* codes) {
    float y[EDEN_LARGEST_BLOCK + 64], part[EDEN_LARGEST_BLOCK + 64], chosen[EDEN_LARGEST_BLOCK + 64];
    const int64_t entries = block.entries;
    int32_t largest = 0;
    for (int64_t i = 0; i < entries; ++i) {  // vectorised
        const int32_t key = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
        largest = largest > key ? largest : key;
    }
    const int exponent = largest >> 23;
    if (exponent == 0 || exponent == 255) {
        memset(codes, 0, (size_t)sent);
        return exponent == 0 ? 0.0f : bits_float(0x7fc00000u);
    }
    const float factor = bits_float((uint32_t)(255 - exponent) << 23);
    for (int64_t i = 0; i < entries; ++i) y[i] = x[i] * factor;
    memset(y + entries, 0, 64 * sizeof(float));
    block.rotate(y);
    const double power = ordered_products(y, y, entries);
    const float to_units = eden_units(power, entries);
    const float* values = y;
    if (sent < entries) {
        EdenPositions positions(entries, number, block.seed);
        for (int64_t k = 0; k < sent; ++k) part[k] = y[positions.take()];
        memset(part + sent, 0, 64 * sizeof(float));
        values = part;
    }
    for (int64_t i = 0; i < sent; i += 64) {
        uint8_t some[64];
        levels.classify(values + i, to_units, some, chosen + i);
        memcpy(codes + i, some, (size_t)min64(64, sent - i));
    }
    memset(chosen + sent, 0, 64 * sizeof(float));
    float* magnitudes = values == y ? y : part;
    for (int64_t i = 0; i < sent; ++i) magnitudes[i] = __builtin_fabsf(magnitudes[i]);
    const double dot = ordered_products(magnitudes, chosen, sent);
    const double squares = unbiased ? 0.0 : ordered_products(chosen, chosen, sent);
    return eden_scale(power, dot, squares, unbiased, exponent, block.whole(), entries);
}

// Codes to bytes; `following` more codes of the payload lie behind them.
template <int bits>
void pack_codes(const uint8_t* codes, int64_t count, int64_t following, uint8_t* packed) {
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t size = min64(64, count - i);
        if (size == 64 && count - i - 64 + following >= 64)
            pack_64<bits>(codes + i, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes + i, size, packed + i / 8 * bits);
    }
}

template <int bits>
void eden_encode_range(const float* x, int64_t n, int64_t block, int64_t sent, int64_t sent_tail, bool unbiased,
                       uint32_t seed, const EdenLevels<bits>& levels, int64_t from, int64_t to, int64_t limit,
                       uint8_t* payload) {
    uint8_t codes[EDEN_LARGEST_BLOCK];
    uint8_t* packed = payload + 4 + 4 * ((n + block - 1) / block) + from / block * (sent / 8 * bits);
    for (int64_t first = from; first < to; first += block) {
        const int64_t entries = min64(block, n - first), here = entries == block ? sent : sent_tail;
        const uint32_t number = (uint32_t)(first / block);
        const float scale =
            eden_encode_block<bits>(x + first, EdenBlock(first, entries, seed), here, number, unbiased, levels, codes);
        store<float>(payload + 4 + 4 * (int64_t)number, scale);
        pack_codes<bits>(codes, here, limit - first - entries >= block ? 64 : 0, packed);
        packed += here / 8 * bits;
    }
}

template <int bits>
void eden_decode_range(const uint8_t* payload, int64_t n, int64_t block, int64_t sent, int64_t sent_tail,
                       const float* levels, int64_t from, int64_t to, bool add, float* out) {
    float table[bits <= 4 ? 16 : 256] = {0}, y[EDEN_LARGEST_BLOCK + 64], values[EDEN_LARGEST_BLOCK + 64];
    for (int m = 0; m < 1 << (bits - 1); ++m) {
        table[m] = levels[m];
        table[m + (1 << (bits - 1))] = -levels[m];
    }
    const uint32_t seed = load<uint32_t>(payload);
    const uint8_t* packed = payload + 4 + 4 * ((n + block - 1) / block) + from / block * (sent / 8 * bits);
    for (int64_t first = from; first < to; first += block, out += block) {
        const int64_t entries = min64(block, n - first), here = entries == block ? sent : sent_tail;
        const uint32_t number = (uint32_t)(first / block);
        const EdenBlock turned(first, entries, seed);
        float* target = here < entries ? values : y;
        for (int64_t i = 0; i < here; i += 64) {
            uint8_t codes[64];
            if (here - i >= 128)
                unpack_64<bits>(packed + i / 8 * bits, codes);
            else
                unpack_tail<bits>(packed + i / 8 * bits, min64(64, here - i), codes);
            look_up_64<false>(codes, table, bits > 4, target + i);
        }
        packed += here / 8 * bits;
        if (here < entries) {
            memset(y, 0, (size_t)entries * sizeof(float));
            EdenPositions positions(entries, number, seed);
            for (int64_t k = 0; k < here; ++k) y[positions.take()] = values[k];
        }
        turned.rotate_back(y);
        const float scale = load<float>(payload + 4 + 4 * (int64_t)number);
        for (int64_t i = 0; i < entries; ++i) y[i] = saturated(y[i] * scale);  // vectorised
        flip_signs(y, entries, turned.word, seed);
        if (add)
            for (int64_t i = 0; i < entries; ++i) out[i] += y[i];
        else
            memcpy(out, y, (size_t)entries * sizeof(float));
    }
}

template <int bits>
void eden_encode_bits(int threads, gc_memory* memory, const float* x, int64_t n, int64_t block, int64_t sent,
                      int64_t sent_tail, bool unbiased, uint32_t seed, const float* level_table, uint8_t* payload) {
    const EdenLevels<bits> levels(level_table);
    store<uint32_t>(payload, seed);
    encode_units<EDEN_LARGEST_BLOCK>(
        threads, memory, x, n, block,
        [&](const float* source, int64_t first, int64_t end, int64_t limit) {
            eden_encode_range<bits>(source, n, block, sent, sent_tail, unbiased, seed, levels, first, end, limit,
                                    payload);
        },
        [&](int64_t first, int64_t end, int64_t, float* decoded) {
            eden_decode_range<bits>(payload, n, block, sent, sent_tail, level_table, first, end, false, decoded);
        });
}

void eden_encode(int threads, gc_memory* memory, const float* x, int64_t n, int bits, int64_t block, int64_t sent,
                 int64_t sent_tail, int unbiased, uint32_t seed, const float* levels, uint8_t* payload) {
    GC_FOR_BITS(bits, (eden_encode_bits<B>(threads, memory, x, n, block, sent, sent_tail, unbiased != 0, seed, levels,
                                           payload)))
}

template <int bits>
void eden_decode_bits(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t block, int64_t sent,
                      int64_t sent_tail, const float* levels, int add, float* out) {
    decode_units<EDEN_LARGEST_BLOCK>(threads, more, payload, n, block, add, out,
                                     [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                                         eden_decode_range<bits>(one, n, block, sent, sent_tail, levels, first, end,
                                                                 adds.value, target);
                                     });
}

void eden_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int bits, int64_t block,
                 int64_t sent, int64_t sent_tail, const float* levels, int add, float* out) {
    GC_FOR_BITS(bits, (eden_decode_bits<B>(threads, more, payload, n, block, sent, sent_tail, levels, add, out)))
}

}  // namespace
#endif
