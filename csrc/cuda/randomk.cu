// RandomK: one entry of each of k runs, drawn by a seed. Encoding reads 4 bytes an entry, since what is not finite must
// be found, and k of them again; decoding writes 4 bytes of zeros an entry (not when it adds) and moves 8 k.
#include "../arith/randomk.h"
#include "device.cuh"

namespace {

// Runs are cut at multiples of n / k, rounded down; both are below 2^31.
GC_INLINE int64_t run_start(int64_t run, int64_t n, int64_t k) { return run * n / k; }

}  // namespace

GC_KERNEL(find_poison)(const float* x, int64_t n, uint32_t* poisoned) {
    const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    bool finite = true;
    if (i + 4 <= n) {
        float four[4];
        load_four(x + i, is_aligned(x, 16), four);
        for (int j = 0; j < 4; ++j) finite &= key_of<true>(four[j]) < INFINITY_KEY;
    } else {
        for (int64_t j = i; j < n; ++j) finite &= key_of<true>(x[j]) < INFINITY_KEY;
    }
    if (!finite) atomicOr(poisoned, 1u);
}
GC_REGISTER(find_poison)

GC_KERNEL(randomk_encode)(const float* x, int64_t n, int64_t k, int64_t unbiased, int64_t seed,
                          const uint32_t* poisoned, uint8_t* payload) {
    const int64_t run = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (run >= k) return;
    if (run == 0) store_u32(payload, (uint32_t)seed);
    const int64_t first = run_start(run, n, k), length = run_start(run + 1, n, k) - first;
    const float value = x[drawn_entry(run, first, length, (uint32_t)seed)];
    store_float(payload + 4 + 4 * run, *poisoned ? bits_float(QUIET_NAN) : drawn_value(value, length, unbiased != 0));
}
GC_REGISTER(randomk_encode)

GC_KERNEL(randomk_decode)(const uint8_t* payload, int64_t n, int64_t k, int64_t add, float* out) {
    const int64_t run = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (run >= k) return;
    const int64_t first = run_start(run, n, k), length = run_start(run + 1, n, k) - first;
    float* target = out + drawn_entry(run, first, length, load_u32(payload));
    const float value = load_float(payload + 4 + 4 * run);
    *target = add ? *target + value : value;
}
GC_REGISTER(randomk_decode)
