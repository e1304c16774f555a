// Chooses at run time among the copies of kernels.cc that were compiled per instruction set.
#include <string.h>

#include "gcompress.h"

extern "C" {
extern const gc_kernels gc_kernels_portable;
#ifdef GC_X86
extern const gc_kernels gc_kernels_avx2;
extern const gc_kernels gc_kernels_avx512;
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

static int runs_avx2(void) {  // every processor with AVX2 has F16C, which is older
#ifdef GC_X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}

static int runs_avx512(void) {
#ifdef GC_X86
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

const char* gc_best_isa(void) {
    if (runs_avx512()) return "avx512";
    if (runs_avx2()) return "avx2";
    return "portable";
}

const gc_kernels* gc_select_kernels(const char* isa) {
    if (isa[0] == 0) isa = gc_best_isa();
    if (strcmp(isa, "portable") == 0) return &gc_kernels_portable;
#ifdef GC_X86
    if (strcmp(isa, "avx2") == 0 && runs_avx2()) return &gc_kernels_avx2;
    if (strcmp(isa, "avx512") == 0 && runs_avx512()) return &gc_kernels_avx512;
#endif
    return 0;
}
}
