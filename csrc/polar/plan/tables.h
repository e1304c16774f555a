// Polar's plan: the tables that Python makes once (gcompress/compressors/polar/tables.py), and what follows from them.
#ifndef GCOMPRESS_POLAR_PLAN_TABLES_H
#define GCOMPRESS_POLAR_PLAN_TABLES_H

#include "../tile.h"
#include "doubles.h"
#include "room.h"

namespace {

const int POINT_ONE = 4096, SMALLEST_BLOCK = 16;
const int BLOCKS = 11;  // sizes of blocks, from 16 to 16384

// A design; `tables` and `points` are addresses.
struct PlanDesign {
    int64_t levels, rate, information[MAX_LEVELS], tables, points, largest;  // largest: of the points
};

// What polar_compress and polar_decompress are given (`_tables` of gcompress/compressors/polar/whole.py): addresses.
struct PlanTables {
    int64_t designs, design_count;
    int64_t roots;              // double [64]: 2^(k / 64)
    int64_t rank[BLOCKS];       // uint16 [block]: of whole blocks
    int64_t order[BLOCKS];      // uint16 [block]: the inverse, positions from the best one on
    int64_t positions[BLOCKS];  // uint16 [block]: where rows go

    const PlanDesign& design(int64_t number) const { return ((const PlanDesign*)designs)[number]; }
    // 2^(k / 64)
    double power(int64_t sixty_fourths) const {
        const double root = ((const double*)roots)[sixty_fourths & 63];
        const int64_t octaves = sixty_fourths >> 6;
        return -1022 <= octaves && octaves < 1023 ? times_two_to(root, octaves) : ldexp(root, (int)octaves);
    }
};

inline int block_number(int64_t rows) { return bit_length(rows) - 5; }

inline int levels_for(int64_t rate) {
    return 1 + (rate > 38) + (rate > 51) + (rate > 83) + (rate > 109) + (rate > 166) + (rate > 218) + (rate > 384);
}

// The design with `levels` nearest to a rate in eighths of a bit.
inline int64_t design_index(const PlanTables* tables, int levels, int64_t rate) {
    if (levels == 1) return 0;
    if (levels == MAX_LEVELS) return tables->design_count - 1;
    int64_t best = -1, least = 0;
    for (int64_t k = 1; k + 1 < tables->design_count; ++k) {
        const PlanDesign& design = tables->design(k);
        const int64_t distance = design.rate > rate ? design.rate - rate : rate - design.rate;
        if (design.levels == levels && (best < 0 || distance < least)) best = k, least = distance;
    }
    return best;
}

// round(steps log2(value)) for positive doubles that are not subnormal.
struct OctaveCodes {
    int64_t borders[32];
    int steps;
    OctaveCodes(const PlanTables* tables, int steps_) : steps(steps_) {
        for (int k = 1; k <= steps; ++k) {
            const double border = tables->power((2 * k - 1) * 32 / steps);
            memcpy(borders + k - 1, &border, sizeof border);
            borders[k - 1] &= ((int64_t)1 << 52) - 1;
        }
    }
    int64_t operator()(double value) const {
        int64_t pattern;
        memcpy(&pattern, &value, sizeof value);
        const int64_t mantissa = pattern & (((int64_t)1 << 52) - 1);
        int64_t passed = 0;
        for (int k = 0; k < steps; ++k) passed += mantissa >= borders[k];
        return ((pattern >> 52) - 1023) * steps + passed;
    }
};

// The rank of every position of a block if only the first `real` rows are there (tables.rank): useful positions first.
inline const uint16_t* rank_of(const PlanTables* tables, int64_t rows, int64_t real, Room* room) {
    const int number = block_number(rows);
    if (real == rows) return (const uint16_t*)tables->rank[number];
    const uint16_t *order = (const uint16_t*)tables->order[number],
                   *positions = (const uint16_t*)tables->positions[number];
    uint16_t* rank = room->take<uint16_t>(rows);
    if (room->full()) return 0;
    uint64_t useful[MAX_BLOCK / 64] = {0};
    for (int64_t row = 0; row < real; ++row) useful[positions[row] / 64] |= (uint64_t)1 << (positions[row] % 64);
    const int64_t words = ceil_div(rows, 64);
    for (int64_t half = rows / 2; half >= 64; half /= 2) {
        for (int64_t i = 0; i < words; ++i) {
            if (i & half / 64) continue;
            uint64_t *a = useful + i, *b = useful + i + half / 64, first = *a;
            *a = first & *b;
            *b = first | *b;
        }
    }
    for (int64_t half = min64(rows / 2, 32); half > 0; half /= 2) {
        const uint64_t lower = ~(uint64_t)0 / (((uint64_t)1 << half) + 1);  // positions without the bit `half`
        for (int64_t i = 0; i < words; ++i) {
            const uint64_t a = useful[i] & lower, b = useful[i] >> half & lower;
            useful[i] = (a & b) | (a | b) << half;
        }
    }
    int64_t good = 0, bad = 0;
    for (int64_t i = 0; i < words; ++i) bad += __builtin_popcountll(useful[i]);
    for (int64_t k = 0; k < rows; ++k) {
        const int position = order[k], is_useful = useful[position / 64] >> (position % 64) & 1;
        rank[position] = (uint16_t)(is_useful ? good : bad);
        good += is_useful;
        bad += 1 - is_useful;
    }
    return rank;
}

}  // namespace
#endif
