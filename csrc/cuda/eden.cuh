// Blocks of up to 16384 entries in shared memory: random signs, Hadamard transforms and sums in the order of the CPU, for
// Eden (eden.cu) and for Polar's turned entries (polar_turn.cu).
#ifndef GCOMPRESS_CUDA_EDEN_CUH
#define GCOMPRESS_CUDA_EDEN_CUH

#include "../arith/eden.h"
#include "device.cuh"

namespace {

enum { SUM_CHUNKS = EDEN_LARGEST_BLOCK / TILE };

// Floats with a gap behind every 32, so that strides of 8 and 32 do not meet in one bank.
struct Padded {
    float* base;
    GC_INLINE float& at(int64_t i) const { return base[i + (i >> 5)]; }
};

struct EdenBlock {
    int64_t first, entries, part, sent;  // part: the power of two that one transform takes
    uint32_t number, word, seed, positions;
    float root;
    bool whole;

    // The rotated entry that is sent as number k.
    GC_INLINE int64_t position(int64_t k) const {
        if (sent == entries) return k;
        return (int64_t)((uint64_t)(eden_start(positions, entries) + k * eden_step(positions, entries)) %
                         (uint64_t)entries);
    }
};

GC_INLINE EdenBlock eden_block(int64_t n, int64_t block, int64_t sent, int64_t sent_tail, uint32_t seed) {
    EdenBlock own;
    own.first = (int64_t)blockIdx.x * block;
    own.entries = min64(block, n - own.first);
    own.sent = own.entries == block ? sent : sent_tail;
    own.part = (int64_t)1 << (31 - __clz((uint32_t)own.entries));
    own.number = blockIdx.x;
    own.word = (uint32_t)(own.first / 32);
    own.seed = seed;
    own.positions = hashed(own.number + EDEN_PART_WORDS, seed);
    own.root = eden_root(own.part);
    own.whole = own.part == own.entries;
    return own;
}

// The strides `stride` to `stride` times radix / 2 of a transform; the caller puts a barrier behind it.
template <int radix>
GC_INLINE void butterflies(const Padded& y, int64_t offset, int64_t size, int64_t stride) {
    for (int64_t unit = threadIdx.x; unit < size / radix; unit += THREADS) {
        const int64_t low = unit & (stride - 1), start = offset + (unit - low) * radix + low;
        float v[radix];
        for (int j = 0; j < radix; ++j) v[j] = y.at(start + j * stride);
        for (int s = 1; s < radix; s *= 2)
            for (int j = 0; j < radix; ++j) {
                if (j & s) continue;
                const float a = v[j], b = v[j + s];
                v[j] = a + b;
                v[j + s] = a - b;
            }
        for (int j = 0; j < radix; ++j) y.at(start + j * stride) = v[j];
    }
}

// All threads, behind a barrier; ends with one.
GC_INLINE void hadamard(const Padded& y, int64_t offset, int64_t size) {
    int64_t stride = 1;
    while (stride < size) {
        if (8 * stride <= size) {
            butterflies<8>(y, offset, size, stride);
            stride *= 8;
        } else if (4 * stride <= size) {
            butterflies<4>(y, offset, size, stride);
            stride *= 4;
        } else {
            butterflies<2>(y, offset, size, stride);
            stride *= 2;
        }
        __syncthreads();
    }
}

// Of every entry: times `factor` in the first part, and the sign of the second rotation in the last one. No barrier.
GC_INLINE void between_parts(const Padded& y, const EdenBlock& block, float first_factor, float last_factor) {
    const int64_t last = block.entries - block.part;
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) {
        float value = y.at(i);
        if (i < block.part) value = value * first_factor;
        if (i >= last) {
            const int64_t place = i - last;
            value = value * last_factor;
            value = flipped(value, hashed(block.word + EDEN_TAIL_WORDS + (uint32_t)(place >> 5), block.seed), place);
        }
        y.at(i) = value;
    }
}
GC_INLINE void scale_part(const Padded& y, int64_t offset, int64_t count, float factor) {
    for (int64_t i = threadIdx.x; i < count; i += THREADS) y.at(offset + i) = y.at(offset + i) * factor;
}

// Both begin behind a barrier and end without one; first signs are the caller's.
GC_INLINE void rotate(const Padded& y, const EdenBlock& block) {
    hadamard(y, 0, block.part);
    if (block.whole) return;
    between_parts(y, block, block.root, 1.0f);
    __syncthreads();
    hadamard(y, block.entries - block.part, block.part);
    scale_part(y, block.entries - block.part, block.part, block.root);
}
// Here a thread ends with the entries of which it has the number.
GC_INLINE void rotate_back(const Padded& y, const EdenBlock& block) {
    if (!block.whole) {
        hadamard(y, block.entries - block.part, block.part);
        between_parts(y, block, 1.0f, block.root);
        __syncthreads();
    }
    hadamard(y, 0, block.part);
    if (!block.whole) scale_part(y, 0, block.part, block.root);
}

// The ordered sum of `count` products: a half warp for each 4096 of them. All threads call it; it begins with a barrier.
template <class Product>
GC_INLINE double ordered_sum(const Product& product, int64_t count, double* sums) {
    __syncthreads();
    const int chunk = (int)threadIdx.x / HALF_WARP;
    if (chunk < (SUM_CHUNKS > 2 ? SUM_CHUNKS : 2)) {
        double sum = 0.0;
        const int64_t end = min64(count, (int64_t)(chunk + 1) * TILE);
        for (int64_t k = (int64_t)chunk * TILE + threadIdx.x % HALF_WARP; k < end; k += HALF_WARP) sum += product(k);
        for (int half = HALF_WARP / 2; half > 0; half /= 2) sum += __shfl_down_sync(ALL_LANES, sum, half, HALF_WARP);
        if (threadIdx.x % HALF_WARP == 0) sums[chunk] = sum;
    }
    __syncthreads();
    double total = 0.0;
    for (int number = 0; number < SUM_CHUNKS; ++number) total += sums[number];
    return total;
}

struct Squares {
    Padded y;
    GC_INLINE double operator()(int64_t i) const { return (double)y.at(i) * (double)y.at(i); }
};

}  // namespace
#endif
