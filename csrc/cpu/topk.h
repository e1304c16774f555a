// TopK: the largest entries, of all or of each chunk, and four codings of their indices (gcompress/compressors/topk.py).
#ifndef GCOMPRESS_CPU_TOPK_H
#define GCOMPRESS_CPU_TOPK_H

#include "../gcompress.h"
#include "select.h"
#include "simd.h"
#include "units.h"

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

// Writes the kept entries of one share of a payload's entries, or of all: of one stretch after the other.
class KeptWriter {
public:
    KeptWriter() {}
    // `fresh`: x itself, to clear what is kept, which is exact, or null. `first`: where the share begins; `before`: kept
    // entries in front of it.
    KeptWriter(const float* x, float* fresh, int64_t k, int form, int width, int64_t first, int64_t before,
               uint8_t* payload)
        : x_(x),
          fresh_(fresh),
          form_(form),
          width_(width),
          values_(payload),
          index_(payload + 4 * k),
          high_(index_ + bytes_of_bits(k * width)),
          low_({index_ + before * width / 8, 0, (int)(before * width % 8)}),
          written_(before),
          first_high_(form == GC_INDEX_GAPS ? ((first >> width) + before) / 8 : 0),
          border_(INT64_MAX),
          beyond_(0) {}
    // The bytes of the index to which bits are added, before anything is put.
    static void clear_index(int64_t n, int64_t k, int form, int width, uint8_t* payload) {
        uint8_t *low = payload + 4 * k, *high = low + bytes_of_bits(k * width);
        if (form != GC_INDEX_BITMAP && k * width % 8) high[-1] = 0;
        if (form == GC_INDEX_GAPS) memset(high, 0, (size_t)bytes_of_bits(k + ((n - 1) >> width)));
    }
    // Before anything is put: another share follows. A byte that has bits of both is the other's until the end.
    void stop_before(const KeptWriter& next) {
        if (form_ != GC_INDEX_BITMAP && next.low_.filled) *next.low_.target = 0;
        if (form_ == GC_INDEX_GAPS) border_ = 8 * next.first_high_;
    }
    // Those of the entries from `first`, a multiple of 64, to `end`.
    void put(int64_t first, int64_t end, Selection selection) {
        put_each([&](const float* x, const auto& put_one) {
            uint32_t keys[64] = {0};
            for (int64_t i = first; i < end; i += 64) {
                const int64_t block = min64(64, end - i);
                if (block == 64)
                    keys_64<true>(x + i, keys);
                else
                    for (int64_t j = 0; j < block; ++j) keys[j] = key_of<true>(x[i + j]);
                uint64_t kept = kept_of_block(keys, block, &selection);
                if (form_ == GC_INDEX_BITMAP) memcpy(index_ + i / 8, &kept, (size_t)bytes_of_bits(block));
                for (; kept; kept &= kept - 1) put_one(i + __builtin_ctzll(kept));
            }
        });
    }
    // Those among what was found of a share whose first entry is `from`. No bitmap.
    void put_found(const Found& found, int share, int64_t from, Selection selection) {
        put_each([&](const float* x, const auto& put_one) {
            for (int64_t number = 0; number < found.taken; ++number) {
                if (found.share_of[number] != share) continue;
                const uint32_t* keys = found.keys + number * found.part;
                const uint32_t* places = found.places + number * found.part;
                const int64_t count = found.counts[number];
                for (int64_t i = 0; i < count; ++i) {
                    if (i + 16 < count) __builtin_prefetch(x + from + places[i + 16], 1);  // far apart
                    if (keys[i] < selection.threshold) continue;
                    if (keys[i] == selection.threshold && --selection.ties < 0) continue;
                    put_one(from + places[i]);
                }
            }
        });
    }
    // After all shares were put, for one after the other.
    void finish() {
        if (form_ != GC_INDEX_BITMAP && low_.filled) *low_.target |= (uint8_t)low_.pending;
        if (beyond_) high_[border_ / 8] |= beyond_;
    }

private:
    const float* x_;
    float* fresh_;
    int form_, width_;
    uint8_t *values_, *index_, *high_;
    BitWriter low_;
    int64_t written_, first_high_, border_;  // positions from `border_` on go to `beyond_`
    uint8_t beyond_;

    // each(x, put_one): put_one(entry) for each entry that is kept.
    template <class Each>
    GC_HOT void put_each(const Each& each) {
        // In registers: what is written might be any of the members, as far as the compiler knows.
        const float* x = x_;
        float* fresh = fresh_;
        const int form = form_, width = width_;
        uint8_t *values = values_, *high = high_;
        BitWriter low = low_;
        int64_t written = written_;
        const int64_t border = border_;
        const uint64_t low_mask = (1ull << width) - 1;
        each(x, [&](int64_t entry) {
            store<float>(values + 4 * written, x[entry]);
            if (fresh) fresh[entry] = 0.0f;
            if (form != GC_INDEX_BITMAP) low.put((uint64_t)entry & low_mask, width);
            if (form == GC_INDEX_GAPS) {
                const int64_t position = (entry >> width) + written;
                uint8_t* place = position < border ? high + (position >> 3) : &beyond_;
                *place |= (uint8_t)(1u << (position & 7));
            }
            ++written;
        });
        low_ = low;
        written_ = written;
    }
};

// Puts what `of_shares` says is kept, share by share at the same time; `found`: among those, if any.
void put_shares(const Shares& shares, const ShareSelection* of_shares, const Found* found, const float* x, float* fresh,
                int64_t k, int form, int width, uint8_t* payload) {
    KeptWriter writers[MOST_THREADS];
    KeptWriter::clear_index(shares.n, k, form, width, payload);
    for (int share = shares.count - 1; share >= 0; --share) {
        writers[share] = KeptWriter(x, fresh, k, form, width, shares.begin(share), of_shares[share].before, payload);
        if (share + 1 < shares.count) writers[share].stop_before(writers[share + 1]);
    }
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        if (found)
            writers[share].put_found(*found, share, from, of_shares[share].selection);
        else
            writers[share].put(from, to, of_shares[share].selection);
    });
    for (int share = 0; share < shares.count; ++share) writers[share].finish();
}

// The entries that a payload keeps, in order.
class KeptEntries {
public:
    KeptEntries() {}
    KeptEntries(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int64_t kept)
        : entry(0),
          error_(GC_OK),
          values_(payload),
          end_(n),
          k_(k),
          taken_(0),
          form_(form),
          width_(width),
          kept_(kept),
          left_(form == GC_INDEX_PLACES ? kept : 0),
          chunk_(0),
          low_({payload + 4 * k, payload + 4 * k + bytes_of_bits(k * width), 0, 0}),
          bitmap_(form == GC_INDEX_GAPS ? low_.end : payload + 4 * k),
          bytes_(bytes_of_bits(form == GC_INDEX_GAPS ? k + ((n - 1) >> width) : n)),
          read_(0),
          word_(0) {
        find(-1);
    }
    int64_t entry;  // the one that is next; n if none is
    float value() const { return load<float>(values_ + 4 * (taken_ - 1)); }
    void next() { find(entry); }
    // Pass over the entries before `first`, a multiple of `share_unit`. Whether they are in order is not looked at.
    void skip_to(int64_t first) {
        if (form_ == GC_INDEX_FIXED)
            for (; entry < first; next()) continue;
        if (form_ == GC_INDEX_FIXED || first == 0 || error_) return;
        if (form_ == GC_INDEX_PLACES) {
            taken_ = min64(k_, (first >> width_) * kept_);
            left_ = kept_;
            chunk_ = first;
        } else {
            pass_bits(form_ == GC_INDEX_GAPS ? first >> width_ : first);
            if (taken_ > k_) return stop(GC_BAD_COUNT);
        }
        low_ = {values_ + 4 * k_ + taken_ * width_ / 8, low_.end, 0, 0};
        low_.get((int)(taken_ * width_ % 8));
        find(first - 1);
    }
    static int64_t share_unit(int form, int width) {
        const bool by_block = form == GC_INDEX_GAPS || form == GC_INDEX_PLACES;
        return by_block && width > 6 ? (int64_t)1 << width : 64;
    }
    // What is wrong with the index as far as it was read, and once all entries were taken.
    int found_error() const { return error_; }
    int error() const { return error_ ? error_ : taken_ == k_ ? GC_OK : GC_BAD_COUNT; }

private:
    int error_;
    const uint8_t* values_;
    int64_t end_, k_, taken_;
    int form_, width_;
    int64_t kept_, left_, chunk_;  // of places: entries kept of a chunk, those to come of this one, where it begins
    BitReader low_;
    const uint8_t* bitmap_;
    int64_t bytes_, read_;
    uint64_t word_;

    void stop(int error) {
        error_ = error;
        entry = end_;
    }
    // Stand behind that many bits of the bitmap, a multiple of 64, or of gaps behind that many zeros.
    void pass_bits(int64_t target) {
        const bool gaps = form_ == GC_INDEX_GAPS;
        taken_ = read_ = 0;
        word_ = 0;
        while (target > 0 && read_ < bytes_) {
            memcpy(&word_, bitmap_ + read_, (size_t)min64(8, bytes_ - read_));
            const int64_t ones = __builtin_popcountll(word_), passed = gaps ? 64 - ones : 64;
            read_ += 8;
            if (gaps && passed >= target) {  // in this word
                uint64_t zeros = ~word_;
                for (; target > 1; --target) zeros &= zeros - 1;
                const int place = __builtin_ctzll(zeros) + 1;
                const uint64_t later = place < 64 ? word_ >> place << place : 0;
                taken_ += __builtin_popcountll(word_ ^ later);
                word_ = later;
                return;
            }
            taken_ += ones;
            target -= passed;
            word_ = 0;
        }
    }
    __attribute__((always_inline)) void find(int64_t previous) {
        if (error_) return;
        if (form_ == GC_INDEX_FIXED || form_ == GC_INDEX_PLACES) {
            if (taken_ == k_) return stop(GC_OK);
            entry = chunk_ + (int64_t)low_.get(width_);
            if (--left_ == 0) {  // of places only: otherwise it begins at 0
                left_ = kept_;
                chunk_ += (int64_t)1 << width_;
            }
        } else {  // a bitmap of the kept entries is the gap form with no low bits and no shift by the rank
            while (!word_) {
                if (read_ >= bytes_) return stop(GC_OK);
                memcpy(&word_, bitmap_ + read_, (size_t)min64(8, bytes_ - read_));
                read_ += 8;
            }
            const int64_t position = 8 * (read_ - 8) + __builtin_ctzll(word_);
            word_ &= word_ - 1;
            if (taken_ == k_) return stop(GC_BAD_COUNT);
            entry = form_ == GC_INDEX_GAPS ? (int64_t)((uint64_t)(position - taken_) << width_ | low_.get(width_))
                                           : position;
        }
        ++taken_;
        if (entry <= previous || entry >= end_) stop(GC_BAD_INDEX);
    }
};

template <class Source>
void topk_encode_from(const Shares& shares, const Source& source, const float* x, float* fresh, int64_t k, int form,
                      int width, uint32_t* workspace, int64_t capacity, uint8_t* payload) {
    Found found;
    const bool placed = form != GC_INDEX_BITMAP && shares.each < (int64_t)1 << 32;
    found.keys = workspace;
    found.capacity = capacity / 2;
    found.places = placed ? workspace + capacity / 2 : nullptr;
    ShareSelection of_shares[MOST_THREADS];
    select_largest<true>(shares, source, k, &found, of_shares);
    put_shares(shares, of_shares, placed && found.taken ? &found : nullptr, x, fresh, k, form, width, payload);
}

void topk_encode(int threads, gc_memory* memory, const float* x, int64_t n, int64_t k, int form, int width,
                 uint32_t* workspace, int64_t capacity, uint8_t* payload) {
    const Shares shares = shares_of(threads, n, 64);
    float* fresh = memory ? memory->fresh : nullptr;
    if (memory && memory->residual != fresh) {
        const bool again = n < LARGE || form == GC_INDEX_BITMAP;
        const Corrected source = {memory, x, again ? Corrected::TO_READ_AGAIN : Corrected::FOR_LATER};
        return topk_encode_from(shares, source, fresh, fresh, k, form, width, workspace, capacity, payload);
    }
    if (memory) correct_all(shares, memory, x);
    const float* source = memory ? fresh : x;
    topk_encode_from(shares, Entries{source}, source, fresh, k, form, width, workspace, capacity, payload);
}

void chunk_encode(gc_memory* memory, const float* x, int64_t n, int64_t k, int64_t chunk, int64_t kept, int form,
                  int width, uint32_t* workspace, int64_t, uint8_t* payload) {
    float* fresh = memory ? memory->fresh : nullptr;
    if (memory) correct_all({n, n, 1}, memory, x);
    const float* source = memory ? fresh : x;
    KeptWriter::clear_index(n, k, form, width, payload);
    KeptWriter writer(source, fresh, k, form, width, 0, 0, payload);
    for (int64_t first = 0, left = k; first < n; first += chunk, left -= kept) {
        const int64_t end = min64(n, first + chunk);
        writer.put(first, end, select_of_chunk<true>(source + first, end - first, end < n ? kept : left, workspace));
    }
    writer.finish();
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
    const ShareSelection all = {{key - 1, 0}, 0};
    put_shares({n, n, 1}, &all, nullptr, x, nullptr, k, form, width, payload);
}

// Hybrid (gcompress/compressors/combine.py): what is left beside the outliers, in their place; and both together.
void hybrid_split(const float* x, int64_t n, float* outliers) {
    for (int64_t i = 0; i < n; ++i) outliers[i] = outliers[i] == 0.0f ? x[i] : 0.0f;  // vectorised
}

void hybrid_merge(const float* outliers, int64_t n, float* rest) {
    for (int64_t i = 0; i < n; ++i) rest[i] = outliers[i] == 0.0f ? rest[i] : outliers[i];  // vectorised
}

int topk_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t k, int form, int width,
                int64_t kept, int add, float* out) {
    const Shares shares = shares_of(threads, n, KeptEntries::share_unit(form, width));
    int results[MOST_THREADS];
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        KeptEntries entries[1 + GC_MOST_MORE];
        for (int64_t r = 0; r <= (more ? more->count : 0); ++r) {
            entries[r] = KeptEntries(r ? more->payloads[r - 1] : payload, n, k, form, width, kept);
            entries[r].skip_to(from);
        }
        const auto decode = [&](const uint8_t*, int64_t r, int64_t first, int64_t end, bool adds, float* target) {
            if (!adds) memset(target, 0, (size_t)(end - first) * sizeof(float));
            KeptEntries one = entries[r];  // in registers
            for (; one.entry < end; one.next()) {
                float* place = target + (one.entry - first);
                *place = adds ? *place + one.value() : one.value();
            }
            entries[r] = one;
            return end < to ? (int)GC_OK : to < n ? one.found_error() : one.error();
        };
        results[share] = decode_in_turn(more, payload, from, to, 1, add, out, decode);
    });
    return first_error(results, shares.count);
}

}  // namespace
#endif
