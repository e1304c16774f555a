// SharedScale: integers that add up in 64-bit words. Scales read 4 bytes an entry, words read 4 again and write bits / 8;
// decoding reads bits / 8 and writes 4, or reads 4 more to add. LowRank's product of two factors writes 4 an entry.
#include "../arith/lowrank.h"
#include "../arith/shared.h"
#include "device.cuh"

namespace {

// The entries behind a word: field f is entry first + f * stride, while that is below `end`.
struct Fields {
    int64_t first, stride, end;
};
GC_INLINE Fields fields_of(int64_t word, int64_t n, int fields) {
    Fields all;
    const int64_t block = word / WORDS, start = block * WORDS * fields, count = min64(WORDS * fields, n - start);
    all.stride = (count + fields - 1) / fields;
    all.first = start + word - block * WORDS;
    all.end = start + count;
    return all;
}

}  // namespace

// The largest magnitude of every bucket, as its bit pattern, where zeros stand at first; infinity if an entry is not
// finite. A warp takes 4096 entries of a bucket.
GC_KERNEL(shared_scales)(const float* x, const float* residual, int64_t n, int64_t bucket, uint32_t* scales) {
    const Source source = {x, residual};
    const int64_t chunks = (bucket + TILE - 1) / TILE, unit = (int64_t)blockIdx.x * WARPS + warp();
    const int64_t number = unit / chunks, start = number * bucket + (unit - number * chunks) * TILE;
    if (start >= n) return;
    const int64_t end = min64(min64(start + TILE, (number + 1) * bucket), n);
    uint32_t largest = 0;
    for (int64_t i = start + lane(); i < end; i += 32) {
        const uint32_t key = key_of<true>(source.at(i));
        largest = key > largest ? key : largest;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const uint32_t other = __shfl_xor_sync(ALL_LANES, largest, distance);
        largest = other > largest ? other : largest;
    }
    if (lane() == 0) atomicMax(scales + number, largest < INFINITY_KEY ? largest : INFINITY_KEY);
}
GC_REGISTER(shared_scales)

GC_KERNEL(shared_encode)(const float* x, const float* residual, float* fresh, uint32_t* poisoned, int64_t n,
                         int64_t bucket, int64_t limit, int64_t width, int64_t stochastic, int64_t seed,
                         const float* scales, int64_t words, uint8_t* payload) {
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t number = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (number >= words) return;
    const int count = 64 / (int)width;
    const Fields fields = fields_of(number, n, count);
    uint64_t word = 0;
    for (int f = 0; f < count; ++f) {
        const int64_t i = fields.first + f * fields.stride;
        int32_t code = 0;
        if (i < fields.end) {
            const float step = shared_step(scales[quotient(i, bucket)], (int)limit), value = source.at(i);
            const float draw = stochastic ? uniform((uint32_t)i, (uint32_t)seed) : 0.0f;
            const float finite = step == step ? value : 0.0f;
            code = shared_code(finite, shared_inverse(step), (float)(int)limit, stochastic != 0, draw);
            if (fresh) feedback.keep(i, value, shared_value(code, step));
        }
        word += (uint64_t)(int64_t)code << (width * f);
    }
    store_u32(payload + 8 * number, (uint32_t)word);
    store_u32(payload + 8 * number + 4, (uint32_t)(word >> 32));
}
GC_REGISTER(shared_encode)

GC_KERNEL(shared_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int64_t limit, int64_t width,
                         const uint8_t* scales, int64_t words, int64_t add, float* out) {
    const int64_t number = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (number >= words) return;
    const int count = 64 / (int)width;
    const int32_t half = 1 << (width - 1);
    const uint64_t word = load_u64(payload + 8 * number) + bias_of((int)width, count), mask = (1ull << width) - 1;
    const Fields fields = fields_of(number, n, count);
    for (int f = 0; f < count; ++f) {
        const int64_t i = fields.first + f * fields.stride;
        if (i >= fields.end) break;
        const int32_t code = (int32_t)(word >> (width * f) & mask) - half;
        const float value = shared_value(code, shared_step(load_float(scales + 4 * quotient(i, bucket)), (int)limit));
        out[i] = add ? out[i] + value : value;
    }
}
GC_REGISTER(shared_decode)

// Terms are added in the order of the rank, each product rounded.
GC_KERNEL(lowrank_decode)(const float* left, const float* right, int64_t columns, int64_t rank, int64_t n, int64_t add,
                          float* out) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const int64_t row = quotient(i, columns), column = i - row * columns;
    float sum = 0.0f;
    for (int64_t k = 0; k < rank; ++k) sum = sum + left[row * rank + k] * right[k * columns + column];
    if (key_of<true>(sum) >= INFINITY_KEY) sum = lowrank_wide(left + row * rank, right + column, rank, columns);
    out[i] = add ? out[i] + sum : sum;
}
GC_REGISTER(lowrank_decode)
