// Ternary: minus, zero or plus one scale, five trits a byte. Scales as in bucket.cuh: 4 bytes read an entry (a large
// bucket rounded to nearest: 8). A group of trits is no multiple of a bucket, so another kernel reads x again for
// them: 4 bytes an entry and 0.2 written. Decoding writes 4 and reads 0.2, or 4 more to add.
#include "../arith/ternary.h"
#include "bucket.cuh"

namespace {

struct Ternary {
    typedef TernaryScale Scale;
    int64_t buckets;
    bool stochastic;
    double clip;
    uint8_t* payload;

    GC_INLINE int stages() const { return stochastic ? 1 : 2; }
    GC_INLINE int uses(int) const { return USES_SUMS | USES_COUNT | USES_RANGE; }
    GC_INLINE int width() const { return 0; }
    GC_INLINE uint8_t* packed() const { return payload; }
    GC_INLINE void add(int stage, float value, const Scale& scale, Partial* partial) const {
        const float magnitude = magnitude_of(value);
        if (stage == 1) {
            partial->sum[0] += (double)(magnitude > scale.bound ? magnitude : 0.0f);
            partial->count += magnitude > scale.bound;
            return;
        }
        const int32_t key = (int32_t)key_of<true>(value);
        partial->sum[0] += stochastic ? (double)value * (double)value : (double)magnitude;
        partial->high = key > partial->high ? key : partial->high;
    }
    GC_INLINE Scale finish(int stage, const Partial& all, int64_t count, const Scale& before) const {
        Scale scale = {0.0f, 0.0f, true};
        if (stage == 1) {
            scale = before;
            if (scale.finite) scale.scale = ternary_mean(all.sum[0], all.count);
            return scale;
        }
        scale.finite = all.high < (int32_t)INFINITY_KEY;
        if (!scale.finite) return scale;
        if (stochastic)
            scale.scale = ternary_clipped(all.sum[0], all.high, count, clip);
        else
            scale.bound = ternary_bound(all.sum[0], count);
        return scale;
    }
    GC_INLINE void header(int64_t number, const Scale& scale) const {
        store_float(payload + 4 * number, ternary_sent(scale));
    }
    GC_INLINE uint32_t code(float, int64_t, const Scale&) const { return 0; }
    GC_INLINE float value(uint32_t, const Scale&) const { return 0.0f; }
};

GC_INLINE Ternary ternary_of(int64_t n, int64_t bucket, int64_t stochastic, double clip, uint8_t* payload) {
    const Ternary method = {(n + bucket - 1) / bucket, stochastic != 0, clip, payload};
    return method;
}

// The group of trits that byte number `index` lies in.
struct TritGroup {
    int64_t first, entries, width, column;
};
GC_INLINE TritGroup trit_group(int64_t index, int64_t n) {
    TritGroup group;
    group.first = index / 64 * TRIT_GROUP;
    group.column = index & 63;
    group.entries = min64(TRIT_GROUP, n - group.first);
    group.width = (group.entries + 4) / 5;
    return group;
}

}  // namespace

GC_KERNEL(ternary_encode)(GC_BUCKET_PARAMETERS, int64_t stochastic, double clip) {
    GC_ENCODE_BUCKETS(Ternary, ternary_of(n, bucket, stochastic, clip, payload));
}
GC_REGISTER(ternary_encode)

GC_KERNEL(ternary_finish)(GC_BUCKET_PARAMETERS, int64_t stochastic, double clip) {
    GC_FINISH_BUCKETS(Ternary, ternary_of(n, bucket, stochastic, clip, payload));
}
GC_REGISTER(ternary_finish)

GC_KERNEL(ternary_trits)(const float* x, const float* residual, float* fresh, uint32_t* poisoned, int64_t n,
                         int64_t bucket, const TernaryScale* scales, int64_t stochastic, int64_t seed,
                         uint8_t* payload) {
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= (n + 4) / 5) return;
    const TritGroup group = trit_group(index, n);
    int32_t byte = 0, weight = 1;
    for (int digit = 0; digit < 5; ++digit, weight *= 3) {
        const int64_t place = digit * group.width + group.column, i = group.first + place;
        if (place >= group.entries) break;
        const TernaryScale scale = scales[quotient(i, bucket)];
        const float value = source.at(i);
        const float bound = stochastic ? uniform((uint32_t)i, (uint32_t)seed) * scale.scale : scale.bound;
        const uint8_t trit = ternary_usable(scale) ? trit_of(value, bound) : 1;
        byte += weight * trit;
        if (fresh) feedback.keep(i, value, trit_value(trit, ternary_sent(scale)));
    }
    payload[4 * ((n + bucket - 1) / bucket) + index] = (uint8_t)byte;
}
GC_REGISTER(ternary_trits)

GC_KERNEL(ternary_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int64_t add, float* out) {
    const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= (n + 4) / 5) return;
    const TritGroup group = trit_group(index, n);
    uint32_t byte = payload[4 * ((n + bucket - 1) / bucket) + index];
    for (int digit = 0; digit < 5; ++digit) {
        const int64_t place = digit * group.width + group.column, i = group.first + place;
        if (place >= group.entries) break;
        const float value = trit_value((uint8_t)(byte % 3), load_float(payload + 4 * quotient(i, bucket)));
        byte /= 3;
        out[i] = add ? out[i] + value : value;
    }
}
GC_REGISTER(ternary_decode)
