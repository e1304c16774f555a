// Chooses at run time among the copies of kernels.cc that were compiled per instruction set, and calls their kernels one
// after the other.
#include "call.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

extern "C" {
extern const gc_kernels gc_kernels_portable;
#if defined(__x86_64__)
// Weak: a build may leave them out, and then they are at no address.
extern const gc_kernels gc_kernels_avx2 __attribute__((weak));
extern const gc_kernels gc_kernels_avx512 __attribute__((weak));
#elif defined(__aarch64__)
extern const gc_kernels gc_kernels_neon;
#endif

const gc_signature* gc_signatures(void) {
    static const gc_signature signatures[] = {
#define GC_KERNEL(result, name, parameters) {#result, #name, #parameters},
#include "kernels.def"
#undef GC_KERNEL
        {0, 0, 0},
    };
    return signatures;
}

#if defined(__x86_64__)
static int runs_f16c(void) {  // which clang before 19 cannot be asked for by name
    unsigned int a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static int runs_avx2(void) {
    return &gc_kernels_avx2 && __builtin_cpu_supports("avx2") && runs_f16c() && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
}

static int runs_avx512(void) {
    return &gc_kernels_avx512 && runs_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
#endif

const char* gc_best_isa(void) {
#if defined(__x86_64__)
    if (runs_avx512()) return "avx512";
    if (runs_avx2()) return "avx2";
#elif defined(__aarch64__)
    return "neon";  // every such processor has it
#endif
    return "portable";
}

const gc_kernels* gc_select_kernels(const char* isa) {
    if (isa[0] == 0) isa = gc_best_isa();
#if defined(__x86_64__)
    if (strcmp(isa, "avx2") == 0 && runs_avx2()) return &gc_kernels_avx2;
    if (strcmp(isa, "avx512") == 0 && runs_avx512()) return &gc_kernels_avx512;
#elif defined(__aarch64__)
    if (strcmp(isa, "neon") == 0) return &gc_kernels_neon;
#endif
    return strcmp(isa, "portable") == 0 ? &gc_kernels_portable : 0;
}

int64_t gc_run(const gc_kernels* kernels, const int64_t* calls, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i, calls += width)
        if (call_by_number(kernels, calls) != GC_OK) return i;
    return count;
}
}
