// Polar's plan: the header of a payload, written, and read from bytes that may be anything
// (gcompress/compressors/polar/header.py).
#ifndef GCOMPRESS_POLAR_PLAN_HEADER_H
#define GCOMPRESS_POLAR_PLAN_HEADER_H

#include "outliers.h"
#include "samples.h"

namespace {

enum { NOT_FINITE = 1, ROWS = 2, COLUMNS = 4, APART = 8, TURNED = 16, PRODUCT = 32 };

inline uint8_t* pack_codes(const uint8_t* codes, int64_t length, CodeForm form, uint8_t* at) {
    StreamWriter writer(at);
    for (int64_t i = 0; i < length && form.width; ++i)
        writer.put((uint64_t)(codes[i] > 0 ? codes[i] - form.low + 1 : 0), form.width);
    return writer.finish();
}

// Writes everything before the words and returns its end; `section` is what the flags APART or TURNED announce.
inline uint8_t* pack_header(const Spending* spending, int flags, const uint8_t* section, int64_t section_bytes,
                            uint8_t* at) {
    const Layout& layout = spending->layout;
    CodeForm rows = {0, 0}, columns = {0, 0};
    if (layout.row_codes) flags |= ROWS, rows = code_form(layout.row_codes, layout.rows());
    if (layout.column_codes) flags |= COLUMNS, columns = code_form(layout.column_codes, layout.columns);
    *at++ = (uint8_t)flags;
    *at++ = (uint8_t)spending->class_count;
    at = put_number(at, (int16_t)spending->base);
    at = put_number(at, (uint32_t)(flags & (ROWS | COLUMNS) ? layout.columns : 0));
    *at++ = (uint8_t)rows.width;
    *at++ = (uint8_t)rows.low;
    *at++ = (uint8_t)columns.width;
    *at++ = (uint8_t)columns.low;
    if (layout.row_codes) at = pack_codes(layout.row_codes, layout.rows(), rows, at);
    if (layout.column_codes) at = pack_codes(layout.column_codes, layout.columns, columns, at);
    if (section_bytes) memcpy(at, section, (size_t)section_bytes);
    at += section_bytes;
    for (int64_t k = 0; k < spending->class_count; ++k) {
        const CodedClass& c = spending->classes[k];
        *at++ = (uint8_t)c.of_class;
        *at++ = (uint8_t)c.design;
        at = put_number(at, half_of(c.amplitude));
    }
    for (int64_t t = 0; t < spending->tile_count; ++t) at = put_number(at, (uint16_t)spending->tiles[t].words);
    return at;
}

// What a payload says before its words. Without classes all entries are `constant`.
struct Header {
    Spending spending;
    Outliers outliers;
    float constant;
    bool apart, turned;
    uint32_t seed;
    const uint8_t *scales, *words;  // scales: of turned blocks, float32 at any alignment
};

// Codes of `length` rows or columns; returns their end, or null.
inline const uint8_t* read_codes(const uint8_t* at, const uint8_t* end, int64_t length, int width, int low,
                                 const uint8_t** found, Room* room) {
    if (width > 6 || low > CODES || end - at < packed_bytes(length, width)) return 0;
    uint8_t* codes = room->take<uint8_t>(length);
    if (room->full()) return 0;
    *found = codes;
    StreamReader reader(at, end);
    int largest = 0;
    for (int64_t i = 0; i < length; ++i) {
        const int value = (int)reader.get(width), code = value > 0 ? value + low - 1 : 0;
        largest = code > largest ? code : largest;
        codes[i] = (uint8_t)code;
    }
    return largest > CODES ? 0 : at + packed_bytes(length, width);
}

inline const uint8_t* read_classes(const PlanTables* tables, const uint8_t* at, const uint8_t* end, int count,
                                   Spending* spending) {
    if (end - at < CLASS_BYTES * count || count > CLASSES) return 0;
    int64_t counts[CLASSES];
    class_counts(spending->layout, counts);
    spending->class_count = count;
    for (int k = 0; k < count; ++k, at += CLASS_BYTES) {
        CodedClass* c = spending->classes + k;
        if (at[0] >= CLASSES || counts[at[0]] == 0 || at[1] >= tables->design_count) return 0;
        *c = {at[0], counts[at[0]], at[1], tables->design(at[1]).levels, double_of_half(load<uint16_t>(at + 2))};
        if (k == 0) continue;
        const CodedClass& before = c[-1];
        if (before.levels < c->levels || (before.levels == c->levels && before.of_class <= c->of_class)) return 0;
    }
    return at;
}

// Reads the header of a payload for `numel` entries, without looking at the flag PRODUCT; false if it contradicts itself
// or there is no room.
inline bool read_header(const PlanTables* tables, const uint8_t* payload, int64_t nbytes, int64_t numel, int64_t block,
                        Header* header, Room* room) {
    const uint8_t* end = payload + nbytes;
    if (nbytes < HEADER_BYTES) return false;
    const int flags = payload[0] & ~PRODUCT, count = payload[1], base = load<int16_t>(payload + 2);
    int64_t columns = load<uint32_t>(payload + 4);
    Spending* spending = &header->spending;
    spending->class_count = spending->tile_count = 0;
    header->apart = header->turned = false;
    header->constant = 0.0f;
    if (flags & ~(flags & TURNED ? TURNED : NOT_FINITE | ROWS | COLUMNS | APART)) return false;
    if (flags & NOT_FINITE) header->constant = bits_float(QUIET_NAN);
    if (flags & NOT_FINITE || (count == 0 && !(flags & APART))) return true;
    if (base < -200 || base > 200) return false;
    if (!(flags & (ROWS | COLUMNS)))
        columns = numel;
    else if (columns < 1 || columns > numel || (flags & COLUMNS && numel % columns))
        return false;
    spending->layout = {numel, columns, 0, 0};
    spending->base = base;
    const uint8_t* at = payload + HEADER_BYTES;
    if (flags & ROWS)
        at = read_codes(at, end, ceil_div(numel, columns), payload[8], payload[9], &spending->layout.row_codes, room);
    if (at && flags & COLUMNS)
        at = read_codes(at, end, columns, payload[10], payload[11], &spending->layout.column_codes, room);
    if (at && flags & APART) {
        header->apart = true;
        at = unpack_outliers(at, end, numel, &header->outliers, room);
    } else if (at && flags & TURNED) {
        header->turned = true;
        const int64_t size = 4 + 4 * ceil_div(numel, (int64_t)16384);
        if (end - at < size) return false;
        header->seed = load<uint32_t>(at);
        header->scales = at + 4;
        at += size;
    }
    if (!at || count == 0) return at != 0;
    at = read_classes(tables, at, end, count, spending);
    if (!at || !make_tiles(spending, block, room) || end - at < TILE_BYTES * spending->tile_count) return false;
    for (int64_t t = 0; t < spending->tile_count; ++t, at += TILE_BYTES) {
        PlanTileSize* tile = spending->tiles + t;
        tile->words = load<uint16_t>(at);
        if (tile->words > tile->levels * tile->real) return false;
    }
    header->words = at;
    return end - at >= spending->words_bytes();
}

}  // namespace
#endif
