// Eden: a random rotation of blocks, Lloyd-Max levels, a scale per block. A thread block takes a block of entries, up to
// 16384, to shared memory and rotates it there, three strides of the Hadamard transform at a time, in the order of
// the CPU. Moves 4 bytes read and bits / 8 written an entry; decoding the reverse, or 4 more read to add.
#include "../arith/eden.h"
#include "device.cuh"

namespace {

enum { MOST_LEVELS = 128, SUM_CHUNKS = EDEN_LARGEST_BLOCK / TILE };

struct EdenShared {
    float level[MOST_LEVELS], border[MOST_LEVELS];
    double sums[SUM_CHUNKS];
    uint32_t largest;
};

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
        return (int64_t)((uint64_t)(eden_start(positions, entries) + k * eden_step(positions, entries)) % (uint64_t)entries);
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
GC_INLINE double ordered_sum(const Product& product, int64_t count, EdenShared* shared) {
    __syncthreads();
    const int chunk = (int)threadIdx.x / HALF_WARP;
    if (chunk < (SUM_CHUNKS > 2 ? SUM_CHUNKS : 2)) {
        double sum = 0.0;
        const int64_t end = min64(count, (int64_t)(chunk + 1) * TILE);
        for (int64_t k = (int64_t)chunk * TILE + threadIdx.x % HALF_WARP; k < end; k += HALF_WARP) sum += product(k);
        for (int half = HALF_WARP / 2; half > 0; half /= 2) sum += __shfl_down_sync(ALL_LANES, sum, half, HALF_WARP);
        if (threadIdx.x % HALF_WARP == 0) shared->sums[chunk] = sum;
    }
    __syncthreads();
    double total = 0.0;
    for (int number = 0; number < SUM_CHUNKS; ++number) total += shared->sums[number];
    return total;
}

struct Squares {
    Padded y;
    GC_INLINE double operator()(int64_t i) const { return (double)y.at(i) * (double)y.at(i); }
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
    if (threadIdx.x + 1 < classes) shared->border[threadIdx.x] = eden_border(levels[threadIdx.x], levels[threadIdx.x + 1]);
}

GC_INLINE uint8_t* packed_of(uint8_t* payload, int64_t n, int64_t block, int64_t sent, int64_t bits) {
    return payload + 4 + 4 * ((n + block - 1) / block) + (int64_t)blockIdx.x * (sent / 8 * bits);
}

}  // namespace

GC_KERNEL(eden_encode)(const float* x, const float* owed, int64_t n, int64_t bits, int64_t size, int64_t sent,
                       int64_t sent_tail, int64_t unbiased, int64_t seed, const float* levels, uint8_t* payload) {
    GC_DYNAMIC_SHARED(float, floats);
    GC_SHARED(EdenShared, shared);
    const Source source = {x, owed};
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
        const double power = ordered_sum(squares, block.entries, &shared);
        const float to_units = eden_units(power, block.entries);
        for (int64_t k = threadIdx.x; k < block.sent; k += THREADS) {
            const float value = y.at(block.position(k));
            const uint32_t m = class_of(magnitude_of(value) * to_units, shared.border, classes);
            codes[k] = (uint8_t)(m | float_bits(value) >> 31 << (bits - 1));
        }
        const Chosen dot = {y, &block, codes, shared.level, classes, false};
        const Chosen chosen = {y, &block, codes, shared.level, classes, true};
        const double product = ordered_sum(dot, block.sent, &shared);
        const double square = unbiased ? 0.0 : ordered_sum(chosen, block.sent, &shared);
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
        const float value = flipped(eden_clamped(y.at(i) * scale), hashed(block.word + (uint32_t)(i >> 5), block.seed), i);
        out[block.first + i] = add ? out[block.first + i] + value : value;
    }
}
GC_REGISTER(eden_decode)
