// Calls a kernel with arguments that are 64-bit words: pointers, integers, and floats and doubles as their bits.
#ifndef GCOMPRESS_CALL_H
#define GCOMPRESS_CALL_H

#include <stdint.h>
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

// Call the kernel whose place in gc_signatures is words[0] with the words behind it; 0 where it returns nothing.
inline int64_t call_by_number(const gc_kernels* kernels, const int64_t* words) {
    typedef int64_t (*Caller)(const gc_kernels*, const int64_t*);
    static const Caller callers[] = {
#define GC_KERNEL(result, name, parameters) \
    [](const gc_kernels* of, const int64_t* arguments) { return call(of->name, arguments); },
#include "kernels.def"
#undef GC_KERNEL
    };
    return callers[words[0]](kernels, words + 1);
}

}  // namespace
#endif
