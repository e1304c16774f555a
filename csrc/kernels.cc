// The table of kernels, compiled once per instruction set (GC_ISA); see simd.h for what that
// forbids. The arithmetic that decides bytes is single-precision add, multiply and divide in a
// fixed order, or integer: -ffp-contract=off keeps it so.
#include "entropy.h"
#include "gcompress.h"
#include "cast.h"
#include "eden.h"
#include "mask.h"
#include "natural.h"
#include "polar.h"
#include "polar_list.h"
#include "polar_turn.h"
#include "qsgd.h"
#include "quantize.h"
#include "randomk.h"
#include "shared.h"
#include "sign.h"
#include "ternary.h"
#include "topk.h"

namespace {

// From run-time to compile-time parameters.
#define GC_FOR_BITS(bits, call)            \
    switch (bits) {                        \
        case 1: { enum { B = 1 }; call; } break; \
        case 2: { enum { B = 2 }; call; } break; \
        case 3: { enum { B = 3 }; call; } break; \
        case 4: { enum { B = 4 }; call; } break; \
        case 5: { enum { B = 5 }; call; } break; \
        case 6: { enum { B = 6 }; call; } break; \
        case 7: { enum { B = 7 }; call; } break; \
        default: { enum { B = 8 }; call; } break; \
    }

void quantize_encode(const float* x, int64_t n, int bits, int64_t bucket, int stochastic, uint32_t seed,
                     uint8_t* payload) {
    GC_FOR_BITS(bits, (quantize_encode_bits<B>(x, n, bucket, stochastic != 0, seed, payload)))
}

void quantize_decode(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (quantize_decode_bits<B, true>(payload, n, bucket, out)))
    else
        GC_FOR_BITS(bits, (quantize_decode_bits<B, false>(payload, n, bucket, out)))
}

void mask_encode(const float* x, int64_t n, int64_t k, int bits, int is_signed, int lloyd, uint32_t* workspace,
                 int64_t capacity, uint8_t* payload) {
    if (is_signed && lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, true>(x, n, k, workspace, capacity, payload)))
    else if (is_signed)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, false>(x, n, k, workspace, capacity, payload)))
    else if (lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, false, true>(x, n, k, workspace, capacity, payload)))
    else
        GC_FOR_BITS(bits, (mask_encode_form<B, false, false>(x, n, k, workspace, capacity, payload)))
}

int mask_decode(const uint8_t* payload, int64_t n, int64_t k, int bits, int is_signed, int add, float* out) {
    int result = GC_OK;
    if (is_signed && add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, true>(payload, n, k, out)))
    else if (is_signed)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, false>(payload, n, k, out)))
    else if (add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, true>(payload, n, k, out)))
    else
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, false>(payload, n, k, out)))
    return result;
}

int topk_decode(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int add, float* out) {
    return add ? topk_decode_form<true>(payload, n, k, form, width, out)
               : topk_decode_form<false>(payload, n, k, form, width, out);
}

void polar_sums(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    polar_sums_of(x, n, cols, row_sums, column_sums);
}

int64_t polar_beyond(const float* x, int64_t n, int64_t cols, const float* row_factors, int by_row,
                     const float* column_factors, int by_column, float floor, float slope, float intercept,
                     int64_t capacity, int64_t* places) {
    return polar_places_beyond(x, n, cols, row_factors, by_row != 0, column_factors, by_column != 0, floor, slope,
                               intercept, capacity, places);
}

void polar_turn(const float* x, int64_t n, uint32_t seed, float* y, double* lengths) {
    polar_turn_blocks(x, n, seed, y, lengths);
}

void polar_turn_scales(const float* y, const float* decoded, int64_t n, const double* lengths, float* scales) {
    polar_turn_scales_of(y, decoded, n, lengths, scales);
}

void polar_turn_back(float* y, int64_t n, uint32_t seed, const float* scales, int add, float* out) {
    if (add)
        polar_turn_blocks_back<true>(y, n, seed, scales, out);
    else
        polar_turn_blocks_back<false>(y, n, seed, scales, out);
}

void polar_energies(const float* x, const void* layout, float* row_buffer, int64_t* totals) {
    polar_class_energies(x, (const PolarLayout*)layout, row_buffer, totals);
}

void polar_gather(const float* x, const void* layout, int64_t* cursors, float* row_buffer, int8_t* samples) {
    polar_gather_rows(x, (const PolarLayout*)layout, cursors, row_buffer, samples);
}

inline void read_polar_tables(const PolarTile* tile, int64_t count, const uint8_t* slots, const PolarDesign* designs,
                              PolarTables* tables) {
    memset(tables, 0, sizeof *tables);
    int64_t rows = 0;
    for (int64_t k = 0; k < count; ++k) rows += tile[k].rows;
    for (int64_t i = 0; i < rows; ++i) {
        if (slots[i] == PADDING_ROW) continue;
        tables->levels[slots[i]] = (const int8_t*)designs[slots[i]].tables;
        tables->points[slots[i]] = (const int16_t*)designs[slots[i]].points;
    }
}

inline void polar_encode_source(PolarSource source, int64_t count, const void* tiles, const uint8_t* slots,
                                const void* designs, int list_size, uint8_t* workspace, uint8_t* words,
                                int64_t* products) {
    const PolarWorkspace work = polar_workspace(workspace);
    const PolarTile* tile = (const PolarTile*)tiles;
    PolarTables tables;
    read_polar_tables(tile, count, slots, (const PolarDesign*)designs, &tables);
    for (int64_t k = 0; k < count; ++k) {
        polar_pass_tile(&source, tile + k, 1);
        slots += tile[k].rows;
        words += polar_tile_bytes(tile + k);
    }
    // The last tile first: of a vector whose magnitudes were just summed, the end is still in the caches. A tile's words
    // touch up to 8 bytes more, which are the next one's.
    uint8_t after[8];
    for (int64_t k = count - 1; k >= 0; --k) {
        polar_pass_tile(&source, tile + k, -1);
        slots -= tile[k].rows;
        memcpy(after, words, sizeof after);
        uint8_t* end = words;
        words -= polar_tile_bytes(tile + k);
        polar_encode_tile(&source, tile + k, slots, &tables, list_size, work, words, products);
        memcpy(end, after, sizeof after);
    }
}

void polar_encode(const int8_t* samples, int64_t count, const void* tiles, const uint8_t* slots, const void* designs,
                  int list_size, uint8_t* workspace, uint8_t* words, int64_t* products) {
    polar_encode_source({samples, 0, 0, 0.0f}, count, tiles, slots, designs, list_size, workspace, words, products);
}

void polar_encode_vector(const float* x, int64_t n, float scale, int64_t count, const void* tiles,
                         const uint8_t* slots, const void* designs, int list_size, uint8_t* workspace,
                         uint8_t* words, int64_t* products) {
    polar_encode_source({0, x, n, scale}, count, tiles, slots, designs, list_size, workspace, words, products);
}

void polar_decode(const uint8_t* words, int64_t count, const void* tiles, const uint8_t* slots, const float* values,
                  int64_t n, int add, uint64_t* workspace, float* out) {
    const PolarTile* tile = (const PolarTile*)tiles;
    const bool stream = n >= STREAM_BYTES / (int64_t)sizeof(float) && (uintptr_t)out % 64 == 0;
    const auto decode = add ? polar_decode_tile<ADD> : stream ? polar_decode_tile<STREAM> : polar_decode_tile<REPLACE>;
    for (const PolarTile* end = tile + count; tile < end; ++tile) {
        words = decode(words, tile, slots, values, workspace, n, out);
        n -= tile->lanes * tile->rows;
        out += tile->lanes * tile->rows;
        slots += tile->rows;
    }
    finish_streams();
}

void polar_scatter(const float* values, const void* layout, int64_t* cursors, float* row_buffer, int add, float* out) {
    if (add)
        polar_scatter_rows<true>(values, (const PolarLayout*)layout, cursors, row_buffer, out);
    else
        polar_scatter_rows<false>(values, (const PolarLayout*)layout, cursors, row_buffer, out);
}

void eden_encode(const float* x, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail, int unbiased,
                 uint32_t seed, const float* levels, uint8_t* payload) {
    GC_FOR_BITS(bits, (eden_encode_bits<B>(x, n, block, sent, sent_tail, unbiased != 0, seed, levels, payload)))
}

void eden_decode(const uint8_t* payload, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail,
                 const float* levels, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (eden_decode_bits<B, true>(payload, n, block, sent, sent_tail, levels, out)))
    else
        GC_FOR_BITS(bits, (eden_decode_bits<B, false>(payload, n, block, sent, sent_tail, levels, out)))
}

void qsgd_encode(const float* x, int64_t n, int bits, int64_t bucket, int largest_norm, uint32_t seed,
                 uint8_t* payload) {
    GC_FOR_BITS(bits, (qsgd_encode_bits<B>(x, n, bucket, largest_norm != 0, seed, payload)))
}

void qsgd_decode(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (qsgd_decode_bits<B, true>(payload, n, bucket, out)))
    else
        GC_FOR_BITS(bits, (qsgd_decode_bits<B, false>(payload, n, bucket, out)))
}

}  // namespace

#define GC_JOIN_(a, b) a##b
#define GC_JOIN(a, b) GC_JOIN_(a, b)

extern "C" {
extern const gc_kernels GC_JOIN(gc_kernels_, GC_ISA);
const gc_kernels GC_JOIN(gc_kernels_, GC_ISA) = {quantize_encode, quantize_decode, mask_encode,
                                                  mask_decode,     topk_encode,     topk_decode,
                                                  polar_sums,      polar_energies,  polar_gather,
                                                  polar_encode,    polar_decode,    polar_scatter,
                                                  sign_encode,     sign_decode,     cast_encode,
                                                  cast_decode,     bf16_encode,     bf16_decode,
                                                  randomk_encode,  randomk_decode,
                                                  largest_key,     count_keys,      keys_encode,
                                                  entropy_encode,  entropy_decode,
                                                  shared_scales,   shared_encode,   shared_decode,
                                                  lowrank_decode,  hybrid_split,    hybrid_merge,
                                                  eden_encode,     eden_decode,     qsgd_encode,
                                                  qsgd_decode,     ternary_encode,  ternary_decode,
                                                  natural_encode,  natural_decode,  polar_beyond,
                                                  polar_turn,      polar_turn_scales,
                                                  polar_turn_back, polar_encode_vector};
}
