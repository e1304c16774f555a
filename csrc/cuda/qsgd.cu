// QSGD: random rounding to multiples of norm / s; bytes moved: see bucket.cuh.
#include "../arith/qsgd.h"
#include "bucket.cuh"

namespace {

struct Qsgd {
    typedef QsgdScale Scale;
    typedef float Header;
    int64_t buckets;
    int bits, levels;
    bool largest_norm;
    uint32_t seed;
    uint8_t* payload;

    GC_INLINE int stages() const { return 1; }
    GC_INLINE int uses(int) const { return USES_SUMS | USES_RANGE; }
    GC_INLINE int width() const { return bits; }
    GC_INLINE uint8_t* packed() const { return payload + 4 * buckets; }
    GC_INLINE void add(int, float value, const Scale&, Partial* partial) const {
        const int32_t key = (int32_t)key_of<true>(value);
        partial->sum[0] += (double)value * (double)value;
        partial->high = key > partial->high ? key : partial->high;
    }
    GC_INLINE Scale finish(int, const Partial& all, int64_t, const Scale&) const {
        return qsgd_scale(all.sum[0], all.high, largest_norm, levels);
    }
    GC_INLINE void header(int64_t number, const Scale& scale) const {
        store_float(payload + 4 * number, qsgd_sent_step(scale));
    }
    GC_INLINE uint32_t code(float value, int64_t index, const Scale& scale) const {
        if (!scale.finite) return (uint32_t)levels;
        return qsgd_code(value, scale.inverse, uniform((uint32_t)index, seed), levels);
    }
    GC_INLINE float value(uint32_t code, const Scale& scale) const {
        return qsgd_value((uint8_t)code, (float)levels, qsgd_sent_step(scale));
    }
    GC_INLINE Header header_of(int64_t number) const { return load_float(payload + 4 * number); }
    GC_INLINE float decoded(uint32_t code, Header step) const { return qsgd_value((uint8_t)code, (float)levels, step); }
};

GC_INLINE Qsgd qsgd_of(int64_t n, int64_t bucket, int64_t bits, int64_t largest_norm, int64_t seed, uint8_t* payload) {
    const Qsgd method = {(n + bucket - 1) / bucket, (int)bits,      (1 << (bits - 1)) - 1,
                         largest_norm != 0,         (uint32_t)seed, payload};
    return method;
}

}  // namespace

GC_KERNEL(qsgd_encode)(GC_BUCKET_PARAMETERS, int64_t bits, int64_t largest_norm, int64_t seed) {
    GC_ENCODE_BUCKETS(Qsgd, qsgd_of(n, bucket, bits, largest_norm, seed, payload));
}
GC_REGISTER(qsgd_encode)

GC_KERNEL(qsgd_finish)(GC_BUCKET_PARAMETERS, int64_t bits, int64_t largest_norm, int64_t seed) {
    GC_FINISH_BUCKETS(Qsgd, qsgd_of(n, bucket, bits, largest_norm, seed, payload));
}
GC_REGISTER(qsgd_finish)

GC_KERNEL(qsgd_decode)(const uint8_t* payload, int64_t n, int64_t bits, int64_t bucket, int64_t add, float* out) {
    decode_buckets(qsgd_of(n, bucket, bits, 0, 0, (uint8_t*)payload), n, bucket, add, out);
}
GC_REGISTER(qsgd_decode)
