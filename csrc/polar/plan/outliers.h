// Polar's plan: entries that are sent apart, their places, signs and magnitudes in few bits
// (gcompress/compressors/polar/outliers.py).
#ifndef GCOMPRESS_POLAR_PLAN_OUTLIERS_H
#define GCOMPRESS_POLAR_PLAN_OUTLIERS_H

#include "layout.h"
#include "streams.h"

namespace {

const int64_t OUTLIERS_BYTES = 10, LAYER_BYTES = 4;
const int COUNT_BITS = 27, MOST_LAYERS = 24;

// The limit of an entry is max(floor, slope r c + intercept) with the factors r, c of its row and column.
struct Limits {
    float floor, slope;
    float intercept() const { return 0.4f * floor; }
};

// What codes stand for in a limit; of a single row or column, or without codes, that is `lone`.
struct LimitFactors {
    const Layout layout;
    float table[CODES + 1];
    LimitFactors(const PlanTables* tables, const Layout& layout_) : layout(layout_) {
        table[0] = 0.0f;
        for (int k = 1; k <= CODES; ++k) table[k] = (float)tables->power(16 * k);
    }
    float row(int64_t place) const {
        return table[layout.row_codes ? layout.row_codes[place / layout.columns] : NO_CODE];
    }
    float column(int64_t place) const {
        return table[layout.column_codes ? layout.column_codes[place % layout.columns] : NO_CODE];
    }
    float limit(const Limits& limits, int64_t place) const {
        return outlier_limit(row(place) * limits.slope, column(place), limits.intercept(), limits.floor);
    }
    bool by_row() const { return layout.row_codes && layout.rows() > 1; }
    bool by_column() const { return layout.column_codes && layout.columns > 1; }
    // Per row and column, if they differ.
    void expand(float* rows, float* columns) const {
        rows[0] = table[layout.row_codes ? layout.row_codes[0] : NO_CODE];
        columns[0] = table[layout.column_codes ? layout.column_codes[0] : NO_CODE];
        for (int64_t i = 1; layout.row_codes && i < layout.rows(); ++i) rows[i] = table[layout.row_codes[i]];
        for (int64_t i = 1; layout.column_codes && i < layout.columns; ++i) columns[i] = table[layout.column_codes[i]];
    }
};

// `count` places in rising order, whole levels from 1 on: |x| / limit, cut off; `offset`, in 1/256 limit: where in their
// step entries lie on average.
struct Outliers {
    Limits limits;
    int offset;
    int64_t count, *places, *members;  // members: room for the packing
    int32_t* levels;
    uint8_t *negative, *depth;

    static Outliers with_room(int64_t count, Room* room) {
        Outliers found = {{0.0f, 0.0f}, 0, count, 0, 0, 0, 0, 0};
        found.places = room->take<int64_t>(count);
        found.members = room->take<int64_t>(count);
        found.levels = room->take<int32_t>(count);
        found.negative = room->take<uint8_t>(count);
        found.depth = room->take<uint8_t>(count);
        return found;
    }
    // What of an outlier is sent here.
    float coarse(const LimitFactors& factors, int64_t k) const {
        float size = ((float)levels[k] + (float)(offset / 256.0)) * factors.limit(limits, places[k]);
        size = size > LARGEST ? LARGEST : size;
        return negative[k] ? -size : size;
    }
};

// Levels, signs and the offset of the entries at `found`'s places.
inline void split_outliers(const float* values, const LimitFactors& factors, Outliers* found) {
    const float most = (float)((1 << MOST_LAYERS) - 1);
    int64_t parts = 0;
    for (int64_t k = 0; k < found->count; ++k) {
        const float entry = values[found->places[k]];
        const float ratio = magnitude_of(entry) / factors.limit(found->limits, found->places[k]);
        found->levels[k] = (int32_t)(ratio > most ? most : ratio);
        const float part = ratio - (float)found->levels[k];
        parts += (int64_t)((part > 1.0f ? 1.0f : part) * 256);
        found->negative[k] = entry < 0;
    }
    found->offset = (int)min64(parts / max64(found->count, 1), 255);
}

// The low bits of gaps that take the fewest bytes, and how many all bits are.
inline int gap_width(const int64_t* places, int64_t count, int64_t universe, int64_t* bits) {
    const int around = (int)max64(bit_length(universe / count) - 1, 0);
    int best = -1;
    for (int width = around > 0 ? around - 1 : 0; width < (around + 2 < 31 ? around + 2 : 31); ++width) {
        int64_t size = count * width, before = -1;
        for (int64_t k = 0; k < count; ++k) {
            size += (places[k] - before - 1) >> width;
            before = places[k];
        }
        if (best < 0 || size < *bits) best = width, *bits = size;
    }
    *bits += count;  // the ones of the unary part
    return best;
}

// Writes the section of the payload that holds them, of at most `most` bytes, and returns its size; -1 if it were larger.
inline int64_t pack_outliers(const Outliers* found, int64_t numel, uint8_t* section, int64_t most) {
    int layers = 0, depths = 0;
    for (int64_t k = 0; k < found->count; ++k) {
        const int depth = bit_length(found->levels[k]);  // the layers that it is in
        found->depth[k] = (uint8_t)depth;
        depths = depth > depths ? depth : depths;
    }
    layers = depths;
    int64_t size = OUTLIERS_BYTES + LAYER_BYTES * layers;
    if (size > most) return -1;
    memcpy(section, &found->limits, 8);
    section[8] = (uint8_t)found->offset;
    section[9] = (uint8_t)layers;
    uint8_t* at = section + size;
    int64_t universe = numel;
    for (int layer = 0; layer < layers; ++layer) {
        int64_t members = 0, here = 0, bits = 0;
        for (int64_t k = 0; k < found->count; ++k) {  // of the candidates, which are in the layer before
            if (layer > 0 && found->depth[k] < layer) continue;
            if (found->depth[k] > layer) found->members[members++] = layer ? here : found->places[k];
            ++here;
        }
        const int width = gap_width(found->members, members, universe, &bits);
        const int64_t low = packed_bytes(members, width), unary = packed_bytes(bits - members * width, 1);
        size += low + unary;
        if (size > most) return -1;
        put_number<uint32_t>(section + OUTLIERS_BYTES + LAYER_BYTES * layer,
                             (uint32_t)members | (uint32_t)width << COUNT_BITS);
        StreamWriter lows(at), highs(at + low);
        int64_t before = -1;
        for (int64_t k = 0; k < members; ++k) {
            const int64_t gap = found->members[k] - before - 1;
            lows.put((uint64_t)gap & (((uint64_t)1 << width) - 1), width);
            highs.put_unary(gap >> width);
            before = found->members[k];
            if (k + 1 == members) lows.finish();
        }
        at = highs.finish();
        universe = members;
    }
    for (int part = 0; part < layers; ++part) {  // signs, then mantissas of the layers behind the first
        int64_t members = 0;
        for (int64_t k = 0; k < found->count; ++k) members += part == 0 || found->depth[k] == part + 1;
        size += packed_bytes(members, part ? part : 1);
        if (size > most) return -1;
        StreamWriter writer(at);
        for (int64_t k = 0; k < found->count; ++k) {
            if (part == 0)
                writer.put(found->negative[k], 1);
            else if (found->depth[k] == part + 1)
                writer.put((uint64_t)found->levels[k] & (((uint64_t)1 << part) - 1), part);
        }
        at = writer.finish();
    }
    return size;
}

// Reads the section at `at`; returns where it ends, or null if it contradicts itself or there is no room.
inline const uint8_t* unpack_outliers(const uint8_t* at, const uint8_t* end, int64_t numel, Outliers* found,
                                      Room* room) {
    if (end - at < OUTLIERS_BYTES) return 0;
    Limits limits;
    memcpy(&limits, at, sizeof limits);
    const int offset = at[8], layers = at[9];
    const uint8_t* headers = at + OUTLIERS_BYTES;
    if (layers > MOST_LAYERS || end - headers < LAYER_BYTES * layers) return 0;
    at = headers + LAYER_BYTES * layers;
    const int64_t most = layers ? load<uint32_t>(headers) & ((1u << COUNT_BITS) - 1) : 0;
    if (most > numel || most > 8 * (end - at)) return 0;
    *found = Outliers::with_room(most, room);
    if (room->full()) return 0;
    found->limits = limits;
    found->offset = offset;
    int64_t universe = numel;
    for (int layer = 0; layer < layers; ++layer) {
        const uint32_t header = load<uint32_t>(headers + LAYER_BYTES * layer);
        const int64_t count = header & ((1u << COUNT_BITS) - 1);
        const int width = (int)(header >> COUNT_BITS);
        if (count < 1 || count > universe || end - at < packed_bytes(count, width)) return 0;
        StreamReader low(at, end), high(at + packed_bytes(count, width), end);
        // Python looks no further for the marks than places below `universe` can lie.
        int64_t place = -1, bits = 0;
        const int64_t longest = min64(8 * (end - high.at), count + (universe >> width) + 1);
        const uint8_t* unary = high.at;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t zeros = high.get_unary();
            if (zeros < 0 || (bits += zeros + 1) > longest) return 0;
            place += (zeros << width | (int64_t)low.get(width)) + 1;
            if (place >= universe) return 0;
            if (layer == 0) {
                found->places[k] = place;
                found->members[k] = k;
                found->depth[k] = 0;
            } else {
                found->members[k] = found->members[place];  // place is k or more
                found->depth[found->members[k]] = (uint8_t)layer;
            }
        }
        at = unary + packed_bytes(bits, 1);
        universe = count;
    }
    for (int part = 0; part == 0 || part < layers; ++part) {
        int64_t members = 0;
        for (int64_t k = 0; k < most; ++k) members += part == 0 || found->depth[k] == part;
        if (end - at < packed_bytes(members, part ? part : 1)) return 0;
        StreamReader reader(at, end);
        for (int64_t k = 0; k < most; ++k) {
            if (part == 0) {
                found->negative[k] = (uint8_t)reader.get(1);
                found->levels[k] = 1;
            } else if (found->depth[k] == part) {
                found->levels[k] = (int32_t)(((uint64_t)1 << part) + reader.get(part));
            }
        }
        at += packed_bytes(members, part ? part : 1);
    }
    return at;
}

}  // namespace
#endif
