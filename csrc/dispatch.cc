// Chooses at run time among the copies of kernels.cc that were compiled per instruction set, and calls their kernels one
// after the other.
#include <string.h>

#include <type_traits>
#include <utility>

#include "gcompress.h"

namespace {

template <class T>
T argument(int64_t word) {
    if constexpr (std::is_pointer<T>::value) {
        return reinterpret_cast<T>(word);
    } else if constexpr (std::is_floating_point<T>::value) {
        const typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type bits = word;
        T value;
        memcpy(&value, &bits, sizeof value);
        return value;
    } else {
        return (T)word;
    }
}

template <class Result, class... Parameters, size_t... place>
int64_t call(Result (*kernel)(Parameters...), const int64_t* words, std::index_sequence<place...>) {
    if constexpr (std::is_void<Result>::value) {
        kernel(argument<Parameters>(words[place])...);
        return GC_OK;
    } else {
        return (int64_t)kernel(argument<Parameters>(words[place])...);
    }
}

template <class Result, class... Parameters>
int64_t call(Result (*kernel)(Parameters...), const int64_t* words) {
    return call(kernel, words, std::index_sequence_for<Parameters...>());
}

}  // namespace

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

int64_t gc_run(const gc_kernels* kernels, const int64_t* calls, int64_t count, int64_t width) {
    typedef int64_t (*Caller)(const gc_kernels*, const int64_t*);
    static const Caller callers[] = {
#define GC_KERNEL(result, name, parameters) \
    [](const gc_kernels* of, const int64_t* words) { return call(of->name, words); },
#include "kernels.def"
#undef GC_KERNEL
    };
    for (int64_t i = 0; i < count; ++i, calls += width)
        if (callers[calls[0]](kernels, calls + 1) != GC_OK) return i;
    return count;
}
}
