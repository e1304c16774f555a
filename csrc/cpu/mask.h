// MaskSparse: the mask is the index (gcompress/compressors/mask.py).
#ifndef GCOMPRESS_CPU_MASK_H
#define GCOMPRESS_CPU_MASK_H

#include "../arith/mask.h"
#include "../gcompress.h"
#include "select.h"
#include "simd.h"
#include "units.h"
#include "for_bits.h"

namespace {

const int64_t CHUNK = 1024;

// The classes of dropped entries, known when compiling. Linear: thresholds at the half steps of
// threshold / classes. Lloyd-Max: a table from the top 12 bits of the fixed magnitude.
template <int bits, bool is_signed>
struct MaskClasses {
    static constexpr MaskShape shape = mask_shape(bits, is_signed);
    static const int codes = shape.codes, half = shape.half, steps = shape.steps, centre = shape.centre,
                     sent = shape.sent;
    static int32_t linear(int32_t fixed) { return linear_class(fixed, steps, half); }
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
    for (int m = 0; m <= Classes::half; ++m) level[m] = lloyd_start(m, Classes::steps);
    edge[Classes::half + 1] = BINS;
    for (int round = 0; round < LLOYD_ROUNDS; ++round) {
        bool changed = false;
        for (int m = 1; m <= Classes::half; ++m) {
            const int border = lloyd_border(level[m - 1], level[m]);
            changed |= border != edge[m];
            edge[m] = border;
        }
        if (!changed) break;
        for (int m = is_signed ? 1 : 0; m <= Classes::half; ++m) {
            const int64_t members = count[edge[m + 1]] - count[edge[m]];
            if (members > 0) level[m] = lloyd_level(sum[edge[m + 1]] - sum[edge[m]], members);
        }
    }
    for (int m = 0; m <= Classes::half; ++m)
        for (int bin = edge[m]; bin < edge[m + 1]; ++bin) class_of_bin[bin] = (uint8_t)m;
}

// Behind the levels: of every class the fixed magnitudes, and how many there are.
struct MaskSums {
    int64_t sums[256], counts[256];
};

// The keys of 64 entries of which `block` are there; the others get 0.
template <bool is_signed>
GC_HOT void keys_of_block(const float* x, int64_t block, uint32_t* keys) {
    if (block == 64) return keys_64<is_signed>(x, keys);
    for (int64_t j = 0; j < 64; ++j) keys[j] = j < block ? key_of<is_signed>(x[j]) : 0;
}

// Classes of 64 entries at a time where there are at most MOST beside 0, which are told by comparisons.
template <int bits, bool is_signed>
struct FewClasses {
    typedef MaskClasses<bits, is_signed> Classes;
    enum { MOST = 7, ROW = 16 };
    int32_t border[MOST + 1];     // the least fixed magnitude of a class
    int32_t sums[MOST + 1][ROW];  // of the fixed magnitudes that reach it
    int32_t counts[MOST + 1];

    // The codes of entries that are there (`valid`); the fixed magnitudes of those that are kept are 0.
    GC_HOT Bytes codes(const float* x, const int32_t* fixed, uint64_t valid, uint64_t kept) {
        uint64_t reached[MOST + 1] = {valid & ~kept};
        for (int m = 1; m <= Classes::half; ++m) {
            const Ints below = every_int(border[m] - 1);
            reached[m] = reached[0] & word_where([&](int j) { return above(load_ints(fixed + j), below); });
        }
        for (int m = is_signed ? 1 : 0; m <= Classes::half; ++m) {
            counts[m] += __builtin_popcountll(reached[m]);
            for (int row = 0; row < 64; row += ROW)
                for (int j = 0; j < ROW; ++j)  // vectorised
                    sums[m][j] += fixed[row + j] >= border[m] ? fixed[row + j] : 0;
        }
        Bytes found = zero_bytes();
        for (int power = Classes::half > 3 ? 4 : Classes::half > 1 ? 2 : 1; power; power /= 2) {
            uint64_t bit = 0;  // of the class: odd where an odd number of its multiples is reached
            for (int m = power; m <= Classes::half; m += power) bit ^= reached[m];
            found = doubled_plus(found, signs_of(bit));
        }
        if (is_signed) found = add_saturated(every_byte(Classes::centre), negate_where(found, signs_of(signs_64(x))));
        return choose(signs_of(kept), every_byte(Classes::codes), found);
    }
    // Add what was summed to that of the classes, and begin anew: before 32 bits are too few.
    void move_to(MaskSums* to) {
        int64_t above_sum = 0, above_count = 0;
        for (int m = Classes::half; m >= (is_signed ? 1 : 0); --m) {
            int64_t sum = 0;
            for (int j = 0; j < ROW; ++j) sum += sums[m][j];
            to->sums[m] += sum - above_sum;
            to->counts[m] += counts[m] - above_count;
            above_sum = sum;
            above_count = counts[m];
        }
        memset(sums, 0, sizeof sums);
        memset(counts, 0, sizeof counts);
    }
};

template <int bits, bool is_signed, bool lloyd>
void mask_encode_form(const Shares& shares, const float* source, Selection selection, const ShareSelection* of_shares,
                      int64_t k, uint8_t* payload) {
    typedef MaskClasses<bits, is_signed> Classes;
    const MaskScale scale = mask_scale(selection.threshold);
    typedef FewClasses<bits, is_signed> Few;
    const bool few = Classes::half <= Few::MOST;

    uint8_t class_of_bin[BINS] = {0};
    Few few_classes = {{0}, {{0}}, {0}};
    for (int m = 1; m <= Few::MOST; ++m)  // linear: where linear_class begins to be m
        few_classes.border[m] = lloyd ? BINS << 4 : (m * (1 << 16) - (1 << 15) + Classes::steps - 1) / Classes::steps;
    if (lloyd) {
        int64_t total[BINS] = {0};
        on_shares(shares, [&](int share, int64_t from, int64_t to) {
            int64_t histogram[2][BINS] = {{0}};  // two, so that equal neighbours do not wait for each other
            Selection counting = of_shares[share].selection;
            uint32_t keys[64];
            int32_t bins[64];
            for (int64_t i = from; i < to; i += 64) {
                const int64_t block = min64(64, to - i);
                keys_of_block<is_signed>(source + i, block, keys);
                for (int j = 0; j < 64; ++j) bins[j] = fixed_magnitude(keys[j], scale) >> 4;  // vectorised
                for (int64_t j = 0; j < block; ++j) ++histogram[j & 1][bins[j]];
                uint64_t kept = kept_of_block(keys, block, &counting);
                for (; kept; kept &= kept - 1) --histogram[0][bins[__builtin_ctzll(kept)]];
            }
            for (int bin = 0; bin < BINS; ++bin) add_to_shared(total + bin, histogram[0][bin] + histogram[1][bin]);
        });
        lloyd_classes<bits, is_signed>(total, class_of_bin);
        for (int bin = BINS - 1; bin >= 0; --bin)
            for (int m = 1; m <= Few::MOST && m <= class_of_bin[bin]; ++m) few_classes.border[m] = bin << 4;
    }

    uint8_t* packed = payload + 4 * Classes::sent + 4 * k;
    MaskSums all = {{0}, {0}};
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        uint8_t* values = payload + 4 * Classes::sent + 4 * of_shares[share].before;
        Selection left = of_shares[share].selection;
        MaskSums mine = {{0}, {0}};
        Few by_border = few_classes;
        uint32_t keys[64];
        int32_t fixed[64], classes[64];
        uint8_t codes[64];
        float tail[64] = {0};
        for (int64_t chunk = from; chunk < to; chunk += CHUNK) {
            const int64_t size = min64(CHUNK, to - chunk);
            for (int64_t i = 0; i < size; i += 64) {
                const int64_t block = min64(64, size - i);
                const float* x = source + chunk + i;
                if (block < 64) {
                    memcpy(tail, x, (size_t)block * sizeof(float));
                    x = tail;
                }
                for (int j = 0; j < 64; ++j) {  // vectorised
                    keys[j] = key_of<is_signed>(x[j]);
                    fixed[j] = fixed_magnitude(keys[j], scale);
                }
                const uint64_t kept = kept_of_block(keys, block, &left);
                for (uint64_t rest = kept; rest; rest &= rest - 1) {
                    const int j = __builtin_ctzll(rest);
                    store<float>(values, x[j]);
                    values += 4;
                    fixed[j] = 0;
                }
                if (few) {
                    const uint64_t valid = block < 64 ? (1ull << block) - 1 : ~0ull;
                    store_bytes((int8_t*)codes, by_border.codes(x, fixed, valid, kept));
                } else {
                    for (int j = 0; j < 64; ++j)
                        classes[j] = lloyd ? class_of_bin[fixed[j] >> 4] : Classes::linear(fixed[j]);
                    for (int j = 0; j < 64; ++j) {  // vectorised
                        const int32_t minus = is_signed ? load<int32_t>(x + j) >> 31 : 0;
                        codes[j] = (uint8_t)(Classes::centre + ((classes[j] ^ minus) - minus));
                    }
                    for (int64_t j = 0; j < block; ++j) {
                        const bool dropped = !(kept >> j & 1);
                        mine.sums[classes[j]] += fixed[j];
                        mine.counts[classes[j]] += dropped;
                        if (!dropped) codes[j] = (uint8_t)Classes::codes;
                    }
                }
                if (chunk + i + 128 <= to)
                    pack_64<bits>(codes, packed + (chunk + i) / 8 * bits);
                else
                    pack_tail<bits>(codes, block, packed + (chunk + i) / 8 * bits);
            }
            if (few) by_border.move_to(&mine);
        }
        for (int m = 0; m < 256; ++m) {
            add_to_shared(all.sums + m, mine.sums[m]);
            add_to_shared(all.counts + m, mine.counts[m]);
        }
    });
    for (int s = 0; s < Classes::sent; ++s) {
        const int m = is_signed ? s + 1 : s;
        store<float>(payload + 4 * s, mask_level(all.sums[m], all.counts[m], scale.threshold));
    }
}

// What of one payload is decoded from front to back: its levels, and the kept values that come next.
template <int bits, bool is_signed>
struct MaskReader {
    typedef MaskClasses<bits, is_signed> Classes;
    float table[bits <= 4 ? 16 : 256];
    const uint8_t *packed, *values;

    MaskReader() {}
    MaskReader(const uint8_t* payload, int64_t k, int64_t before) : table() {  // `before`: kept values passed over
        for (int s = 0; s < Classes::sent; ++s) {
            const float level = load<float>(payload + 4 * s);
            if (is_signed) {
                table[Classes::centre + 1 + s] = level;
                table[Classes::centre - 1 - s] = -level;
            } else {
                table[s] = level;
            }
        }
        packed = payload + 4 * Classes::sent + 4 * k;
        values = payload + 4 * Classes::sent + 4 * before;
    }

    // How many of the entries [from, to), whole blocks with another one behind them, are marked as kept.
    int64_t count_kept(int64_t from, int64_t to) const {
        uint8_t codes[64];
        int64_t count = 0;
        for (int64_t i = from; i < to; i += 64) {
            unpack_64<bits>(packed + i / 8 * bits, codes);
            count += __builtin_popcountll(equal_64(codes, (uint8_t)Classes::codes));
        }
        return count;
    }

    template <bool add>
    int decode(int64_t n, int64_t from, int64_t to, float* out) {
        const uint8_t* next = values;
        float levels[sizeof table / sizeof *table];  // which writing to `out` cannot change
        memcpy(levels, table, sizeof table);
        uint8_t codes[64];
        float tail[64];
        for (int64_t i = from; i < to; i += 64, out += 64) {
            const int64_t block = min64(64, n - i);
            if (i + 128 <= n)
                unpack_64<bits>(packed + i / 8 * bits, codes);
            else
                unpack_tail<bits>(packed + i / 8 * bits, block, codes);
            uint64_t kept = equal_64(codes, (uint8_t)Classes::codes);
            float* target = out;
            if (block < 64) {
                kept &= (1ull << block) - 1;
                if (add) memcpy(tail, target, (size_t)block * sizeof(float));
                target = tail;
            }
            look_up_64<add>(codes, levels, bits > 4, target);
            if (next + 4 * __builtin_popcountll(kept) > packed) return GC_BAD_COUNT;
            for (; kept; kept &= kept - 1, next += 4) {
                float* entry = target + __builtin_ctzll(kept);
                *entry = add ? *entry + load<float>(next) : load<float>(next);
            }
            if (block < 64) memcpy(out, tail, (size_t)block * sizeof(float));
        }
        values = next;
        return to < n || values == packed ? GC_OK : GC_BAD_COUNT;
    }
};

template <int bits, bool is_signed>
void mask_encode_keeping(int threads, gc_memory* memory, const float* x, int64_t n, int64_t k, bool lloyd,
                         uint32_t* workspace, int64_t capacity, uint8_t* payload) {
    const Shares shares = shares_of(threads, n, CHUNK);
    ShareSelection of_shares[MOST_THREADS];
    Found found;
    found.keys = workspace;
    found.capacity = capacity;
    found.places = nullptr;
    const float* source = memory ? memory->fresh : x;
    Selection selection;
    if (memory && memory->residual != source) {
        const Corrected corrected = {memory, x, Corrected::TO_READ_AGAIN};
        selection = select_largest<is_signed>(shares, corrected, k, &found, of_shares);
    } else {
        if (memory) correct_all(shares, memory, x);
        selection = select_largest<is_signed>(shares, Entries{source}, k, &found, of_shares);
    }
    if (lloyd)
        mask_encode_form<bits, is_signed, true>(shares, source, selection, of_shares, k, payload);
    else
        mask_encode_form<bits, is_signed, false>(shares, source, selection, of_shares, k, payload);
    if (!memory) return;
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        MaskReader<bits, is_signed> reader(payload, k, of_shares[share].before);
        keep_decoded<STRETCH>(memory, from, to, 64, [&](int64_t first, int64_t end, float* sent) {
            reader.template decode<false>(n, first, end, sent);
        });
    });
}

template <int bits, bool is_signed>
int mask_decode_form(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t k, int add,
                     float* out) {
    typedef MaskReader<bits, is_signed> Reader;
    const Shares shares = shares_of(threads, n, CHUNK);
    const int64_t count = more ? 1 + more->count : 1;
    int64_t kept[MOST_THREADS][1 + GC_MOST_MORE];  // of a share and payload
    int results[MOST_THREADS];
    const auto payload_of = [=](int64_t r) { return r ? more->payloads[r - 1] : payload; };
    if (shares.count > 1) {
        memset(kept, 0, sizeof kept);
        at_once(shares.count, [&](int part) {  // a part of every share but the last one, which nothing follows
            const int64_t blocks = shares.each / 64;
            const int64_t from = part * blocks / shares.count * 64, to = (part + 1) * blocks / shares.count * 64;
            for (int share = 0; share + 1 < shares.count; ++share) {
                const int64_t first = shares.begin(share);
                for (int64_t r = 0; r < count; ++r)
                    add_to_shared(kept[share] + r, Reader(payload_of(r), k, 0).count_kept(first + from, first + to));
            }
        });
    }
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        Reader readers[1 + GC_MOST_MORE];
        for (int64_t r = 0; r < count; ++r) {
            int64_t before = 0;
            for (int other = 0; other < share; ++other) before += kept[other][r];
            readers[r] = Reader(payload_of(r), k, before);
        }
        results[share] =
            decode_in_turn(more, payload, from, to, 64, add, out,
                           [&](const uint8_t*, int64_t r, int64_t first, int64_t end, bool adds, float* target) {
                               return adds ? readers[r].template decode<true>(n, first, end, target)
                                           : readers[r].template decode<false>(n, first, end, target);
                           });
    });
    return first_error(results, shares.count);
}

void mask_encode(int threads, gc_memory* memory, const float* x, int64_t n, int64_t k, int bits, int is_signed,
                 int lloyd, uint32_t* workspace, int64_t capacity, uint8_t* payload) {
    if (is_signed)
        GC_FOR_BITS(bits,
                    (mask_encode_keeping<B, true>(threads, memory, x, n, k, lloyd != 0, workspace, capacity, payload)))
    else
        GC_FOR_BITS(bits,
                    (mask_encode_keeping<B, false>(threads, memory, x, n, k, lloyd != 0, workspace, capacity, payload)))
}

int mask_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t k, int bits, int is_signed,
                int add, float* out) {
    int result = GC_OK;
    if (is_signed)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true>(threads, more, payload, n, k, add, out)))
    else
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false>(threads, more, payload, n, k, add, out)))
    return result;
}

}  // namespace
#endif
