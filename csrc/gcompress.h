// The C ABI of gcompress's CPU kernels. docs/FORMAT.md specifies every payload.
//
// Nothing here allocates, throws or keeps state; callers own all memory. Threads that a kernel
// starts end before it returns. Sizes are entries unless a name says bytes. Functions that can
// meet bad data return GC_OK or a negative code. Every instruction set and every number of
// threads gives the same bytes.
#ifndef GCOMPRESS_H
#define GCOMPRESS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GC_EXPORT __attribute__((visibility("default")))

enum {
    GC_OK = 0,
    GC_BAD_COUNT = -1,  // the number of kept entries in the index is not k
    GC_BAD_INDEX = -2,  // an index is out of range or not strictly increasing
};

enum { GC_FP16 = 0, GC_FP8 = 1, GC_MXFP4 = 2 };
enum { GC_INDEX_BITMAP = 0, GC_INDEX_FIXED = 1, GC_INDEX_GAPS = 2, GC_INDEX_PLACES = 3 };

// What an encoder remembers (error feedback): it encodes x + residual and writes to `fresh` what the payload loses of it.
typedef struct {
    const float* residual;  // NULL: zeros
    float* fresh;           // may be where `residual` is
    int32_t* poisoned;      // becomes 1 where an entry of `fresh` is not finite
} gc_memory;

enum { GC_MOST_MORE = 63 };

// What a decoder does besides: it adds what these payloads decode to, in order, then multiplies all by `factor`.
typedef struct {
    const uint8_t* const* payloads;
    int64_t count;  // at most GC_MOST_MORE
    float factor;
    int32_t again;  // whether the caller reads the entries again at once, so that they had better stay in the cache
} gc_more;

// The kernels of one instruction set.
typedef struct {
#define GC_KERNEL(result, name, parameters) result(*name) parameters;
#include "kernels.def"
#undef GC_KERNEL
} gc_kernels;

// A line of kernels.def: a field of gc_kernels, as text.
typedef struct {
    const char *result, *name, *parameters;
} gc_signature;

// The fields of gc_kernels in their order, behind the last one a name that is NULL.
GC_EXPORT const gc_signature* gc_signatures(void);
// The kernels of one instruction set: "portable", "neon", "avx2" or "avx512"; an empty name picks
// the best one this processor runs. NULL when it is unknown, not compiled or not runnable.
GC_EXPORT const gc_kernels* gc_select_kernels(const char* isa);
GC_EXPORT const char* gc_best_isa(void);
// Make `count` calls of kernels in turn. Each is `width` words: the kernel's place in gc_signatures, then its arguments, a
// float or double as its bits. Returns the number of the first one whose result is not GC_OK, where the rest is not done,
// or else `count`.
GC_EXPORT int64_t gc_run(const gc_kernels* kernels, const int64_t* calls, int64_t count, int64_t width);

#ifdef __cplusplus
}
#endif
#endif
