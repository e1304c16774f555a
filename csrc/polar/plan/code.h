// Polar's plan: entries to words and back, once it is settled how bytes are spent: what calls encoder and decoder.
#ifndef GCOMPRESS_POLAR_PLAN_CODE_H
#define GCOMPRESS_POLAR_PLAN_CODE_H

#include "../decoder.h"
#include "samples.h"

namespace {

const int64_t ENCODER_BYTES = (8 * LANES + 25) * MAX_BLOCK, DECODER_WORDS = MAX_LEVELS * MAX_BLOCK;

// Encodes `count` tiles whose samples come one after the other.
inline void encode_tiles(PolarSource source, int64_t count, const PolarTile* tile, const uint8_t* slots,
                         const PolarTables* tables, int list_size, uint8_t* workspace, uint8_t* words,
                         int64_t* products) {
    const PolarWorkspace work = polar_workspace(workspace);
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
        polar_encode_tile(&source, tile + k, slots, tables, list_size, work, words, products);
        memcpy(end, after, sizeof after);
    }
}

inline void decode_tiles(const uint8_t* words, int64_t count, const PolarTile* tile, const uint8_t* slots,
                         const float* values, int64_t n, bool add, uint64_t* workspace, float* out) {
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

// The words of entries, which have `words_bytes` bytes and 8 behind them, and the classes' amplitudes; null: no room.
inline const uint8_t* encode_words(const PlanTables* tables, const float* x, Spending* spending, const float* scales,
                                   int list_size, uint8_t* workspace, Room* room) {
    const CodePlan plan = code_plan(tables, spending, room);
    if (room->full()) return 0;
    uint8_t* words = room->take<uint8_t>(spending->words_bytes() + 8);
    const bool lone = spending->layout.lone();
    int8_t* samples = lone ? 0 : room->take<int8_t>(plan.entries);
    LayoutRuns runs = runs_of(spending->layout, room);
    if (room->full()) return 0;
    PolarTables designs;
    memset(&designs, 0, sizeof designs);
    int64_t products[2 * CLASSES] = {0};
    for (int64_t k = 0; k < spending->class_count; ++k) {
        designs.levels[k] = (const int8_t*)tables->design(spending->classes[k].design).tables;
        designs.points[k] = (const int16_t*)tables->design(spending->classes[k].design).points;
    }
    if (!lone) {
        int8_t slots[CLASSES];
        slot_of_class(spending, slots);
        runs.described.slot = (int64_t)slots;
        runs.described.scale = (int64_t)scales;
        int64_t cursors[CLASSES];
        for (int64_t k = 0; k < spending->class_count; ++k) {
            const int64_t start = plan.starts[k] + spending->classes[k].count;
            const int64_t end = k + 1 < spending->class_count ? plan.starts[k + 1] : plan.entries;
            memset(samples + start, spending->classes[k].levels > 1 ? ERASED : 0, (size_t)(end - start));
            cursors[k] = plan.starts[k];
        }
        polar_gather_rows(x, &runs.described, cursors, runs.row_buffer, samples);
    }
    const PolarSource source = {samples, lone ? x : 0, lone ? spending->layout.numel : 0, lone ? scales[0] : 0.0f};
    encode_tiles(source, spending->tile_count, plan.tiles, plan.slots, &designs, list_size, workspace, words, products);
    set_amplitudes(spending, scales, products);
    return words;
}

// What decoding words needs, all of it there before anything is decoded.
struct WordDecoder {
    const Spending* spending;
    CodePlan plan;
    LayoutRuns runs;
    float *tables, *values;
    uint64_t* workspace;

    bool set(const PlanTables* plan_tables, const Spending* spending_, Room* room) {
        spending = spending_;
        plan = code_plan(plan_tables, spending, room);
        if (room->full()) return false;
        workspace = room->take<uint64_t>(DECODER_WORDS);
        tables = room->take<float>(spending->class_count << MAX_LEVELS);
        values = spending->layout.lone() ? 0 : room->take<float>(plan.entries);
        if (values) runs = runs_of(spending->layout, room);
        if (room->full()) return false;
        value_tables(plan_tables, spending, tables);
        return true;
    }
    void decode(const uint8_t* words, bool add, float* out) {
        if (!values)
            return decode_tiles(words, spending->tile_count, plan.tiles, plan.slots, tables, spending->layout.numel,
                                add, workspace, out);
        decode_tiles(words, spending->tile_count, plan.tiles, plan.slots, tables, plan.entries, false, workspace,
                     values);
        int8_t slots[CLASSES];
        int64_t cursors[CLASSES];
        slot_of_class(spending, slots);
        runs.described.slot = (int64_t)slots;
        memcpy(cursors, plan.starts, sizeof cursors);
        if (add)
            polar_scatter_rows<true>(values, &runs.described, cursors, runs.row_buffer, out);
        else
            polar_scatter_rows<false>(values, &runs.described, cursors, runs.row_buffer, out);
    }
};

}  // namespace
#endif
