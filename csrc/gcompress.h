// The C ABI of gcompress's CPU kernels. docs/FORMAT.md specifies every payload.
//
// Nothing here allocates, throws or keeps state; callers own all memory. Sizes are
// entries unless a name says bytes. Functions that can meet bad data return GC_OK or a
// negative code. Every instruction set gives the same bytes.
#ifndef GCOMPRESS_H
#define GCOMPRESS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GC_ABI_VERSION 1
#define GC_EXPORT __attribute__((visibility("default")))

enum {
    GC_OK = 0,
    GC_BAD_COUNT = -1,  // the number of kept entries in the index is not k
    GC_BAD_INDEX = -2,  // an index is out of range or not strictly increasing
};

enum { GC_FP16 = 0, GC_FP8 = 1, GC_MXFP4 = 2 };
enum { GC_INDEX_BITMAP = 0, GC_INDEX_FIXED = 1, GC_INDEX_GAPS = 2 };

// Everything that is compiled once per instruction set. `add` accumulates into `out`
// (out += decoded) instead of overwriting it.
typedef struct {
    void (*quantize_encode)(const float* x, int64_t n, int bits, int64_t bucket, int stochastic, uint32_t seed,
                            uint8_t* payload);
    void (*quantize_decode)(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out);
    // `workspace` holds `capacity` words; any capacity gives the same bytes, 2k + 4096 the speed.
    void (*mask_encode)(const float* x, int64_t n, int64_t k, int bits, int is_signed, int lloyd,
                        uint32_t* workspace, int64_t capacity, uint8_t* payload);
    int (*mask_decode)(const uint8_t* payload, int64_t n, int64_t k, int bits, int is_signed, int add, float* out);
    void (*topk_encode)(const float* x, int64_t n, int64_t k, int form, int width, uint32_t* workspace,
                        int64_t capacity, uint8_t* payload);
    int (*topk_decode)(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int add, float* out);
    // `means`: 1 for Sign, 2 for OneBit.
    void (*sign_encode)(const float* x, int64_t n, int64_t bucket, int means, uint8_t* payload);
    void (*sign_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int means, int add, float* out);
    void (*cast_encode)(const float* x, int64_t n, int form, int64_t bucket, uint8_t* payload);
    void (*cast_decode)(const uint8_t* payload, int64_t n, int form, int64_t bucket, int add, float* out);
    void (*bf16_encode)(const float* x, int64_t n, uint8_t* payload);
    void (*bf16_decode)(const uint8_t* payload, int64_t n, int add, float* out);
    // `sent`, `sent_tail`: entries coded of a whole block and of the last, shorter one; `levels`: the
    // 2^(bits - 1) positive levels.
    void (*eden_encode)(const float* x, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail,
                        int unbiased, uint32_t seed, const float* levels, uint8_t* payload);
    void (*eden_decode)(const uint8_t* payload, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail,
                        const float* levels, int add, float* out);
    void (*qsgd_encode)(const float* x, int64_t n, int bits, int64_t bucket, int largest_norm, uint32_t seed,
                        uint8_t* payload);
    void (*qsgd_decode)(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out);
    void (*ternary_encode)(const float* x, int64_t n, int64_t bucket, int stochastic, double clip, uint32_t seed,
                           uint8_t* payload);
    void (*ternary_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int add, float* out);
    void (*natural_encode)(const float* x, int64_t n, uint32_t seed, uint8_t* payload);
    void (*natural_decode)(const uint8_t* payload, int64_t n, int add, float* out);
} gc_kernels;

GC_EXPORT int gc_abi_version(void);
// The kernels of one instruction set: "portable", "avx2" or "avx512"; an empty name picks
// the best one this processor runs. NULL when it is unknown, not compiled or not runnable.
GC_EXPORT const gc_kernels* gc_select_kernels(const char* isa);
GC_EXPORT const char* gc_best_isa(void);

#ifdef __cplusplus
}
#endif
#endif
