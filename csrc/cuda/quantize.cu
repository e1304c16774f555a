// Quantize: a grid per bucket, codes of 1 to 8 bits; bytes moved: see bucket.cuh. With 1 bit, rounded to nearest, a
// large bucket is read once more (12 bytes an entry): the mean magnitude needs the largest one.
#include "../arith/quantize.h"
#include "bucket.cuh"

namespace {

struct Quantize {
    typedef Grid Scale;
    struct Header {
        float step, zero;
    };
    int64_t buckets;
    int bits;
    bool stochastic;
    uint32_t seed;
    uint8_t* payload;

    GC_INLINE int stages() const { return bits == 1 && !stochastic ? 2 : 1; }
    GC_INLINE int uses(int stage) const { return stage == 0 ? USES_RANGE : USES_COUNT; }
    GC_INLINE int width() const { return bits; }
    GC_INLINE uint8_t* packed() const { return payload + (bits == 1 ? 4 : 5) * buckets; }
    GC_INLINE void add(int stage, float value, const Grid& grid, Partial* partial) const {
        if (stage == 0) {
            const int32_t ordered = ordered_pattern(value);
            partial->low = ordered < partial->low ? ordered : partial->low;
            partial->high = ordered > partial->high ? ordered : partial->high;
        } else if (grid.finite && grid.step > 0.0f) {  // of the first stage: the largest magnitude
            partial->count += round_even(magnitude_of(value) * one_bit_factor(grid.step));
        }
    }
    GC_INLINE Grid finish(int stage, const Partial& all, int64_t count, const Grid& before) const {
        if (stage == 1) {
            if (!before.finite) return poisoned_grid(bits);
            return one_bit_grid(before.step > 0.0f ? one_bit_mean(all.count, count, before.step) : 0.0f);
        }
        if (!is_finite_range(all.low, all.high)) return poisoned_grid(bits);
        const float top = range_top(all.high), bottom = range_bottom(all.low);
        if (bits > 1) return range_grid(top, bottom, stochastic, bits);
        const float largest = one_bit_largest(top, bottom, stochastic);
        if (stochastic) return one_bit_grid(largest);
        const Grid first = {largest, 0.0f, 0.5f, true};
        return first;
    }
    GC_INLINE void header(int64_t number, const Grid& grid) const {
        store_float(payload + 4 * number, grid.step);
        if (bits > 1) payload[4 * buckets + number] = (uint8_t)grid.zero;
    }
    GC_INLINE uint32_t code(float value, int64_t index, const Grid& grid) const {
        if (!grid.finite) return 0;
        return quantized(value, grid, stochastic ? uniform((uint32_t)index, seed) : 0.5f, stochastic, bits);
    }
    GC_INLINE float value(uint32_t code, const Grid& grid) const {
        return dequantized((uint8_t)code, grid.zero, grid.step, true);
    }
    GC_INLINE Header header_of(int64_t number) const {
        const Header header = {load_float(payload + 4 * number),
                               bits == 1 ? 0.5f : (float)payload[4 * buckets + number]};
        return header;
    }
    GC_INLINE float decoded(uint32_t code, const Header& header) const {
        return dequantized((uint8_t)code, header.zero, header.step, true);
    }
};

GC_INLINE Quantize quantize_of(int64_t n, int64_t bucket, int64_t bits, int64_t stochastic, int64_t seed,
                               uint8_t* payload) {
    const Quantize method = {(n + bucket - 1) / bucket, (int)bits, stochastic != 0, (uint32_t)seed, payload};
    return method;
}

}  // namespace

GC_KERNEL(quantize_encode)(GC_BUCKET_PARAMETERS, int64_t bits, int64_t stochastic, int64_t seed) {
    GC_ENCODE_BUCKETS(Quantize, quantize_of(n, bucket, bits, stochastic, seed, payload));
}
GC_REGISTER(quantize_encode)

GC_KERNEL(quantize_finish)(GC_BUCKET_PARAMETERS, int64_t bits, int64_t stochastic, int64_t seed) {
    GC_FINISH_BUCKETS(Quantize, quantize_of(n, bucket, bits, stochastic, seed, payload));
}
GC_REGISTER(quantize_finish)

GC_KERNEL(quantize_decode)(const uint8_t* payload, int64_t n, int64_t bits, int64_t bucket, int64_t add, float* out) {
    decode_buckets(quantize_of(n, bucket, bits, 0, 0, (uint8_t*)payload), n, bucket, add, out);
}
GC_REGISTER(quantize_decode)
