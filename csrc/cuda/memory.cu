// What is no method's own: zeros and copies at any address, the difference that error feedback keeps, and NaN for
// payloads that do not fit. Each moves its operands once.
#include "device.cuh"

GC_KERNEL(fill_zeros)(uint8_t* target, int64_t count) {
    const int64_t first = 16 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (first + 16 <= count && is_aligned(target, 16)) {
        const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        store_four((float*)(target + first), true, zeros);
        return;
    }
    for (int64_t i = first; i < min64(count, first + 16); ++i) target[i] = 0;
}
GC_REGISTER(fill_zeros)

GC_KERNEL(copy_bytes)(const uint8_t* source, int64_t count, uint8_t* target) {
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (first + 4 <= count) {
        store_u32(target + first, load_u32(source + first));
        return;
    }
    for (int64_t i = first; i < count; ++i) target[i] = source[i];
}
GC_REGISTER(copy_bytes)

// A payload whose index cannot be right decodes to NaN: an error would have to wait for the device.
GC_KERNEL(poison)(const uint32_t* wrong, int64_t n, float* out) {
    if (!*wrong) return;
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t i = first; i < min64(n, first + 4); ++i) out[i] = bits_float(QUIET_NAN);
}
GC_REGISTER(poison)

// Error feedback behind an encoder that does not keep it: x + residual - sent.
GC_KERNEL(feedback_residual)(const float* x, const float* residual, const float* sent, int64_t n, uint32_t* poisoned,
                             float* fresh) {
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t i = first; i < min64(n, first + 4); ++i) feedback.keep(i, source.at(i), sent[i]);
}
GC_REGISTER(feedback_residual)

// If an entry of the corrected gradient was not finite, the memory stays what it was before the step (minus zeros if
// there was none: they add nothing). Moves nothing as a rule.
GC_KERNEL(feedback_restore)(const float* residual, int64_t n, const uint32_t* poisoned, float* fresh) {
    if (!*poisoned) return;
    const int64_t first = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    for (int64_t i = first; i < min64(n, first + 4); ++i) fresh[i] = residual ? residual[i] : -0.0f;
}
GC_REGISTER(feedback_restore)
