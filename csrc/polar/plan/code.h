// Polar's plan: entries to words and back, once it is settled how bytes are spent: what calls encoder and decoder.
#ifndef GCOMPRESS_POLAR_PLAN_CODE_H
#define GCOMPRESS_POLAR_PLAN_CODE_H

#include "../decoder.h"
#include "samples.h"

namespace {

const int64_t ENCODER_BYTES = (8 * LANES + 25) * MAX_BLOCK, DECODER_WORDS = MAX_LEVELS * MAX_BLOCK;

// What lies before a tile.
struct TilePlace {
    int64_t tiles, entries, rows, bytes;
    void pass(const PolarTile& tile) {
        ++tiles;
        entries += tile.lanes * tile.rows;
        rows += tile.rows;
        bytes += polar_tile_bytes(&tile);
    }
};

// Tiles in shares of about as many entries each; `places` has where they begin, and the end.
inline int tile_shares(int threads, int64_t count, const PolarTile* tiles, TilePlace* places) {
    int64_t entries = 0;
    for (int64_t k = 0; k < count; ++k) entries += tiles[k].lanes * tiles[k].rows;
    const int64_t most = min64(min64(threads, MOST_THREADS), min64(count, entries / SHARE_ENTRIES));
    const int shares = most > 1 ? (int)most : 1;
    TilePlace at = {0, 0, 0, 0};
    for (int share = 0; share < shares; ++share) {
        while (at.tiles < count &&
               at.entries + tiles[at.tiles].lanes * tiles[at.tiles].rows / 2 < entries / shares * share)
            at.pass(tiles[at.tiles]);
        places[share] = at;
    }
    while (at.tiles < count) at.pass(tiles[at.tiles]);
    places[shares] = at;
    return shares;
}

const int64_t TOUCHED = 8;  // bytes behind a tile's words while it is encoded

// Encodes `count` tiles whose samples come one after the other. `spare`: null, or room for the words of those tiles from
// which what lies behind all may not be touched.
inline void encode_tiles(PolarSource source, int64_t count, const PolarTile* tile, const uint8_t* slots,
                         const PolarTables* tables, int list_size, uint8_t* workspace, uint8_t* spare, uint8_t* words,
                         int64_t* products) {
    const PolarWorkspace work = polar_workspace(workspace);
    for (int64_t k = 0; k < count; ++k) {
        polar_pass_tile(&source, tile + k, 1);
        slots += tile[k].rows;
        words += polar_tile_bytes(tile + k);
    }
    // The last tile first: of a vector whose magnitudes were just summed, the end is still in the caches. A tile's words
    // touch up to 8 bytes more, which are the next one's.
    uint8_t after[TOUCHED];
    const uint8_t* limit = words;
    for (int64_t k = count - 1; k >= 0; --k) {
        polar_pass_tile(&source, tile + k, -1);
        slots -= tile[k].rows;
        uint8_t* end = words;
        words -= polar_tile_bytes(tile + k);
        if (spare && limit - end < TOUCHED) {
            polar_encode_tile(&source, tile + k, slots, tables, list_size, work, spare, products);
            memcpy(words, spare, (size_t)(end - words));
            continue;
        }
        memcpy(after, end, sizeof after);
        polar_encode_tile(&source, tile + k, slots, tables, list_size, work, words, products);
        memcpy(end, after, sizeof after);
    }
}

// The same by several threads, as far as there is room.
inline void encode_shares(int threads, const PolarSource& source, int64_t count, const PolarTile* tiles,
                          const uint8_t* slots, const PolarTables* tables, int list_size, uint8_t* workspace, Room room,
                          uint8_t* words, int64_t* products) {
    TilePlace places[MOST_THREADS + 1];
    uint8_t *works[MOST_THREADS] = {workspace}, *spares[MOST_THREADS];
    int shares = tile_shares(threads, count, tiles, places);
    for (int share = 0; share + 1 < shares; ++share) {
        int64_t most = 0;
        for (int64_t k = places[share].tiles; k < places[share + 1].tiles; ++k)
            most = max64(most, polar_tile_bytes(tiles + k));
        spares[share] = room.take<uint8_t>(most + TOUCHED);
        works[share + 1] = room.take<uint8_t>(ENCODER_BYTES);
    }
    if (room.full()) {
        shares = 1;
        places[1].tiles = count;
    }
    at_once(shares, [&](int share) {
        const TilePlace &from = places[share], &to = places[share + 1];
        PolarSource mine = source;
        if (mine.samples) mine.samples += from.entries;
        if (mine.x) mine.x += from.entries;
        mine.count -= from.entries;
        int64_t sums[2 * CLASSES] = {0};
        encode_tiles(mine, to.tiles - from.tiles, tiles + from.tiles, slots + from.rows, tables, list_size,
                     works[share], share + 1 < shares ? spares[share] : 0, words + from.bytes, sums);
        for (int k = 0; k < 2 * CLASSES; ++k) add_to_shared(products + k, sums[k]);
    });
}

inline void decode_tiles(const uint8_t* words, int64_t count, const PolarTile* tile, const uint8_t* slots,
                         const float* values, int64_t n, int mode, uint64_t* workspace, float* out) {
    const auto decode = mode == ADD        ? polar_decode_tile<ADD>
                        : mode == SUBTRACT ? polar_decode_tile<SUBTRACT>
                        : mode == STREAM   ? polar_decode_tile<STREAM>
                                           : polar_decode_tile<REPLACE>;
    for (const PolarTile* end = tile + count; tile < end; ++tile) {
        words = decode(words, tile, slots, values, workspace, n, out);
        n -= tile->lanes * tile->rows;
        out += tile->lanes * tile->rows;
        slots += tile->rows;
    }
    finish_streams();
}

// REPLACE, where that had better go past the caches.
inline int replacing(const float* out, int64_t n) {
    return n >= STREAM_BYTES / (int64_t)sizeof(float) && (uintptr_t)out % 64 == 0 ? STREAM : REPLACE;
}

// The words of entries, which have `words_bytes` bytes and 8 behind them, and the classes' amplitudes; null: no room.
inline const uint8_t* encode_words(int threads, const PlanTables* tables, const float* x, Spending* spending,
                                   const float* scales, int list_size, uint8_t* workspace, Room* room) {
    const CodePlan plan = code_plan(tables, spending, room);
    if (room->full()) return 0;
    uint8_t* words = room->take<uint8_t>(spending->words_bytes() + 8);
    const bool lone = spending->layout.lone();
    int8_t* samples = lone ? 0 : room->take<int8_t>(plan.entries);
    LayoutRuns runs = runs_of(threads, spending->layout, room);
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
        polar_gather_rows(runs.shares, x, &runs.described, cursors, runs.row_buffer, samples);
    }
    const PolarSource source = {samples, lone ? x : 0, lone ? spending->layout.numel : 0, lone ? scales[0] : 0.0f};
    encode_shares(threads, source, spending->tile_count, plan.tiles, plan.slots, &designs, list_size, workspace, *room,
                  words, products);
    set_amplitudes(spending, scales, products);
    return words;
}

// What decoding words needs, all of it there before anything is decoded.
struct WordDecoder {
    const Spending* spending;
    CodePlan plan;
    LayoutRuns runs;
    float *tables, *values;
    int shares;
    TilePlace places[MOST_THREADS + 1];
    uint64_t* workspace;  // of each share DECODER_WORDS

    bool set(int threads, const PlanTables* plan_tables, const Spending* spending_, Room* room) {
        spending = spending_;
        plan = code_plan(plan_tables, spending, room);
        if (room->full()) return false;
        shares = tile_shares(threads, spending->tile_count, plan.tiles, places);
        workspace = room->take<uint64_t>(shares * DECODER_WORDS);
        tables = room->take<float>(spending->class_count << MAX_LEVELS);
        values = spending->layout.lone() ? 0 : room->take<float>(plan.entries);
        if (values) runs = runs_of(threads, spending->layout, room);
        if (room->full()) return false;
        value_tables(plan_tables, spending, tables);
        return true;
    }
    void decode_shares(const uint8_t* words, int64_t n, int mode, float* out) {
        if (mode == REPLACE) mode = replacing(out, n);
        at_once(shares, [&](int share) {
            const TilePlace &from = places[share], &to = places[share + 1];
            decode_tiles(words + from.bytes, to.tiles - from.tiles, plan.tiles + from.tiles, plan.slots + from.rows,
                         tables, n - from.entries, mode, workspace + share * DECODER_WORDS, out + from.entries);
        });
    }
    void decode(const uint8_t* words, int mode, float* out) {
        if (!values) return decode_shares(words, spending->layout.numel, mode, out);
        decode_shares(words, plan.entries, REPLACE, values);
        int8_t slots[CLASSES];
        int64_t cursors[CLASSES];
        slot_of_class(spending, slots);
        runs.described.slot = (int64_t)slots;
        memcpy(cursors, plan.starts, sizeof cursors);
        const auto scatter = mode == ADD        ? polar_scatter_rows<ADD>
                             : mode == SUBTRACT ? polar_scatter_rows<SUBTRACT>
                                                : polar_scatter_rows<REPLACE>;
        scatter(runs.shares, values, &runs.described, cursors, runs.row_buffer, out);
    }
};

}  // namespace
#endif
