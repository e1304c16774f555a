// Casts to 16, 8 and 4 bit floats. FP16, FP8, MXFP4: bytes moved: see bucket.cuh. BF16: 4 read and 2 written an entry.
#include "../arith/cast.h"
#include "bucket.cuh"

namespace {

template <int form>
struct CastMethod {
    typedef CastScale Scale;
    typedef float Header;
    int64_t buckets;
    uint8_t* payload;

    GC_INLINE int stages() const { return 1; }
    GC_INLINE int uses(int) const { return USES_RANGE; }
    GC_INLINE int width() const { return Cast<form>::WIDTH; }
    GC_INLINE uint8_t* packed() const { return payload + buckets; }
    GC_INLINE void add(int, float value, const Scale&, Partial* partial) const {
        const int32_t key = (int32_t)key_of<true>(value);
        partial->low = -key < partial->low ? -key : partial->low;
        if (key < (int32_t)INFINITY_KEY && key > partial->high) partial->high = key;
    }
    GC_INLINE Scale finish(int, const Partial& all, int64_t, const Scale&) const {
        return cast_scale<form>(all.high, -all.low);
    }
    GC_INLINE void header(int64_t number, const Scale& scale) const { payload[number] = scale.byte; }
    GC_INLINE uint32_t code(float value, int64_t, const Scale& scale) const {
        const uint32_t sign = float_bits(value) >> 31 << (width() - 1);  // not of the product, which may be NaN
        return sign | (uint32_t)any_code<form>(key_of<true>(value * scale.factor), scale.top);
    }
    GC_INLINE float value(uint32_t code, const Scale& scale) const {
        return from_code<form>(code) * cast_back(scale.byte);
    }
    GC_INLINE Header header_of(int64_t number) const { return cast_back(payload[number]); }
    GC_INLINE float decoded(uint32_t code, Header factor) const { return from_code<form>(code) * factor; }
};

template <int form>
GC_INLINE CastMethod<form> cast_of(int64_t n, int64_t bucket, uint8_t* payload) {
    const CastMethod<form> method = {(n + bucket - 1) / bucket, payload};
    return method;
}

}  // namespace

#define GC_CAST_KERNELS(name, form)                                                                        \
    GC_KERNEL(name##_encode)(GC_BUCKET_PARAMETERS) {                                                       \
        GC_ENCODE_BUCKETS(CastMethod<form>, cast_of<form>(n, bucket, payload));                            \
    }                                                                                                      \
    GC_REGISTER(name##_encode)                                                                             \
    GC_KERNEL(name##_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int64_t add, float* out) { \
        decode_buckets(cast_of<form>(n, bucket, (uint8_t*)payload), n, bucket, add, out);                  \
    }                                                                                                      \
    GC_REGISTER(name##_decode)
#define GC_CAST_FINISH(name, form)                                              \
    GC_KERNEL(name##_finish)(GC_BUCKET_PARAMETERS) {                            \
        GC_FINISH_BUCKETS(CastMethod<form>, cast_of<form>(n, bucket, payload)); \
    }                                                                           \
    GC_REGISTER(name##_finish)

GC_CAST_KERNELS(fp16, CAST_FP16)
GC_CAST_FINISH(fp16, CAST_FP16)
GC_CAST_KERNELS(fp8, CAST_FP8)
GC_CAST_FINISH(fp8, CAST_FP8)
GC_CAST_KERNELS(mxfp4, CAST_MXFP4)

GC_KERNEL(bf16_encode)(const float* x, const float* residual, float* fresh, uint32_t* poisoned, int64_t n,
                       int64_t stochastic, int64_t seed, uint8_t* payload) {
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t j = i; j < min64(n, i + 4); j += 2) {
        const float first = source.at(j), second = j + 1 < n ? source.at(j + 1) : 0.0f;
        const uint16_t low = to_bf16(first, stochastic, (uint32_t)j, (uint32_t)seed);
        const uint16_t high = to_bf16(second, stochastic, (uint32_t)(j + 1), (uint32_t)seed);
        if (j + 1 < n) {
            store_u32(payload + 2 * j, (uint32_t)low | (uint32_t)high << 16);
        } else {
            payload[2 * j] = (uint8_t)low;
            payload[2 * j + 1] = (uint8_t)(low >> 8);
        }
        if (!fresh) continue;
        feedback.keep(j, first, from_bf16(low));
        if (j + 1 < n) feedback.keep(j + 1, second, from_bf16(high));
    }
}
GC_REGISTER(bf16_encode)

GC_KERNEL(bf16_decode)(const uint8_t* payload, int64_t n, int64_t add, float* out) {
    const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (i + 4 <= n) {
        const bool aligned = is_aligned(out + i, 16);
        const uint64_t codes = load_u64(payload + 2 * i);
        float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (add) load_four(out + i, aligned, values);
        for (int j = 0; j < 4; ++j) {
            const float value = from_bf16((uint16_t)(codes >> (16 * j)));
            values[j] = add ? values[j] + value : value;
        }
        store_four(out + i, aligned, values);
        return;
    }
    for (int64_t j = i; j < n; ++j) {
        const float value = from_bf16((uint16_t)(payload[2 * j] | payload[2 * j + 1] << 8));
        out[j] = add ? out[j] + value : value;
    }
}
GC_REGISTER(bf16_decode)
