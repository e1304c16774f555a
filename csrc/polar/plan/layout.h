// Polar's plan: how entries fall into classes (gcompress/compressors/polar/layout.py).
#ifndef GCOMPRESS_POLAR_PLAN_LAYOUT_H
#define GCOMPRESS_POLAR_PLAN_LAYOUT_H

#include "../scan.h"
#include "tables.h"

namespace {

const int CODES = 63, CLASSES = 2 * CODES + 1, NO_CODE = 1;
static_assert(CLASSES == MOST_SLOTS, "a slot for each class");
const double GAUSSIAN_RMS = 1.2533141373155001;

struct Layout {
    int64_t numel, columns;
    const uint8_t *row_codes, *column_codes;  // or null
    int64_t rows() const { return ceil_div(numel, columns); }
    bool lone() const { return !row_codes && !column_codes; }
};

inline void count_codes(const uint8_t* codes, int64_t length, int64_t* counts) {
    int32_t parts[4][CODES + 1] = {{0}};
    memset(counts, 0, (CODES + 1) * sizeof *counts);
    for (int64_t first = 0; first < length;) {
        const int64_t end = min64(length, first + (1 << 30));
        for (; first + 4 <= end; first += 4)
            for (int k = 0; k < 4; ++k) ++parts[k][codes[first + k]];
        for (; first < end; ++first) ++parts[0][codes[first]];
        for (int code = 0; code <= CODES; ++code)
            for (int k = 0; k < 4; ++k) counts[code] += parts[k][code], parts[k][code] = 0;
    }
}

// Entries per class, those with a code 0 left out.
inline void class_counts(const Layout& layout, int64_t* counts) {
    int64_t rows[CODES + 1] = {0}, columns[CODES + 1];
    memset(counts, 0, CLASSES * sizeof *counts);
    if (layout.row_codes) {
        count_codes(layout.row_codes, layout.rows(), rows);
        for (int k = 0; k <= CODES; ++k) rows[k] *= layout.columns;
        rows[layout.row_codes[layout.rows() - 1]] -= layout.rows() * layout.columns - layout.numel;
    } else {
        rows[NO_CODE] = layout.numel;
    }
    rows[0] = 0;
    if (!layout.column_codes) {
        for (int k = 1; k <= CODES; ++k) counts[NO_CODE + k] = rows[k];
        return;
    }
    count_codes(layout.column_codes, layout.columns, columns);
    for (int i = 1; i <= CODES; ++i) {
        const int64_t of_row = rows[i] / layout.columns;
        for (int j = 1; j <= CODES && of_row; ++j) counts[i + j] += of_row * columns[j];
    }
}

// Codes of a quarter octave, the largest at CODES: of sums over `full` entries each, the last one over `last`.
inline void scale_codes(const PlanTables* tables, const float* sums, int64_t length, double full, double last,
                        uint8_t* codes) {
    const OctaveCodes octave(tables, 4);
    double largest = 0.0;
    for (int64_t i = 0; i < length; ++i) {
        const double mean = (double)sums[i] / (i + 1 < length ? full : last);
        largest = mean > largest ? mean : largest;
    }
    const int64_t offset = octave(most_of(largest, 1e-300)) - CODES;
    for (int64_t i = 0; i < length; ++i) {
        const double mean = (double)sums[i] / (i + 1 < length ? full : last);
        codes[i] = (uint8_t)(mean > 0.0 ? max64(octave(most_of(mean, 1e-300)) - offset, 0) : 0);
    }
}

// The mean variance of rows or columns, relative to that which NO_CODE stands for.
inline double mean_power(const PlanTables* tables, const uint8_t* codes, int64_t length) {
    if (!codes) return 1.0;
    int64_t counts[CODES + 1];
    double terms[CODES + 1] = {0};
    count_codes(codes, length, counts);
    for (int k = 1; k <= CODES; ++k) terms[k] = (double)counts[k] * tables->power(32 * (k - NO_CODE));
    return exact_sum(terms, CODES + 1) / (double)length;
}

struct CodeForm {
    int width, low;
};
inline CodeForm code_form(const uint8_t* codes, int64_t length) {
    uint8_t below = 255, high = 0;  // a code 0 becomes 255 for the least
    for (int64_t i = 0; i < length; ++i) {
        const uint8_t code = (uint8_t)(codes[i] - 1);
        below = code < below ? code : below;
        high = codes[i] > high ? codes[i] : high;
    }
    if (high == 0) return {0, 0};
    return {bit_length(high - below), below + 1};
}

inline int64_t side_bytes(const Layout& layout) {
    int64_t bytes = 0;
    if (layout.row_codes) bytes += (layout.rows() * code_form(layout.row_codes, layout.rows()).width + 7) / 8;
    if (layout.column_codes) bytes += (layout.columns * code_form(layout.column_codes, layout.columns).width + 7) / 8;
    return bytes;
}

inline int largest_code(const uint8_t* codes, int64_t length) {
    uint8_t high = 0;
    for (int64_t i = 0; i < length; ++i) high = codes[i] > high ? codes[i] : high;
    return high;
}

// The layout with codes 0 where a row or column lies below the class `floor` throughout; its codes go to `codes`.
inline Layout without_idle_codes(const Layout& layout, int floor, uint8_t* codes) {
    Layout found = layout;
    if (layout.row_codes) {
        const int best = layout.column_codes ? largest_code(layout.column_codes, layout.columns) : NO_CODE;
        for (int64_t i = 0; i < layout.rows(); ++i)
            codes[i] = layout.row_codes[i] + best >= floor ? layout.row_codes[i] : 0;
        found.row_codes = codes;
        codes += layout.rows();
    }
    if (layout.column_codes) {
        const int best = layout.row_codes ? largest_code(found.row_codes, layout.rows()) : NO_CODE;
        for (int64_t i = 0; i < layout.columns; ++i)
            codes[i] = layout.column_codes[i] + best >= floor ? layout.column_codes[i] : 0;
        found.column_codes = codes;
    }
    return found;
}

// What the passes over a matrix need (csrc/polar/scan.h): columns in falling order of their codes, equal ones from left
// to right, in runs.
struct LayoutRuns {
    PolarLayout described;
    float* row_buffer;  // for each share a row
    Shares shares;
};
inline LayoutRuns runs_of(int threads, const Layout& layout, Room* room) {
    const Shares shares = shares_of(threads, layout.numel, layout.columns);
    int32_t* order = layout.column_codes ? room->take<int32_t>(layout.columns) : 0;
    int32_t* ends = room->take<int32_t>(CODES + 1);
    uint8_t* codes = room->take<uint8_t>(CODES + 1);
    float* buffer = room->take<float>(layout.lone() ? 0 : shares.count * layout.columns);
    LayoutRuns runs = {{layout.numel, layout.columns, (int64_t)layout.row_codes, (int64_t)order, 1, (int64_t)ends,
                        (int64_t)codes, 0, 0},
                       buffer,
                       shares};
    if (room->full()) return runs;
    if (!order) {
        ends[0] = (int32_t)min64(layout.columns, INT32_MAX);
        codes[0] = NO_CODE;
        return runs;
    }
    int64_t counts[CODES + 1], at[CODES + 1], next = 0;
    count_codes(layout.column_codes, layout.columns, counts);
    runs.described.runs = 0;
    for (int code = CODES; code >= 0; --code) {
        at[code] = next;
        next += counts[code];
        if (!counts[code]) continue;
        ends[runs.described.runs] = (int32_t)next;
        codes[runs.described.runs++] = (uint8_t)code;
    }
    for (int64_t j = 0; j < layout.columns; ++j) order[at[layout.column_codes[j]]++] = (int32_t)j;
    return runs;
}

}  // namespace
#endif
