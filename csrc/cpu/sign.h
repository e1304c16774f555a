// Sign and OneBit: a bit an entry, one or two means a bucket (gcompress/compressors/sign.py).
#ifndef GCOMPRESS_CPU_SIGN_H
#define GCOMPRESS_CPU_SIGN_H

#include "../arith/sign.h"
#include "../gcompress.h"
#include "select.h"
#include "simd.h"
#include "sums.h"
#include "units.h"

namespace {

// The signs of up to 4096 entries from `first` on, and the sums behind the means. `source` is that of a selection (select.h).
template <int means, class Source>
void sign_block(const Source& source, int64_t first, int64_t count, uint8_t* packed, double* sums,
                int64_t* minus_count) {
    LaneSum plus, minus;
    alignas(64) float values[FETCHED], of_plus[64], of_minus[64];
    float tail[64] = {0};
    const float* part = nullptr;
    for (int64_t i = 0; i < count; i += 64) {
        if (i % FETCHED == 0) part = source.part(first + i, min64(FETCHED, count - i), values);
        const int64_t size = min64(64, count - i);
        const float* x = part + i % FETCHED;
        if (size < 64) {
            memcpy(tail, x, (size_t)size * sizeof(float));
            x = tail;
        }
        const uint64_t signs = signs_64(x);
        *minus_count += __builtin_popcountll(signs);
        memcpy(packed + i / 8, &signs, (size_t)((size + 7) / 8));
        for (int j = 0; j < 64; ++j) {  // vectorised
            const uint32_t pattern = float_bits(x[j]), magnitude = pattern & 0x7fffffffu;
            const uint32_t negative = means == 1 ? 0 : 0u - (pattern >> 31);
            of_plus[j] = bits_float(magnitude & ~negative);
            of_minus[j] = bits_float(magnitude & negative);
        }
        for (int row = 0; row < 64; row += SUM_LANES) {
            plus.add(of_plus + row);
            if (means == 2) minus.add(of_minus + row);
        }
    }
    sums[0] += plus.folded();
    if (means == 2) sums[1] += minus.folded();
}

// The same for the bucket of `count` entries from `begin` on, of any length: sums of blocks are made by several threads, and
// added up in turn.
template <int means, class Source>
void sign_bucket(int threads, const Source& source, int64_t begin, int64_t count, uint8_t* packed, double* sums,
                 int64_t* minus_count) {
    const int64_t most = 2048 * SUM_BLOCK;
    const auto sign_part = [&](int64_t i, double* part, int64_t* minus) {
        sign_block<means>(source, begin + i, min64(SUM_BLOCK, count - i), packed + i / 8, part, minus);
    };
    for (int64_t from = 0; from < count; from += most) {
        const int64_t some = min64(most, count - from);
        const Shares shares = shares_of(threads, some, SUM_BLOCK);
        if (shares.count == 1) {
            for (int64_t i = from; i < from + some; i += SUM_BLOCK) sign_part(i, sums, minus_count);
            continue;
        }
        double parts[most / SUM_BLOCK][2];
        on_shares(shares, [&](int, int64_t first, int64_t end) {
            int64_t mine = 0;
            for (int64_t i = first; i < end; i += SUM_BLOCK) {
                double* part = parts[i / SUM_BLOCK];
                part[0] = part[1] = 0.0;
                sign_part(from + i, part, &mine);
            }
            add_to_shared(minus_count, mine);
        });
        for (int64_t i = 0; i < some; i += SUM_BLOCK)
            for (int k = 0; k < 2; ++k) sums[k] += parts[i / SUM_BLOCK][k];
    }
}

template <class Source>
void sign_encode_range(int threads, const Source& source, int64_t n, int64_t bucket, int means, int64_t from,
                       int64_t to, uint8_t* payload) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    uint8_t* packed = payload + 4 * means * buckets;
    for (int64_t first = from; first < to; first += bucket) {
        const int64_t b = first / bucket, end = min64(n, first + bucket);
        double sums[2] = {0.0, 0.0};
        int64_t minus_count = 0;
        const int64_t count = end - first;
        if (means == 1)
            sign_bucket<1>(threads, source, first, count, packed + first / 8, sums, &minus_count);
        else
            sign_bucket<2>(threads, source, first, count, packed + first / 8, sums, &minus_count);
        store<float>(payload + 4 * means * b, mean_of(sums[0], means == 1 ? count : count - minus_count));
        if (means == 2) store<float>(payload + 8 * b + 4, mean_of(sums[1], minus_count));
    }
}

template <bool add>
void sign_decode_range(const uint8_t* payload, int64_t n, int64_t bucket, int means, int64_t from, int64_t to,
                       float* out) {
    const int64_t buckets = (n + bucket - 1) / bucket;
    const uint8_t* packed = payload + 4 * means * buckets;
    float tail[64] = {0};
    for (int64_t first = from, end; first < to; first = end) {
        const int64_t b = first / bucket;
        const uint8_t* scales = payload + 4 * means * b;
        const float plus = load<float>(scales), minus = -load<float>(scales + 4 * (means - 1));
        end = min64(to, (b + 1) * bucket);
        for (int64_t i = first; i < end; i += 64) {
            const int64_t size = min64(64, end - i);
            float* target = out + (i - from);
            uint64_t signs = 0;
            memcpy(&signs, packed + i / 8, (size_t)((size + 7) / 8));
            if (size == 64) {
                choose_64<add>(signs, plus, minus, target);
            } else {
                memcpy(tail, target, (size_t)size * sizeof(float));
                choose_64<add>(signs, plus, minus, tail);
                memcpy(target, tail, (size_t)size * sizeof(float));
            }
        }
    }
}

void sign_encode(int threads, gc_memory* memory, const float* x, int64_t n, int64_t bucket, int means,
                 uint8_t* payload) {
    const int in_bucket = shares_of(threads, n, bucket).count > 1 ? 1 : threads;
    const auto decode = [&](int64_t first, int64_t end, int64_t, float* sent) {
        sign_decode_range<false>(payload, n, bucket, means, first, end, sent);
    };
    // A long bucket is corrected while it is encoded, and again for what is kept, which spares to write it meanwhile.
    if (memory && bucket > SUM_BLOCK && in_bucket == threads) {
        sign_encode_range(in_bucket, Corrected{memory, x, Corrected::NOTHING}, n, bucket, means, 0, n, payload);
        return on_shares(shares_of(threads, n, FETCHED), [&](int, int64_t from, int64_t to) {
            keep_corrected(memory, x, from, to, n >= LARGE,
                           [&](int64_t first, int64_t end, float* sent) { decode(first, end, n, sent); });
        });
    }
    encode_units(
        threads, memory, x, n, bucket,
        [&](const float* source, int64_t first, int64_t end, int64_t) {
            sign_encode_range(in_bucket, Entries{source}, n, bucket, means, first, end, payload);
        },
        decode);
}

void sign_decode(int threads, const gc_more* more, const uint8_t* payload, int64_t n, int64_t bucket, int means,
                 int add, float* out) {
    decode_units(threads, more, payload, n, bucket, add, out,
                 [&](auto adds, const uint8_t* one, int64_t first, int64_t end, float* target) {
                     sign_decode_range<decltype(adds)::value>(one, n, bucket, means, first, end, target);
                 });
}

}  // namespace
#endif
