// Eden: a random rotation of blocks, Lloyd-Max levels, a scale per block. A thread block takes a block of entries, up to
// 16384, to shared memory and rotates it there, three strides of the Hadamard transform at a time, in the order of
// the CPU. Moves 4 bytes read and bits / 8 written an entry; decoding the reverse, or 4 more read to add.
#include "eden.cuh"

namespace {

enum { MOST_LEVELS = 128 };

struct EdenShared {
    float level[MOST_LEVELS], border[MOST_LEVELS];
    double sums[SUM_CHUNKS];
    uint32_t largest;
};

struct Chosen {
    Padded y;
    const EdenBlock* block;
    const uint8_t* codes;
    const float* level;
    uint32_t classes;
    bool squared;
    GC_INLINE double operator()(int64_t k) const {
        const double chosen = (double)level[codes[k] & (classes - 1)];
        return chosen * (squared ? chosen : (double)magnitude_of(y.at(block->position(k))));
    }
};

// The number of borders that a magnitude reaches.
GC_INLINE uint32_t class_of(float units, const float* border, uint32_t classes) {
    uint32_t low = 0;
    for (uint32_t step = classes / 2; step > 0; step /= 2)
        if (units >= border[low + step - 1]) low += step;
    return low;
}

GC_INLINE void load_levels(const float* levels, uint32_t classes, EdenShared* shared) {
    if (threadIdx.x >= classes) return;
    shared->level[threadIdx.x] = levels[threadIdx.x];
    if (threadIdx.x + 1 < classes)
        shared->border[threadIdx.x] = eden_border(levels[threadIdx.x], levels[threadIdx.x + 1]);
}

GC_INLINE uint8_t* packed_of(uint8_t* payload, int64_t n, int64_t block, int64_t sent, int64_t bits) {
    return payload + 4 + 4 * ((n + block - 1) / block) + (int64_t)blockIdx.x * (sent / 8 * bits);
}

}  // namespace

GC_KERNEL(eden_encode)(const float* x, const float* residual, int64_t n, int64_t bits, int64_t size, int64_t sent,
                       int64_t sent_tail, int64_t unbiased, int64_t seed, const float* levels, uint8_t* payload) {
    GC_DYNAMIC_SHARED(float, floats);
    GC_SHARED(EdenShared, shared);
    const Source source = {x, residual};
    const Padded y = {floats};
    const EdenBlock block = eden_block(n, size, sent, sent_tail, (uint32_t)seed);
    const uint32_t classes = 1u << (bits - 1);
    uint8_t* codes = (uint8_t*)(floats + size + size / 32);
    uint8_t* packed = packed_of(payload, n, size, sent, bits);
    if (threadIdx.x == 0) shared.largest = 0;
    load_levels(levels, classes, &shared);
    __syncthreads();
    uint32_t largest = 0;
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) {
        const float value = source.at(block.first + i);
        y.at(i) = value;
        largest = key_of<true>(value) > largest ? key_of<true>(value) : largest;
    }
    atomicMax(&shared.largest, largest);
    __syncthreads();
    const int exponent = (int)(shared.largest >> 23);
    if (blockIdx.x == 0 && threadIdx.x == 0) store_u32(payload, (uint32_t)seed);
    float scale = exponent == 0 ? 0.0f : bits_float(QUIET_NAN);
    const bool usable = exponent > 0 && exponent < 255;
    if (usable) {
        const float factor = bits_float((uint32_t)(255 - exponent) << 23);
        for (int64_t i = threadIdx.x; i < block.entries; i += THREADS)
            y.at(i) = flipped(y.at(i) * factor, hashed(block.word + (uint32_t)(i >> 5), block.seed), i);
        __syncthreads();
        rotate(y, block);
        const Squares squares = {y};
        const double power = ordered_sum(squares, block.entries, shared.sums);
        const float to_units = eden_units(power, block.entries);
        for (int64_t k = threadIdx.x; k < block.sent; k += THREADS) {
            const float value = y.at(block.position(k));
            const uint32_t m = class_of(magnitude_of(value) * to_units, shared.border, classes);
            codes[k] = (uint8_t)(m | float_bits(value) >> 31 << (bits - 1));
        }
        const Chosen dot = {y, &block, codes, shared.level, classes, false};
        const Chosen chosen = {y, &block, codes, shared.level, classes, true};
        const double product = ordered_sum(dot, block.sent, shared.sums);
        const double square = unbiased ? 0.0 : ordered_sum(chosen, block.sent, shared.sums);
        scale = eden_scale(power, product, square, unbiased != 0, exponent, block.whole, block.entries);
    }
    if (threadIdx.x == 0) store_float(payload + 4 + 4 * (int64_t)block.number, scale);
    for (int64_t start = 8 * threadIdx.x; start < block.sent; start += 8 * THREADS) {
        uint64_t word = 0;
        const int count = (int)min64(8, block.sent - start);
        for (int j = 0; j < count && usable; ++j) word |= (uint64_t)codes[start + j] << (bits * j);
        for (int byte = 0; byte < (count * bits + 7) / 8; ++byte)
            packed[start / 8 * bits + byte] = (uint8_t)(word >> (8 * byte));
    }
}
GC_REGISTER(eden_encode)

GC_KERNEL(eden_decode)(const uint8_t* payload, int64_t n, int64_t bits, int64_t size, int64_t sent, int64_t sent_tail,
                       const float* levels, int64_t add, float* out) {
    GC_DYNAMIC_SHARED(float, floats);
    GC_SHARED(EdenShared, shared);
    const Padded y = {floats};
    const EdenBlock block = eden_block(n, size, sent, sent_tail, load_u32(payload));
    const uint32_t classes = 1u << (bits - 1);
    const uint8_t* packed = packed_of((uint8_t*)payload, n, size, sent, bits);
    load_levels(levels, classes, &shared);
    if (block.sent < block.entries)
        for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) y.at(i) = 0.0f;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < block.sent; k += THREADS) {
        const uint32_t code = (uint32_t)load_bits(packed, k * bits, (int)bits);
        const float level = shared.level[code & (classes - 1)];
        y.at(block.position(k)) = code >= classes ? -level : level;
    }
    __syncthreads();
    rotate_back(y, block);
    const float scale = load_float(payload + 4 + 4 * (int64_t)block.number);
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) {
        const float value = flipped(saturated(y.at(i) * scale), hashed(block.word + (uint32_t)(i >> 5), block.seed), i);
        out[block.first + i] = add ? out[block.first + i] + value : value;
    }
}
GC_REGISTER(eden_decode)
