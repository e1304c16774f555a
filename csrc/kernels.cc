// Quantize, MaskSparse and TopK on the CPU. Compiled once per instruction set (GC_ISA); see
// simd.h for what that forbids. The arithmetic that decides bytes is single-precision
// add, multiply and divide in a fixed order, or integer: -ffp-contract=off keeps it so.
#include "gcompress.h"
#include "select.h"
#include "simd.h"

namespace {

const float SMALLEST_NORMAL = 1.17549435e-38f;
// Below 2^-110 a fixed-point scale of 65535 / magnitude overflows.
const float SMALLEST_FIXED = 7.70371978e-34f;
const float LARGEST = 3.40282347e38f;
const int64_t CHUNK = 1024;

// ---------------------------------------------------------------- Quantize

// A reproducible uniform number in [0, 1) for entry i (a 32-bit integer hash).
inline float uniform(uint32_t i, uint32_t seed) {
    uint32_t h = i * 0x9E3779B9u + seed;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    h ^= h >> 16;
    return (float)(int32_t)(h >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

inline float floor_small(float value) {  // |value| < 2^22
    const float nearest = (float)round_even(value);
    return nearest > value ? nearest - 1.0f : nearest;
}

struct Grid {
    float step, inverse, zero;
    bool finite;
};

inline float inverse_of(float step) { return step >= SMALLEST_NORMAL ? 1.0f / step : 0.0f; }

// The scale of one bucket: `step` between codes, and the code `zero` that stands for 0.
template <int bits>
Grid grid_of(const float* x, int64_t count, bool stochastic) {
    // Float order as integer order, so that minimum and maximum vectorise and show NaN too.
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t pattern = load<int32_t>(x + i);
        const int32_t ordered = pattern ^ (int32_t)((uint32_t)(pattern >> 31) >> 1);
        low = ordered < low ? ordered : low;
        high = ordered > high ? ordered : high;
    }
    Grid grid = {0.0f, 0.0f, bits == 1 ? 0.5f : 0.0f, true};
    if (high >= (int32_t)INFINITY_KEY || ~low >= (int32_t)INFINITY_KEY) {
        grid.step = bits_float(0x7fc00000u);
        grid.finite = false;
        return grid;
    }
    const float top = bits_float((uint32_t)high);
    const float bottom = low < 0 ? -bits_float((uint32_t)~low) : 0.0f;
    if (bits == 1) {
        float half = top > -bottom ? top : -bottom;
        if (!stochastic && half < SMALLEST_FIXED) half = 0.0f;
        if (!stochastic && half > 0.0f) {  // the mean magnitude errs least
            const float to_fixed = 65535.0f / half;
            int64_t sum = 0;
            for (int64_t i = 0; i < count; ++i) sum += round_even(__builtin_fabsf(x[i]) * to_fixed);
            half = (float)((double)sum / (double)count * ((double)half / 65535.0));
        }
        grid.step = half < SMALLEST_NORMAL ? 0.0f : half > LARGEST / 2 ? LARGEST : half + half;
        grid.inverse = inverse_of(grid.step);
        return grid;
    }
    // Stochastic rounding needs a spare level, since zero falls on a code exactly.
    const int levels = (1 << bits) - 1;
    const float span = (float)(stochastic && bottom < 0.0f && top > 0.0f ? levels - 1 : levels);
    const float step = top / span - bottom / span;
    if (!(step >= SMALLEST_NORMAL)) return grid;
    grid.step = step;
    grid.inverse = inverse_of(step);
    const float below = -bottom * grid.inverse;
    grid.zero = stochastic ? -floor_small(-below) : (float)round_even(below);
    return grid;
}

template <int bits>
inline uint8_t quantized(float value, const Grid& grid, float dither, bool stochastic) {
    const float scaled = value * grid.inverse;
    float code;
    if (bits == 1)
        code = floor_small((scaled + 0.5f) + dither);
    else
        code = (stochastic ? floor_small(scaled + dither) : (float)round_even(scaled)) + grid.zero;
    const float top = (float)((1 << bits) - 1);
    code = code < 0.0f ? 0.0f : code;
    code = code > top ? top : code;
    return (uint8_t)(int32_t)code;
}

template <int bits, bool stochastic>
void quantize_bucket(const float* x, int64_t count, int64_t first, const Grid& grid, uint32_t seed, bool last,
                     uint8_t* packed) {
    uint8_t codes[64];
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t block = min64(64, count - i);
        if (!grid.finite) {
            memset(codes, 0, sizeof codes);
        } else if (block == 64) {
            for (int j = 0; j < 64; ++j)  // vectorised
                codes[j] = quantized<bits>(
                    x[i + j], grid, stochastic ? uniform((uint32_t)(first + i) + (uint32_t)j, seed) : 0.5f, stochastic);
        } else {
            for (int64_t j = 0; j < block; ++j)
                codes[j] = quantized<bits>(
                    x[i + j], grid, stochastic ? uniform((uint32_t)(first + i + j), seed) : 0.5f, stochastic);
        }
        // A whole block is stored with words that reach into the next one: there must be one.
        if (block == 64 && (i + 128 <= count || !last))
            pack_64<bits>(codes, packed + i / 8 * bits);
        else
            pack_tail<bits>(codes, block, packed + i / 8 * bits);
    }
}

template <int bits>
void quantize_encode_bits(const float* x, int64_t n, int64_t bucket, bool stochastic, uint32_t seed,
                          uint8_t* payload) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    uint8_t* zeros = payload + 4 * buckets;
    uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    for (int64_t b = 0; b < buckets; ++b) {
        const int64_t first = b * bucket, count = min64(bucket, n - first);
        const Grid grid = grid_of<bits>(x + first, count, stochastic);
        store<float>(payload + 4 * b, grid.step);
        if (bits > 1) zeros[b] = (uint8_t)grid.zero;
        // "last": fewer than eight bytes may follow this bucket.
        const bool last = n - (first + count) < 64;
        uint8_t* target = packed + first / 8 * bits;
        if (stochastic)
            quantize_bucket<bits, true>(x + first, count, first, grid, seed, last, target);
        else
            quantize_bucket<bits, false>(x + first, count, first, grid, seed, last, target);
    }
}

template <int bits, bool add>
void quantize_decode_bits(const uint8_t* payload, int64_t n, int64_t bucket, float* out) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    const uint8_t* zeros = payload + 4 * buckets;
    const uint8_t* packed = zeros + (bits == 1 ? 0 : buckets);
    uint8_t codes[64];
    for (int64_t b = 0; b < buckets; ++b) {
        const float step = load<float>(payload + 4 * b), zero = bits == 1 ? 0.5f : (float)zeros[b];
        const int64_t end = min64(n, (b + 1) * bucket);
        for (int64_t i = b * bucket; i < end; i += 64) {
            const int64_t block = min64(64, end - i);
            if (block == 64 && i + 128 <= n) {
                unpack_64<bits>(packed + i / 8 * bits, codes);
            } else {
                unpack_tail<bits>(packed + i / 8 * bits, block, codes);
            }
            float* target = out + i;
            if (block == 64) {
                for (int j = 0; j < 64; ++j) {  // vectorised
                    const float value = ((float)codes[j] - zero) * step;
                    target[j] = add ? target[j] + value : value;
                }
            } else {
                for (int64_t j = 0; j < block; ++j) {
                    const float value = ((float)codes[j] - zero) * step;
                    target[j] = add ? target[j] + value : value;
                }
            }
        }
    }
}

// ---------------------------------------------------------------- MaskSparse

// A dropped entry's magnitude in 1/65535 of the threshold: every later decision and sum is
// on these integers, so their order does not matter.
const int FIXED_ONE = 65535;
const int BINS = 4096;

struct MaskScale {
    float threshold, to_fixed;
    uint32_t limit;  // keys above it carry no magnitude: kept, or not finite
};

inline MaskScale mask_scale(uint32_t threshold_key) {
    MaskScale scale = {0.0f, 0.0f, threshold_key};
    const float threshold = bits_float(threshold_key);
    if (threshold_key >= INFINITY_KEY) {
        scale.limit = INFINITY_KEY - 1;
    } else if (threshold >= SMALLEST_FIXED) {
        scale.threshold = threshold;
        scale.to_fixed = (float)FIXED_ONE / threshold;
    }
    return scale;
}

inline int32_t fixed_magnitude(uint32_t key, const MaskScale& scale) {
    const float magnitude = key > scale.limit ? 0.0f : bits_float(key);
    return round_even(magnitude * scale.to_fixed);
}

// The classes of magnitude of dropped entries. Linear: thresholds at the half steps of
// threshold / classes. Lloyd-Max: a table from the top 12 bits of the fixed magnitude.
template <int bits, bool is_signed>
struct MaskClasses {
    static const int codes = (1 << bits) - 1;                   // codes for dropped entries
    static const int half = is_signed ? (codes - 1) / 2 : codes - 1;  // the largest class
    static const int steps = half + 1;
    static const int centre = is_signed ? half : 0;
    static const int sent = is_signed ? half : codes;  // levels in the payload
    static int32_t linear(int32_t fixed) {
        const int32_t nearest = (fixed * steps + (1 << 15)) >> 16;
        return nearest < half ? nearest : half;
    }
};

// Lloyd-Max on the histogram, in double precision and a fixed order. In the signed form
// class 0 stays at zero. Writes the class of every bin.
template <int bits, bool is_signed>
void lloyd_classes(const int64_t* histogram, uint8_t* class_of_bin) {
    typedef MaskClasses<bits, is_signed> Classes;
    int64_t count[BINS + 1], sum[BINS + 1];
    count[0] = sum[0] = 0;
    for (int bin = 0; bin < BINS; ++bin) {
        count[bin + 1] = count[bin] + histogram[bin];
        sum[bin + 1] = sum[bin] + histogram[bin] * (16 * bin + 8);
    }
    double level[256];
    int edge[257] = {0};  // class m is bins edge[m] .. edge[m + 1] - 1
    for (int m = 0; m <= Classes::half; ++m) level[m] = (double)m * FIXED_ONE / Classes::steps;
    edge[Classes::half + 1] = BINS;
    for (int round = 0; round < 100; ++round) {
        bool changed = false;
        for (int m = 1; m <= Classes::half; ++m) {
            const int border = (int)(((level[m - 1] + level[m]) / 2.0 + 8.0) / 16.0);
            changed |= border != edge[m];
            edge[m] = border;
        }
        if (!changed) break;
        for (int m = is_signed ? 1 : 0; m <= Classes::half; ++m) {
            const int64_t members = count[edge[m + 1]] - count[edge[m]];
            if (members > 0) level[m] = (double)(sum[edge[m + 1]] - sum[edge[m]]) / (double)members;
        }
    }
    for (int m = 0; m <= Classes::half; ++m)
        for (int bin = edge[m]; bin < edge[m + 1]; ++bin) class_of_bin[bin] = (uint8_t)m;
}

template <int bits, bool is_signed, bool lloyd>
void mask_encode_form(const float* x, int64_t n, int64_t k, uint32_t* workspace, int64_t capacity,
                      uint8_t* payload) {
    typedef MaskClasses<bits, is_signed> Classes;
    Selection selection = select_largest<is_signed>(x, n, k, workspace, capacity);
    const MaskScale scale = mask_scale(selection.threshold);

    uint8_t class_of_bin[BINS] = {0};
    int32_t border[4] = {0, BINS, BINS, BINS};  // the first bin of classes 1 to 3
    if (lloyd) {
        int64_t histogram[2][BINS] = {{0}};  // two, so that equal neighbours do not wait for each other
        Selection counting = selection;
        uint32_t keys[64] = {0};
        int32_t bins[64];
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t block = min64(64, n - i);
            if (block == 64)
                keys_64<is_signed>(x + i, keys);
            else
                for (int64_t j = 0; j < block; ++j) keys[j] = key_of<is_signed>(x[i + j]);
            for (int j = 0; j < 64; ++j) bins[j] = fixed_magnitude(keys[j], scale) >> 4;  // vectorised
            for (int64_t j = 0; j < block; ++j) ++histogram[j & 1][bins[j]];
            uint64_t kept = kept_of_block(keys, block, &counting);
            for (; kept; kept &= kept - 1) --histogram[0][bins[__builtin_ctzll(kept)]];
        }
        for (int bin = 0; bin < BINS; ++bin) histogram[0][bin] += histogram[1][bin];
        lloyd_classes<bits, is_signed>(histogram[0], class_of_bin);
        for (int bin = BINS - 1; bin >= 0; --bin)
            for (int m = 1; m <= 3 && m <= class_of_bin[bin]; ++m) border[m] = bin;
    }

    uint8_t* values = payload + 4 * Classes::sent;
    uint8_t* packed = values + 4 * k;
    int64_t sums[256] = {0}, counts[256] = {0};
    uint32_t keys[64] = {0};
    int32_t fixed[CHUNK], classes[CHUNK];
    uint8_t codes[CHUNK];
    float tail[64] = {0};
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        const int64_t size = min64(CHUNK, n - chunk);
        for (int64_t i = 0; i < size; i += 64) {
            const int64_t block = min64(64, size - i);
            const float* source = x + chunk + i;
            if (block < 64) {
                memcpy(tail, source, (size_t)block * sizeof(float));
                source = tail;
            }
            int32_t* block_fixed = fixed + i;
            int32_t* block_classes = classes + i;
            uint8_t* block_codes = codes + i;
            if (lloyd) {
                for (int j = 0; j < 64; ++j) {  // vectorised
                    keys[j] = key_of<is_signed>(source[j]);
                    block_fixed[j] = fixed_magnitude(keys[j], scale);
                }
                if (Classes::half <= 3) {
                    for (int j = 0; j < 64; ++j) {  // vectorised
                        const int32_t bin = block_fixed[j] >> 4;
                        block_classes[j] = (bin >= border[1]) + (bin >= border[2]) + (bin >= border[3]);
                    }
                } else {
                    for (int j = 0; j < 64; ++j) block_classes[j] = class_of_bin[block_fixed[j] >> 4];
                }
            }
            for (int j = 0; j < 64; ++j) {  // vectorised
                if (!lloyd) {
                    keys[j] = key_of<is_signed>(source[j]);
                    block_fixed[j] = fixed_magnitude(keys[j], scale);
                    block_classes[j] = Classes::linear(block_fixed[j]);
                }
                const int32_t minus = is_signed ? load<int32_t>(source + j) >> 31 : 0;
                block_codes[j] = (uint8_t)(Classes::centre + ((block_classes[j] ^ minus) - minus));
            }
            uint64_t kept = kept_of_block(keys, block, &selection);
            for (; kept; kept &= kept - 1) {
                const int j = __builtin_ctzll(kept);
                store<float>(values, source[j]);
                values += 4;
                block_codes[j] = (uint8_t)Classes::codes;
                block_classes[j] = -1;
            }
            if (chunk + i + 128 <= n)
                pack_64<bits>(block_codes, packed + (chunk + i) / 8 * bits);
            else
                pack_tail<bits>(block_codes, block, packed + (chunk + i) / 8 * bits);
        }
        // The sums behind the levels: a vectorised scan per class while there are few.
        if (Classes::sent <= 7) {
            for (int m = is_signed ? 1 : 0; m <= Classes::half; ++m) {
                int32_t sum = 0, members = 0;
                for (int64_t i = 0; i < size; ++i) {
                    sum += classes[i] == m ? fixed[i] : 0;
                    members += classes[i] == m;
                }
                sums[m] += sum;
                counts[m] += members;
            }
        } else {
            for (int64_t i = 0; i < size; ++i) {
                const int m = classes[i] < 0 ? 255 : classes[i];
                sums[m] += fixed[i];
                ++counts[m];
            }
        }
    }
    for (int s = 0; s < Classes::sent; ++s) {
        const int m = is_signed ? s + 1 : s;
        float level = 0.0f;
        if (counts[m] > 0)
            level = (float)((double)sums[m] / (double)counts[m] * ((double)scale.threshold / (double)FIXED_ONE));
        store<float>(payload + 4 * s, level);
    }
}

template <int bits, bool is_signed, bool add>
int mask_decode_form(const uint8_t* payload, int64_t n, int64_t k, float* out) {
    typedef MaskClasses<bits, is_signed> Classes;
    float table[bits <= 4 ? 16 : 256] = {0};
    for (int s = 0; s < Classes::sent; ++s) {
        const float level = load<float>(payload + 4 * s);
        if (is_signed) {
            table[Classes::centre + 1 + s] = level;
            table[Classes::centre - 1 - s] = -level;
        } else {
            table[s] = level;
        }
    }
    const uint8_t* values = payload + 4 * Classes::sent;
    const uint8_t* packed = values + 4 * k;
    const uint8_t* const values_end = packed;
    uint8_t codes[64];
    float tail[64];
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t block = min64(64, n - i);
        if (i + 128 <= n)
            unpack_64<bits>(packed + i / 8 * bits, codes);
        else
            unpack_tail<bits>(packed + i / 8 * bits, block, codes);
        uint64_t kept = equal_64(codes, (uint8_t)Classes::codes);
        float* target = out + i;
        if (block < 64) {
            kept &= (1ull << block) - 1;
            if (add) memcpy(tail, target, (size_t)block * sizeof(float));
            target = tail;
        }
        look_up_64<add>(codes, table, bits > 4, target);
        if (values + 4 * __builtin_popcountll(kept) > values_end) return GC_BAD_COUNT;
        for (; kept; kept &= kept - 1, values += 4) {
            float* entry = target + __builtin_ctzll(kept);
            *entry = add ? *entry + load<float>(values) : load<float>(values);
        }
        if (block < 64) memcpy(out + i, tail, (size_t)block * sizeof(float));
    }
    return values == values_end ? GC_OK : GC_BAD_COUNT;
}

// ---------------------------------------------------------------- TopK

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

void topk_encode(const float* x, int64_t n, int64_t k, int form, int width, uint32_t* workspace, int64_t capacity,
                 uint8_t* payload) {
    Selection selection = select_largest<true>(x, n, k, workspace, capacity);
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
            const int64_t entry =
                gaps ? (int64_t)((uint64_t)(position - taken) << width | low.get(width)) : position;
            if (int error = place(entry)) return error;
        }
    }
    return taken == k ? GC_OK : GC_BAD_COUNT;
}

// ---------------------------------------------------------------- from run-time to compile-time parameters

#define GC_FOR_BITS(bits, call)            \
    switch (bits) {                        \
        case 1: { enum { B = 1 }; call; } break; \
        case 2: { enum { B = 2 }; call; } break; \
        case 3: { enum { B = 3 }; call; } break; \
        case 4: { enum { B = 4 }; call; } break; \
        case 5: { enum { B = 5 }; call; } break; \
        case 6: { enum { B = 6 }; call; } break; \
        case 7: { enum { B = 7 }; call; } break; \
        default: { enum { B = 8 }; call; } break; \
    }

void quantize_encode(const float* x, int64_t n, int bits, int64_t bucket, int stochastic, uint32_t seed,
                     uint8_t* payload) {
    GC_FOR_BITS(bits, (quantize_encode_bits<B>(x, n, bucket, stochastic != 0, seed, payload)))
}

void quantize_decode(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (quantize_decode_bits<B, true>(payload, n, bucket, out)))
    else
        GC_FOR_BITS(bits, (quantize_decode_bits<B, false>(payload, n, bucket, out)))
}

void mask_encode(const float* x, int64_t n, int64_t k, int bits, int is_signed, int lloyd, uint32_t* workspace,
                 int64_t capacity, uint8_t* payload) {
    if (is_signed && lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, true>(x, n, k, workspace, capacity, payload)))
    else if (is_signed)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, false>(x, n, k, workspace, capacity, payload)))
    else if (lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, false, true>(x, n, k, workspace, capacity, payload)))
    else
        GC_FOR_BITS(bits, (mask_encode_form<B, false, false>(x, n, k, workspace, capacity, payload)))
}

int mask_decode(const uint8_t* payload, int64_t n, int64_t k, int bits, int is_signed, int add, float* out) {
    int result = GC_OK;
    if (is_signed && add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, true>(payload, n, k, out)))
    else if (is_signed)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, false>(payload, n, k, out)))
    else if (add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, true>(payload, n, k, out)))
    else
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, false>(payload, n, k, out)))
    return result;
}

int topk_decode(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int add, float* out) {
    return add ? topk_decode_form<true>(payload, n, k, form, width, out)
               : topk_decode_form<false>(payload, n, k, form, width, out);
}

}  // namespace

#define GC_JOIN_(a, b) a##b
#define GC_JOIN(a, b) GC_JOIN_(a, b)

extern "C" {
extern const gc_kernels GC_JOIN(gc_kernels_, GC_ISA);
const gc_kernels GC_JOIN(gc_kernels_, GC_ISA) = {quantize_encode, quantize_decode, mask_encode,
                                                  mask_decode,     topk_encode,     topk_decode};
}
