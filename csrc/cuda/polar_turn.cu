// Polar, unbiased: blocks of 16384 entries turned at random as Eden turns them, and turned back. Turning reads 4 bytes an
// entry and writes 4; scales read 8; turning back reads 4 and writes 4, or reads 4 more to add.
#include "../arith/polar_turn.h"
#include "eden.cuh"

namespace {

struct TurnShared {
    double sums[SUM_CHUNKS];
    uint32_t largest;
};
struct Products {
    const float *one, *other;
    GC_INLINE double operator()(int64_t i) const { return (double)one[i] * (double)other[i]; }
};

GC_INLINE EdenBlock turn_block(int64_t n, uint32_t seed) {
    return eden_block(n, EDEN_LARGEST_BLOCK, EDEN_LARGEST_BLOCK, 0, seed);
}
GC_INLINE float turn_flipped(float value, const EdenBlock& block, int64_t i) {
    return flipped(value, hashed(block.word + (uint32_t)(i >> 5), block.seed), i);
}

}  // namespace

// Turned entries of mean square 1, and by what each block is multiplied when it is turned back; 0 for a block of zeros.
GC_KERNEL(polar_turn)(const float* x, int64_t n, int64_t seed, float* turned, double* lengths) {
    GC_DYNAMIC_SHARED(float, floats);
    GC_SHARED(TurnShared, shared);
    const Padded y = {floats};
    const EdenBlock block = turn_block(n, (uint32_t)seed);
    if (threadIdx.x == 0) shared.largest = 0;
    __syncthreads();
    uint32_t largest = 0;
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) {
        const float value = x[block.first + i];
        y.at(i) = value;
        largest = key_of<true>(value) > largest ? key_of<true>(value) : largest;
    }
    atomicMax(&shared.largest, largest);
    __syncthreads();
    const int exponent = (int)(shared.largest >> 23);
    float unit = 0.0f;
    double length = 0.0;
    if (exponent > 0) {
        const float factor = bits_float((uint32_t)(255 - exponent) << 23);
        for (int64_t i = threadIdx.x; i < block.entries; i += THREADS)
            y.at(i) = turn_flipped(y.at(i) * factor, block, i);
        __syncthreads();
        rotate(y, block);
        const Squares squares = {y};
        unit = turn_unit(ordered_sum(squares, block.entries, shared.sums), block.entries);
        length = turn_length(exponent, block.whole, block.entries, unit);
    }
    if (threadIdx.x == 0) lengths[blockIdx.x] = length;
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS)
        turned[block.first + i] = exponent > 0 ? y.at(i) * unit : 0.0f;
}
GC_REGISTER(polar_turn)

// The scales that make decoded blocks unbiased.
GC_KERNEL(polar_turn_scales)(const float* turned, const float* decoded, int64_t n, const double* lengths,
                             float* scales) {
    GC_SHARED(TurnShared, shared);
    const EdenBlock block = turn_block(n, 0);
    const Products squares = {turned + block.first, turned + block.first};
    const Products products = {turned + block.first, decoded + block.first};
    const double power = ordered_sum(squares, block.entries, shared.sums);
    const double dot = ordered_sum(products, block.entries, shared.sums);
    if (threadIdx.x == 0) scales[blockIdx.x] = turn_scale(lengths[blockIdx.x], power, dot);
}
GC_REGISTER(polar_turn_scales)

GC_KERNEL(polar_turn_back)(const float* decoded, int64_t n, int64_t seed, const float* scales, int64_t add,
                           float* out) {
    GC_DYNAMIC_SHARED(float, floats);
    const Padded y = {floats};
    const EdenBlock block = turn_block(n, (uint32_t)seed);
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) y.at(i) = decoded[block.first + i];
    __syncthreads();
    rotate_back(y, block);
    for (int64_t i = threadIdx.x; i < block.entries; i += THREADS) {
        const float value = turn_flipped(saturated(y.at(i) * scales[blockIdx.x]), block, i);
        out[block.first + i] = add ? out[block.first + i] + value : value;
    }
}
GC_REGISTER(polar_turn_back)
