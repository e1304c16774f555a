// What all kernels of the GPU share. Compiled by NVRTC through CuPy (gcompress/backends/gpu/) and, for tests, by a C++
// compiler with tests/emulator/emulator.h in place of a GPU: so no header of CUDA is included, and only what the
// emulator has is used.
//
// Every kernel runs with THREADS threads a block and takes parameters of 8 bytes only: pointers, int64_t, double.
#ifndef GCOMPRESS_CUDA_DEVICE_CUH
#define GCOMPRESS_CUDA_DEVICE_CUH

#include "../arith/base.h"

#if defined(GC_EMULATED)
#include "emulator.h"
#else
#define GC_KERNEL(name) extern "C" __global__ void __launch_bounds__(256) name
#define GC_REGISTER(name)
#define GC_SHARED(Type, name) __shared__ Type name
#define GC_DYNAMIC_SHARED(Type, name)             \
    extern __shared__ float4 gc_dynamic_shared[]; \
    Type* name = (Type*)gc_dynamic_shared
#endif

namespace {

enum { THREADS = 256, WARPS = THREADS / 32, TILE = 4096, HALF_WARP = 16 };
const uint32_t ALL_LANES = 0xffffffffu;

GC_INLINE int lane() { return (int)threadIdx.x & 31; }
GC_INLINE int warp() { return (int)threadIdx.x >> 5; }
GC_INLINE bool is_aligned(const void* p, int bytes) { return ((uint64_t)p & (uint64_t)(bytes - 1)) == 0; }

// Quotients of indices, with 32 bits where they do: 64 take ten times as long.
GC_INLINE int64_t quotient(int64_t a, int64_t b) {
    if ((((uint64_t)a | (uint64_t)b) >> 32) == 0) return (int64_t)((uint32_t)a / (uint32_t)b);
    return a / b;
}

// Little-endian numbers of a payload at any address.
GC_INLINE uint32_t load_u32(const uint8_t* p) {
    if (is_aligned(p, 4)) return *(const uint32_t*)p;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
GC_INLINE float load_float(const uint8_t* p) { return bits_float(load_u32(p)); }
GC_INLINE uint64_t load_u64(const uint8_t* p) { return (uint64_t)load_u32(p) | (uint64_t)load_u32(p + 4) << 32; }
GC_INLINE void store_u32(uint8_t* p, uint32_t value) {
    if (is_aligned(p, 4)) {
        *(uint32_t*)p = value;
        return;
    }
    for (int byte = 0; byte < 4; ++byte) p[byte] = (uint8_t)(value >> (8 * byte));
}
GC_INLINE void store_float(uint8_t* p, float value) { store_u32(p, float_bits(value)); }

// `count` bits, at most 57 (64 from a whole byte on), from bit `first` on; no byte behind them is read.
GC_INLINE uint64_t load_bits(const uint8_t* p, int64_t first, int count) {
    const int shift = (int)(first & 7), bytes = (shift + count + 7) >> 3;
    uint64_t word = 0;
    p += first >> 3;
    for (int byte = 0; byte < bytes; ++byte) word |= (uint64_t)p[byte] << (8 * byte);
    word >>= shift;
    return count == 64 ? word : word & ((1ull << count) - 1);
}

// Four neighbours at once, 128 bits where the address allows; a null `residual` adds nothing.
GC_INLINE void load_four(const float* x, bool aligned, float* four) {
    if (aligned) {
        const float4 all = *(const float4*)x;
        four[0] = all.x, four[1] = all.y, four[2] = all.z, four[3] = all.w;
    } else {
        for (int j = 0; j < 4; ++j) four[j] = x[j];
    }
}
GC_INLINE void store_four(float* x, bool aligned, const float* four) {
    if (aligned) {
        const float4 all = {four[0], four[1], four[2], four[3]};
        *(float4*)x = all;
    } else {
        for (int j = 0; j < 4; ++j) x[j] = four[j];
    }
}

// What an encoder reads: x, or x plus what error feedback owes.
struct Source {
    const float* x;
    const float* residual;
    GC_INLINE float at(int64_t i) const { return residual ? x[i] + residual[i] : x[i]; }
};

// `count` entries from `first` on to shared memory; the caller puts a barrier behind it.
GC_INLINE void load_tile(const Source& source, int64_t first, int count, float* tile) {
    const bool aligned = is_aligned(source.x + first, 16), residual_aligned = is_aligned(source.residual + first, 16);
    for (int i = 4 * (int)threadIdx.x; i + 4 <= count; i += 4 * THREADS) {
        float four[4], residual[4];
        load_four(source.x + first + i, aligned, four);
        if (source.residual) {
            load_four(source.residual + first + i, residual_aligned, residual);
            for (int j = 0; j < 4; ++j) four[j] = four[j] + residual[j];
        }
        store_four(tile + i, true, four);
    }
    for (int i = (count & ~3) + (int)threadIdx.x; i < count; i += THREADS) tile[i] = source.at(first + i);
}

// `count` bytes of shared memory to any address, a word a thread; a word behind them is read. All threads call it
// behind a barrier.
GC_INLINE void store_bytes(const uint32_t* words, int64_t count, uint8_t* target) {
    const uint8_t* bytes = (const uint8_t*)words;
    const int head = (int)min64(count, (int64_t)(-(int64_t)(uint64_t)target & 3));
    const int64_t middle = (count - head) >> 2, tail = head + 4 * middle;
    if ((int)threadIdx.x < head) target[threadIdx.x] = bytes[threadIdx.x];
    uint32_t* whole = (uint32_t*)(target + head);
    for (int64_t i = threadIdx.x; i < middle; i += THREADS)
        whole[i] = head == 0 ? words[i] : words[i] >> (8 * head) | words[i + 1] << (32 - 8 * head);
    if (tail + (int64_t)threadIdx.x < count) target[tail + threadIdx.x] = bytes[tail + threadIdx.x];
}

// Adds up over a block: each thread gets the sum of the threads before it, and all get the total.
struct ScanShared {
    uint32_t of_warp[WARPS];
};
GC_INLINE uint32_t scanned(uint32_t value, ScanShared* shared, uint32_t* total) {
    uint32_t sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t before = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane() >= distance) sum += before;
    }
    __syncthreads();  // nobody reads the last scan's sums any more
    if (lane() == 31) shared->of_warp[warp()] = sum;
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp()) before = all;
        all += shared->of_warp[w];
    }
    *total = all;
    return before + sum - value;
}

// Error feedback: the new residual of an entry, x + residual - sent, in the place of x + residual.
struct Feedback {
    float* fresh;        // null: none is kept
    uint32_t* poisoned;  // set where the sum is not finite: then feedback_restore puts the old memory back
    GC_INLINE void keep(int64_t i, float value, float sent) const {
        const float left = value - sent;
        fresh[i] = left;
        if (!(magnitude_of(left) <= LARGEST)) atomicOr(poisoned, 1u);
    }
};

}  // namespace
#endif
