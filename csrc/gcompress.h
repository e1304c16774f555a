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

#define GC_ABI_VERSION 3
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
    // The steps of Polar; the plan between them is Python's (gcompress/compressors/polar/). `layout`, `tiles`
    // and `designs` are the structures PolarLayout, PolarTile and PolarDesign of polar.h,
    // workspaces are as gcompress/compressors/polar/native.py has them.
    void (*polar_sums)(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums);
    void (*polar_energies)(const float* x, const void* layout, float* row_buffer, int64_t* totals);
    void (*polar_gather)(const float* x, const void* layout, int64_t* cursors, float* row_buffer, int8_t* samples);
    void (*polar_encode)(const int8_t* samples, int64_t count, const void* tiles, const uint8_t* slots,
                         const void* designs, int list_size, uint8_t* workspace, uint8_t* words, int64_t* products);
    void (*polar_decode)(const uint8_t* words, int64_t count, const void* tiles, const uint8_t* slots,
                         const float* values, int64_t n, int add, uint64_t* workspace, float* out);
    void (*polar_scatter)(const float* values, const void* layout, int64_t* cursors, float* row_buffer, int add,
                          float* out);
    // `means`: 1 for Sign, 2 for OneBit.
    void (*sign_encode)(const float* x, int64_t n, int64_t bucket, int means, uint8_t* payload);
    void (*sign_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int means, int add, float* out);
    void (*cast_encode)(const float* x, int64_t n, int form, int64_t bucket, uint8_t* payload);
    void (*cast_decode)(const uint8_t* payload, int64_t n, int form, int64_t bucket, int add, float* out);
    void (*bf16_encode)(const float* x, int64_t n, uint8_t* payload);
    void (*bf16_decode)(const uint8_t* payload, int64_t n, int add, float* out);
    void (*randomk_encode)(const float* x, int64_t n, int64_t k, int unbiased, uint32_t seed, uint8_t* payload);
    void (*randomk_decode)(const uint8_t* payload, int64_t n, int64_t k, int add, float* out);
    uint32_t (*largest_key)(const float* x, int64_t n);
    int64_t (*count_keys)(const float* x, int64_t n, uint32_t key);
    void (*keys_encode)(const float* x, int64_t n, int64_t k, uint32_t key, int form, int width, uint8_t* payload);
    // `sections`: pairs of bytes and stride; `workspace`: the bytes' number and 64. Returns the payload's bytes.
    int64_t (*entropy_encode)(const uint8_t* bytes, const int64_t* sections, int64_t section_count,
                              uint8_t* workspace, uint8_t* payload);
    int (*entropy_decode)(const uint8_t* payload, int64_t size, const int64_t* sections, int64_t section_count,
                          uint8_t* bytes);
    void (*shared_scales)(const float* x, int64_t n, int64_t bucket, float* scales);
    void (*shared_encode)(const float* x, int64_t n, int64_t bucket, int limit, int width, int stochastic,
                          uint32_t seed, const float* scales, uint8_t* payload);
    void (*shared_decode)(const uint8_t* payload, int64_t n, int64_t bucket, int limit, int width,
                          const uint8_t* scales, int add, float* out);
    void (*lowrank_decode)(const float* left, const float* right, int64_t rows, int64_t columns, int64_t rank,
                           int64_t n, int add, float* out);
    void (*hybrid_split)(const float* x, int64_t n, float* outliers);
    void (*hybrid_merge)(const float* outliers, int64_t n, float* rest);
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
    int64_t (*polar_beyond)(const float* x, int64_t n, int64_t cols, const float* row_factors, int by_row,
                            const float* column_factors, int by_column, float floor, float slope, float intercept,
                            int64_t capacity, int64_t* places);
    void (*polar_turn)(const float* x, int64_t n, uint32_t seed, float* y, double* lengths);
    void (*polar_turn_scales)(const float* y, const float* decoded, int64_t n, const double* lengths, float* scales);
    void (*polar_turn_back)(float* y, int64_t n, uint32_t seed, const float* scales, int add, float* out);
    void (*polar_encode_vector)(const float* x, int64_t n, float scale, int64_t count, const void* tiles,
                                const uint8_t* slots, const void* designs, int list_size, uint8_t* workspace,
                                uint8_t* words, int64_t* products);
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
