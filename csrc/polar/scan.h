// Polar: passes over a tensor's entries: sums and energies of rows, columns and classes, the way from entries to the
// samples of classes and back, and which entries are outliers.
#ifndef GCOMPRESS_POLAR_SCAN_H
#define GCOMPRESS_POLAR_SCAN_H

#include "lanes.h"

namespace {

// The sum of |x| 2^-24 over a row, in 16 interleaved sums that then fold in halves; the terms are added to the columns'
// sums, too, if those are given.
inline void add_row_sums(const float* row, int64_t count, float* row_sum, float* column_sums) {
    float sums[16] = {0};
    int64_t j = 0;
    for (; j + 16 <= count; j += 16)
        for (int k = 0; k < 16; ++k) sums[k] += sum_term(row[j + k]);  // vectorised
    for (int k = 0; j + k < count; ++k) sums[k] += sum_term(row[j + k]);
    for (int half = 8; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    *row_sum = sums[0];
    if (column_sums)
        for (j = 0; j < count; ++j) column_sums[j] += sum_term(row[j]);  // vectorised
}

// The same for every row and, if asked, every column of a matrix of n entries in rows of `cols`; a column's sum is from top
// to bottom.
inline void polar_sums_of(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    if (column_sums) memset(column_sums, 0, (size_t)cols * sizeof(float));
    for (int64_t start = 0; start < n; start += cols)
        add_row_sums(x + start, min64(cols, n - start), row_sums++, column_sums);
}

inline void quantize_run(const float* x, int64_t count, float scale, int8_t* samples) {
    for (int64_t i = 0; i < count; ++i) samples[i] = sample_of(x[i] * scale);  // vectorised
}

// How a matrix falls apart into classes: the entry in row i and column j has class row_class[i] +
// (class of j's run), the columns being taken in `order`.
struct PolarLayout {
    int64_t n, cols;
    int64_t row_class;  // address of uint8 per row, 0: skip the row; or null: 1 everywhere
    int64_t order;      // address of int32 per column; or null: as they lie
    int64_t runs;       // number of runs of columns
    int64_t run_end;    // address of int32 per run, in `order`
    int64_t run_class;  // address of uint8 per run, 0: skip it
    int64_t slot;       // address of int8 per class: its number among the coded ones, -1: not coded
    int64_t scale;      // address of float per slot, by which entries become samples
};

// Calls visit(slot, first column in order, count) for every coded run of a row.
template <class Visit>
inline void for_each_run(const PolarLayout* layout, int64_t row, int64_t count, const Visit& visit) {
    const uint8_t* row_class = (const uint8_t*)layout->row_class;
    const int32_t* run_end = (const int32_t*)layout->run_end;
    const uint8_t* run_class = (const uint8_t*)layout->run_class;
    const int base = row_class ? row_class[row] : 1;
    if (base == 0) return;
    int64_t first = 0;
    for (int64_t run = 0; run < layout->runs && first < count; ++run) {
        const int64_t end = min64(run_end[run], count);
        const int slot = run_class[run] ? ((const int8_t*)layout->slot)[base + run_class[run]] : -1;
        if (slot >= 0) visit(slot, first, end - first);
        first = end;
    }
}

// The same for every row of a matrix, with the run's entries; `row_buffer` has room for a row.
template <class Visit>
inline void for_each_matrix_run(const float* x, const PolarLayout* layout, float* row_buffer, const Visit& visit) {
    const int32_t* order = (const int32_t*)layout->order;
    for (int64_t row = 0, start = 0; start < layout->n; ++row, start += layout->cols) {
        const int64_t count = min64(layout->cols, layout->n - start);
        if (layout->row_class && ((const uint8_t*)layout->row_class)[row] == 0) continue;
        const float* source = x + start;
        if (order) {
            for (int64_t j = 0; j < count; ++j) row_buffer[j] = source[order[j]];
            source = row_buffer;
        }
        for_each_run(layout, row, count,
                     [&](int slot, int64_t first, int64_t length) { visit(slot, source + first, length); });
    }
}

// Places of entries of at least max(floor, (row factor slope) column factor + intercept) in magnitude: all are
// counted, the first `capacity` written. A factor that is the same everywhere is given once.
inline int64_t polar_places_beyond(const float* x, int64_t n, int64_t cols, const float* row_factors, bool by_row,
                                   const float* column_factors, bool by_column, float floor, float slope,
                                   float intercept, int64_t capacity, int64_t* places) {
    int64_t found = 0;
    for (int64_t start = 0, row = 0; start < n; start += cols, ++row) {
        const int64_t count = min64(cols, n - start);
        const float of_row = row_factors[by_row ? row : 0] * slope;
        const float common = outlier_limit(of_row, column_factors[0], intercept, floor);
        for (int64_t first = 0; first < count; first += 64) {
            const float* entries = x + start + first;
            const int64_t length = min64(64, count - first);
            uint8_t over[64];
            int32_t any = 0;
            if (by_column) {
                for (int64_t j = 0; j < length; ++j) {  // vectorised
                    const float limit = outlier_limit(of_row, column_factors[first + j], intercept, floor);
                    const int32_t reaches = __builtin_fabsf(entries[j]) >= limit;
                    over[j] = (uint8_t)reaches;
                    any |= reaches;
                }
            } else {
                for (int64_t j = 0; j < length; ++j) {  // vectorised
                    const int32_t reaches = __builtin_fabsf(entries[j]) >= common;
                    over[j] = (uint8_t)reaches;
                    any |= reaches;
                }
            }
            for (int64_t j = 0; any && j < length; ++j) {
                if (!over[j]) continue;
                if (found < capacity) places[found] = start + first + j;
                ++found;
            }
        }
    }
    return found;
}

// Per class the sum of squares of its scaled, rounded entries; slots are classes here.
inline void polar_class_energies(const float* x, const PolarLayout* layout, float* row_buffer, int64_t* totals) {
    const float* scales = (const float*)layout->scale;
    for_each_matrix_run(x, layout, row_buffer, [=](int slot, const float* entries, int64_t length) {
        const float scale = scales[slot];
        int64_t total = 0;
        for (int64_t j = 0; j < length; ++j) total += energy_of(entries[j] * scale);  // vectorised
        totals[slot] += total;
    });
}

// Samples in the order of the tiles. `cursors` holds each class's first position in `samples`.
inline void polar_gather_rows(const float* x, const PolarLayout* layout, int64_t* cursors, float* row_buffer,
                              int8_t* samples) {
    const float* scales = (const float*)layout->scale;
    for_each_matrix_run(x, layout, row_buffer, [=](int slot, const float* entries, int64_t length) {
        const float scale = scales[slot];
        int8_t* target = samples + cursors[slot];
        for (int64_t j = 0; j < length; ++j) target[j] = sample_of(entries[j] * scale);  // vectorised
        cursors[slot] += length;
    });
}

// The inverse: values in the order of the tiles back to the matrix; what is not coded is 0.
template <bool add>
void polar_scatter_rows(const float* values, const PolarLayout* layout, int64_t* cursors, float* row_buffer,
                        float* out) {
    const int32_t* order = (const int32_t*)layout->order;
    for (int64_t row = 0, start = 0; start < layout->n; ++row, start += layout->cols) {
        const int64_t count = min64(layout->cols, layout->n - start);
        float* target = out + start;
        memset(row_buffer, 0, (size_t)count * sizeof(float));
        for_each_run(layout, row, count, [=](int slot, int64_t first, int64_t length) {
            memcpy(row_buffer + first, values + cursors[slot], (size_t)length * sizeof(float));
            cursors[slot] += length;
        });
        if (order)
            for (int64_t j = 0; j < count; ++j)
                target[order[j]] = add ? target[order[j]] + row_buffer[j] : row_buffer[j];
        else
            for (int64_t j = 0; j < count; ++j) target[j] = add ? target[j] + row_buffer[j] : row_buffer[j];
    }
}

}  // namespace
#endif
