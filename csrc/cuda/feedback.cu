// Error feedback behind a fused encoder: if an entry of the corrected gradient was not finite, the memory stays what it
// was before the step (minus zeros if there was none: they add nothing). Moves nothing as a rule, else 8 bytes an entry.
#include "device.cuh"

GC_KERNEL(feedback_restore)(const float* owed, int64_t n, const uint32_t* poisoned, float* fresh) {
    if (!*poisoned) return;
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t i = first; i < min64(n, first + 4); ++i) fresh[i] = owed ? owed[i] : -0.0f;
}
GC_REGISTER(feedback_restore)
