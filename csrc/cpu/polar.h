// Polar: the kernels, of the parts in csrc/polar/ (gcompress/compressors/polar/, docs/polar.md).
#ifndef GCOMPRESS_CPU_POLAR_H
#define GCOMPRESS_CPU_POLAR_H

#include "../polar/plan/compress.h"
#include "../polar/plan/decompress.h"

namespace {

void polar_sums(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    polar_sums_of(1, x, n, cols, row_sums, column_sums);
}

int64_t polar_beyond(const float* x, int64_t n, int64_t cols, const float* row_factors, int by_row,
                     const float* column_factors, int by_column, float floor, float slope, float intercept,
                     int64_t capacity, int64_t* places) {
    return polar_places_beyond(x, 0, n, cols, row_factors, by_row != 0, column_factors, by_column != 0, floor, slope,
                               intercept, capacity, places);
}

inline Shares all_rows(const void* layout) {
    const int64_t n = ((const PolarLayout*)layout)->n;
    return {n, n, 1};
}

void polar_energies(const float* x, const void* layout, float* row_buffer, int64_t* totals) {
    polar_class_energies(all_rows(layout), x, (const PolarLayout*)layout, row_buffer, totals);
}

void polar_gather(const float* x, const void* layout, int64_t* cursors, float* row_buffer, int8_t* samples) {
    polar_gather_rows(all_rows(layout), x, (const PolarLayout*)layout, cursors, row_buffer, samples);
}

void polar_scatter(const float* values, const void* layout, int64_t* cursors, float* row_buffer, int add, float* out) {
    if (add)
        polar_scatter_rows<ADD>(all_rows(layout), values, (const PolarLayout*)layout, cursors, row_buffer, out);
    else
        polar_scatter_rows<REPLACE>(all_rows(layout), values, (const PolarLayout*)layout, cursors, row_buffer, out);
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
    PolarTables tables;
    read_polar_tables((const PolarTile*)tiles, count, slots, (const PolarDesign*)designs, &tables);
    encode_tiles(source, count, (const PolarTile*)tiles, slots, &tables, list_size, workspace, 0, words, products);
}

void polar_encode(const int8_t* samples, int64_t count, const void* tiles, const uint8_t* slots, const void* designs,
                  int list_size, uint8_t* workspace, uint8_t* words, int64_t* products) {
    polar_encode_source({samples, 0, 0, 0.0f}, count, tiles, slots, designs, list_size, workspace, words, products);
}

void polar_encode_vector(const float* x, int64_t n, float scale, int64_t count, const void* tiles, const uint8_t* slots,
                         const void* designs, int list_size, uint8_t* workspace, uint8_t* words, int64_t* products) {
    polar_encode_source({0, x, n, scale}, count, tiles, slots, designs, list_size, workspace, words, products);
}

void polar_decode(const uint8_t* words, int64_t count, const void* tiles, const uint8_t* slots, const float* values,
                  int64_t n, int add, uint64_t* workspace, float* out) {
    decode_tiles(words, count, (const PolarTile*)tiles, slots, values, n, add ? (int)ADD : replacing(out, n), workspace,
                 out);
}

void polar_turn(const float* x, int64_t n, uint32_t seed, float* y, double* lengths) {
    polar_turn_blocks(x, n, seed, y, lengths);
}

void polar_turn_scales(const float* y, const float* decoded, int64_t n, const double* lengths, float* scales) {
    polar_turn_scales_of(y, decoded, n, lengths, scales);
}

void polar_turn_back(float* y, int64_t n, uint32_t seed, const float* scales, int add, float* out) {
    if (add)
        polar_turn_blocks_back<ADD>(y, n, seed, scales, out);
    else
        polar_turn_blocks_back<REPLACE>(y, n, seed, scales, out);
}

// 2^64. What is sent of smaller entries is far below the largest float, and so is what is lost of them.
const int32_t SAFE_KEY = (127 + 64) << 23;

// Entries of `fresh`, which were encoded: keep what the payload loses of them. `largest`: their largest magnitude's bits.
inline int polar_keep_lost(int threads, const PlanTables* tables, gc_memory* memory, int32_t largest,
                           const uint8_t* payload, int64_t nbytes, int64_t n, int64_t block, const Room& room) {
    if (largest >= (int32_t)INFINITY_KEY) return GC_OK;  // nothing is kept
    if (polar_decompress_into(threads, tables, payload, nbytes, n, block, SUBTRACT, room, memory->fresh) != GC_OK)
        return GC_BAD_COUNT;
    Finite finite;
    for (int64_t i = 0; largest >= SAFE_KEY && i < n; ++i) finite.look(memory->fresh[i]);
    if (!finite.all()) set_shared(memory->poisoned);
    return GC_OK;
}

int polar_compress(int threads, gc_memory* memory, const void* tables, const float* x, int64_t n, int64_t first,
                   int scales, int flat, double share, int list_size, int rank, int64_t block, int unbiased,
                   uint32_t seed, uint32_t* workspace, int64_t capacity, uint8_t* payload, int64_t nbytes) {
    CompressOptions options = {0, block, false, scales == 2, flat != 0, list_size, rank, share};
    set_matrix(n, first, first > 0, &options);
    // First of all: who calls again with a larger workspace then gives `fresh` for x, and no residual.
    const int32_t largest = memory ? correct_all(shares_of(threads, n, STRETCH), memory, x) : 0;
    if (memory) x = memory->fresh;
    const Room room = room_of(workspace, capacity);
    Compressor compressor = {threads, (const PlanTables*)tables, options, payload, 0, n, nbytes, room};
    compressor.workspace = compressor.room.take<uint8_t>(ENCODER_BYTES);
    if (compressor.room.full()) return GC_BAD_COUNT;
    if (!(unbiased ? compressor.encode_unbiased(x, seed) : compressor.encode(x))) return GC_BAD_COUNT;
    if (!memory) return GC_OK;
    return polar_keep_lost(threads, (const PlanTables*)tables, memory, largest, payload, nbytes, n, block, room);
}

int polar_decompress(int threads, const gc_more* more, const void* tables, const uint8_t* payload, int64_t nbytes,
                     int64_t n, int64_t block, int add, uint32_t* workspace, int64_t capacity, float* out) {
    for (int64_t r = 0; r <= (more ? more->count : 0); ++r) {
        const uint8_t* one = r == 0 ? payload : more->payloads[r - 1];
        const int mode = add || r > 0 ? ADD : REPLACE;
        const int result = polar_decompress_into(threads, (const PlanTables*)tables, one, nbytes, n, block, mode,
                                                 room_of(workspace, capacity), out);
        if (result != GC_OK) return result;
    }
    if (more) multiply(out, n, more->factor);
    return GC_OK;
}

}  // namespace
#endif
