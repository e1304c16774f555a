// Sign and OneBit: a bit an entry, one or two means a bucket; bytes moved: see bucket.cuh.
#include "../arith/sign.h"
#include "bucket.cuh"

namespace {

struct SignMethod {
    struct Scale {
        float plus, minus;
    };
    typedef Scale Header;
    int64_t buckets;
    int means;
    uint8_t* payload;

    GC_INLINE int stages() const { return 1; }
    GC_INLINE int uses(int) const { return USES_SUMS | USES_COUNT; }
    GC_INLINE int width() const { return 1; }
    GC_INLINE uint8_t* packed() const { return payload + 4 * means * buckets; }
    GC_INLINE void add(int, float value, const Scale&, Partial* partial) const {
        const bool minus = float_bits(value) >> 31;
        partial->count += minus;
        const double magnitude = (double)magnitude_of(value);
        partial->sum[0] += means == 2 && minus ? 0.0 : magnitude;
        partial->sum[1] += means == 2 && minus ? magnitude : 0.0;
    }
    GC_INLINE Scale finish(int, const Partial& all, int64_t count, const Scale&) const {
        Scale scale;
        scale.plus = mean_of(all.sum[0], means == 1 ? count : count - all.count);
        scale.minus = means == 1 ? scale.plus : mean_of(all.sum[1], all.count);
        return scale;
    }
    GC_INLINE void header(int64_t number, const Scale& scale) const {
        store_float(payload + 4 * means * number, scale.plus);
        if (means == 2) store_float(payload + 8 * number + 4, scale.minus);
    }
    GC_INLINE uint32_t code(float value, int64_t, const Scale&) const { return float_bits(value) >> 31; }
    GC_INLINE float value(uint32_t code, const Scale& scale) const { return code ? -scale.minus : scale.plus; }
    GC_INLINE Header header_of(int64_t number) const {
        const uint8_t* scales = payload + 4 * means * number;
        const Header header = {load_float(scales), load_float(scales + 4 * (means - 1))};
        return header;
    }
    GC_INLINE float decoded(uint32_t code, const Header& header) const { return value(code, header); }
};

GC_INLINE SignMethod sign_of(int64_t n, int64_t bucket, int64_t means, uint8_t* payload) {
    const SignMethod method = {(n + bucket - 1) / bucket, (int)means, payload};
    return method;
}

}  // namespace

GC_KERNEL(sign_encode)(GC_BUCKET_PARAMETERS, int64_t means) {
    GC_ENCODE_BUCKETS(SignMethod, sign_of(n, bucket, means, payload));
}
GC_REGISTER(sign_encode)

GC_KERNEL(sign_finish)(GC_BUCKET_PARAMETERS, int64_t means) {
    GC_FINISH_BUCKETS(SignMethod, sign_of(n, bucket, means, payload));
}
GC_REGISTER(sign_finish)

GC_KERNEL(sign_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int64_t means, int64_t add, float* out) {
    decode_buckets(sign_of(n, bucket, means, (uint8_t*)payload), n, bucket, add, out);
}
GC_REGISTER(sign_decode)
