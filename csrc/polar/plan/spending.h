// Polar's plan: classes in groups, tiles of blocks side by side, bits for each level
// (gcompress/compressors/polar/spending.py). The decoder makes the same plan from what it reads.
#ifndef GCOMPRESS_POLAR_PLAN_SPENDING_H
#define GCOMPRESS_POLAR_PLAN_SPENDING_H

#include "water.h"

namespace {

const int NEARLY_ALL = 4063;       // of 4096
const int64_t LONG_ENOUGH = 1024;  // rows, of which longer blocks are made only when all lanes are in use

struct CodedClass {
    int of_class;
    int64_t count, design, levels;
    double amplitude;
};

struct PlanTileSize {
    int64_t group, rows, real, lanes, levels, words;
    int64_t nbytes() const { return words * lanes / 8; }
};

// Classes first … first + count - 1 share one code.
struct PlanGroup {
    int64_t first, count, lanes, real, levels, tile, tiles;  // real: rows
};

struct Spending {
    Layout layout;
    int64_t base, class_count, group_count, tile_count;
    CodedClass classes[CLASSES];
    PlanGroup groups[CLASSES];
    PlanTileSize* tiles;

    int64_t rows_of(const PlanGroup& group, int64_t k) const { return ceil_div(classes[k].count, group.lanes); }
    int64_t words_bytes() const {
        int64_t bytes = 0;
        for (int64_t t = 0; t < tile_count; ++t) bytes += tiles[t].nbytes();
        return bytes;
    }
    int64_t all_rows() const {
        int64_t rows = 0;
        for (int64_t t = 0; t < tile_count; ++t) rows += tiles[t].rows;
        return rows;
    }
};

// Groups by the classes' levels and counts: one code for up to 64 classes of one level or of samples as they are.
inline void make_groups(Spending* spending) {
    spending->group_count = 0;
    for (int64_t k = 0; k < spending->class_count; ++k) {
        const int64_t levels = spending->classes[k].levels, most = levels == 1 || levels == MAX_LEVELS ? 64 : 1;
        PlanGroup* last = spending->groups + spending->group_count - 1;
        if (spending->group_count && last->levels == levels && last->count < most)
            ++last->count;
        else
            spending->groups[spending->group_count++] = {k, 1, 0, 0, levels, 0, 0};
    }
}

// Tiles of at most `block` rows; the last one of a group is as much shorter as it has fewer entries. False: no room.
inline bool make_tiles(Spending* spending, int64_t block, Room* room) {
    make_groups(spending);
    int64_t total = 0;
    for (int64_t g = 0; g < spending->group_count; ++g) {
        PlanGroup* group = spending->groups + g;
        int64_t entries = 0;
        for (int64_t k = group->first; k < group->first + group->count; ++k) entries += spending->classes[k].count;
        group->lanes = 64;
        while (group->lanes > 8 && entries < group->lanes * LONG_ENOUGH) group->lanes /= 2;
        group->real = 0;
        for (int64_t k = group->first; k < group->first + group->count; ++k)
            group->real += spending->rows_of(*group, k);
        group->tile = total;
        group->tiles = ceil_div(group->real, block);
        total += group->tiles;
    }
    spending->tile_count = total;
    spending->tiles = room->take<PlanTileSize>(total);
    if (room->full()) return false;
    for (int64_t g = 0; g < spending->group_count; ++g) {
        const PlanGroup& group = spending->groups[g];
        int64_t left = group.real;
        for (int64_t t = group.tile; t < group.tile + group.tiles; ++t, left -= block) {
            const int64_t real = min64(left, block);
            const int64_t rows =
                left >= block ? block : min64(block, max64(SMALLEST_BLOCK, (int64_t)1 << bit_length(left - 1)));
            spending->tiles[t] = {g, rows, real, group.lanes, group.levels, 0};
        }
    }
    return true;
}

// Calls visit(tile, class, rows) for every part of a class in a tile, in order.
template <class Visit>
inline void for_each_part(const Spending* spending, const Visit& visit) {
    for (int64_t g = 0; g < spending->group_count; ++g) {
        const PlanGroup& group = spending->groups[g];
        int64_t k = group.first, left = spending->rows_of(group, k);
        for (int64_t t = group.tile; t < group.tile + group.tiles; ++t) {
            for (int64_t room = spending->tiles[t].real; room > 0;) {
                while (left == 0) left = spending->rows_of(group, ++k);
                const int64_t rows = min64(left, room);
                visit(t, k, rows);
                left -= rows;
                room -= rows;
            }
        }
    }
}

// Words of at most `nbytes` bytes between the tiles, in proportion to the rates of their rows. Tiles of plain samples
// come first and take all they need.
inline bool share_bits(Spending* spending, const int64_t* rates, int64_t nbytes, Room* room) {
    const Room before = *room;
    int64_t* wanted = room->take<int64_t>(spending->tile_count);
    if (room->full()) return false;
    memset(wanted, 0, (size_t)spending->tile_count * sizeof *wanted);
    for_each_part(spending, [=](int64_t t, int64_t k, int64_t rows) {
        wanted[t] += rows * rates[spending->classes[k].of_class];
    });
    int64_t missing = 0, left = nbytes;
    for (int64_t t = 0; t < spending->tile_count; ++t) {
        wanted[t] = max64(wanted[t] * spending->tiles[t].lanes, 1);
        missing += wanted[t];
    }
    for (int64_t t = 0; t < spending->tile_count; ++t) {
        PlanTileSize* tile = spending->tiles + t;
        const int64_t share = tile->levels == MAX_LEVELS ? left : (int64_t)((__int128)wanted[t] * left / missing);
        missing -= wanted[t];
        tile->words = min64(min64(8 * share / tile->lanes, tile->levels * tile->real), 0xFFFF);
        left -= tile->nbytes();
    }
    *room = before;
    return true;
}

// Information bits by level: of `left` together, at most `real` each, by what `carried` says in 1/4096.
inline void level_shares(int64_t left, int64_t real, int64_t levels, int64_t* carried, int64_t* shares) {
    const int64_t words = left;
    int64_t total = 0, given = 0;
    for (int64_t level = levels - 1; level >= 0; --level) {
        shares[level] = 0;
        if (carried[level] < NEARLY_ALL * real) continue;
        shares[level] = min64(left, real);
        carried[level] = 0;
        left -= shares[level];
    }
    for (int64_t level = 0; level < levels; ++level) total += carried[level];
    total = max64(total, 1);
    for (int64_t level = 0; level < levels; ++level) {
        shares[level] += min64(real - shares[level], left * carried[level] / total);
        given += shares[level];
    }
    for (int64_t level = levels - 1; level >= 0; --level) {
        const int64_t more = min64(words - given, real - shares[level]);
        shares[level] += more;
        given += more;
    }
}

// The coded classes with their designs, those of many levels first.
inline void choose_classes(const PlanTables* tables, const int64_t* counts, const int64_t* rates, Spending* spending) {
    spending->class_count = 0;
    for (int levels = MAX_LEVELS; levels > 0; --levels) {
        for (int k = CLASSES - 1; k >= 0; --k) {
            if (rates[k] == 0 || levels_for(rates[k]) != levels) continue;
            const int64_t design = design_index(tables, levels, (rates[k] + 4) / 8);
            spending->classes[spending->class_count++] = {k, counts[k], design, levels, 0.0};
        }
    }
}

// The plan for a payload of `nbytes` bytes, `apart` of them for outliers, and the rates of all classes; false if nothing
// can be coded. `codes` has room for those of rows and columns, null: they stay as they are.
inline bool spend(const PlanTables* tables, const Layout& layout, const int64_t* variances, int64_t nbytes, bool flat,
                  int64_t block, int64_t apart, uint8_t* codes, Spending* spending, int64_t* rates, Room* room) {
    nbytes -= apart;
    int64_t overhead = CLASS_BYTES + TILE_BYTES, counts[CLASSES];
    spending->layout = layout;
    const Room start = *room;
    for (int round = 0; round < 4; ++round) {
        const int64_t before = overhead;
        class_counts(spending->layout, counts);
        const int64_t bits = 8 * (nbytes - HEADER_BYTES - side_bytes(spending->layout) - overhead);
        if (!class_rates(counts, variances, bits, flat, rates)) return false;
        int lowest = 0;
        while (lowest < CLASSES - 1 && rates[lowest] == 0) ++lowest;
        if (!flat && codes) {
            spending->layout = without_idle_codes(spending->layout, lowest, codes);
            class_counts(spending->layout, counts);
        }
        choose_classes(tables, counts, rates, spending);
        *room = start;
        if (!make_tiles(spending, block, room)) return false;
        overhead = CLASS_BYTES * spending->class_count + TILE_BYTES * spending->tile_count;
        if (overhead <= before) break;
    }
    const int64_t left = nbytes - HEADER_BYTES - side_bytes(spending->layout) - overhead;
    if (left < 1) return false;
    int64_t largest = variances[spending->classes[0].of_class];
    for (int64_t k = 1; k < spending->class_count; ++k)
        largest = max64(largest, variances[spending->classes[k].of_class]);
    spending->base = floor_div(largest, 64) + 1;
    return share_bits(spending, rates, left, room);
}

// What the code works on: tiles, the class of every row, where classes begin among the tiles' entries.
struct CodePlan {
    PolarTile* tiles;
    uint8_t* slots;
    int64_t starts[CLASSES], entries;
};

inline CodePlan code_plan(const PlanTables* tables, const Spending* spending, Room* room) {
    CodePlan plan;
    plan.tiles = room->take<PolarTile>(spending->tile_count);
    plan.slots = room->take<uint8_t>(spending->all_rows());
    if (room->full()) return plan;
    plan.entries = 0;
    int64_t row = 0, carried[MAX_LEVELS] = {0};
    for (int64_t g = 0; g < spending->group_count; ++g) {
        const PlanGroup& group = spending->groups[g];
        int64_t rows = 0, start = plan.entries, first = row;
        for (int64_t k = group.first; k < group.first + group.count; ++k) {
            plan.starts[k] = start;
            start += spending->rows_of(group, k) * group.lanes;
            memset(plan.slots + first, (int)k, (size_t)spending->rows_of(group, k));
            first += spending->rows_of(group, k);
        }
        for (int64_t t = group.tile; t < group.tile + group.tiles; ++t) rows += spending->tiles[t].rows;
        memset(plan.slots + first, PADDING_ROW, (size_t)(row + rows - first));
        row += rows;
        plan.entries += rows * group.lanes;
    }
    for (int64_t t = 0; t < spending->tile_count; ++t) {
        const PlanTileSize& size = spending->tiles[t];
        PolarTile* tile = plan.tiles + t;
        *tile = {size.rows, size.lanes, size.levels, 0, tables->positions[block_number(size.rows)], {0}};
        tile->rank = (int64_t)rank_of(tables, size.rows, size.real, room);
        if (room->full()) return plan;
    }
    int64_t at = 0;
    const auto finish = [&](int64_t t) {
        level_shares(spending->tiles[t].words, spending->tiles[t].real, spending->tiles[t].levels, carried,
                     plan.tiles[t].free);
        memset(carried, 0, sizeof carried);
    };
    for_each_part(spending, [&](int64_t t, int64_t k, int64_t rows) {
        while (at < t) finish(at++);
        const PlanDesign& design = tables->design(spending->classes[k].design);
        for (int level = 0; level < MAX_LEVELS; ++level) carried[level] += rows * design.information[level];
    });
    while (at < spending->tile_count) finish(at++);
    return plan;
}

// The number of every class among the coded ones, -1 for none.
inline void slot_of_class(const Spending* spending, int8_t* slots) {
    memset(slots, -1, CLASSES);
    for (int64_t k = 0; k < spending->class_count; ++k) slots[spending->classes[k].of_class] = (int8_t)k;
}

}  // namespace
#endif
