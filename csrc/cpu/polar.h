// Polar: the kernels, of the parts in csrc/polar/ (gcompress/compressors/polar/, docs/polar.md).
#ifndef GCOMPRESS_CPU_POLAR_H
#define GCOMPRESS_CPU_POLAR_H

#include "../polar/decoder.h"
#include "../polar/scan.h"
#include "../polar/tile.h"
#include "../polar/turn.h"

namespace {

void polar_sums(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    polar_sums_of(x, n, cols, row_sums, column_sums);
}

int64_t polar_beyond(const float* x, int64_t n, int64_t cols, const float* row_factors, int by_row,
                     const float* column_factors, int by_column, float floor, float slope, float intercept,
                     int64_t capacity, int64_t* places) {
    return polar_places_beyond(x, n, cols, row_factors, by_row != 0, column_factors, by_column != 0, floor, slope,
                               intercept, capacity, places);
}

void polar_energies(const float* x, const void* layout, float* row_buffer, int64_t* totals) {
    polar_class_energies(x, (const PolarLayout*)layout, row_buffer, totals);
}

void polar_gather(const float* x, const void* layout, int64_t* cursors, float* row_buffer, int8_t* samples) {
    polar_gather_rows(x, (const PolarLayout*)layout, cursors, row_buffer, samples);
}

void polar_scatter(const float* values, const void* layout, int64_t* cursors, float* row_buffer, int add, float* out) {
    if (add)
        polar_scatter_rows<true>(values, (const PolarLayout*)layout, cursors, row_buffer, out);
    else
        polar_scatter_rows<false>(values, (const PolarLayout*)layout, cursors, row_buffer, out);
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

void polar_encode_vector(const float* x, int64_t n, float scale, int64_t count, const void* tiles, const uint8_t* slots,
                         const void* designs, int list_size, uint8_t* workspace, uint8_t* words, int64_t* products) {
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

}  // namespace
#endif
