// Polar: passes over a tensor's entries: sums and energies of rows, columns and classes, the way from entries to the
// samples of classes and back, and which entries are outliers.
#ifndef GCOMPRESS_POLAR_SCAN_H
#define GCOMPRESS_POLAR_SCAN_H

#include "../cpu/threads.h"
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
inline void polar_sums_of(int threads, const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    const Shares shares = shares_of(threads, n, cols);
    if (column_sums) memset(column_sums, 0, (size_t)cols * sizeof(float));
    on_shares(shares, [=](int, int64_t from, int64_t to) {
        float* of_columns = shares.count == 1 ? column_sums : 0;
        for (int64_t start = from; start < to; start += cols)
            add_row_sums(x + start, min64(cols, n - start), row_sums + start / cols, of_columns);
    });
    if (!column_sums || shares.count == 1) return;
    on_shares(shares_of(shares.count, cols, 64, 64), [=](int, int64_t from, int64_t to) {
        for (int64_t start = 0; start < n; start += cols) {
            const int64_t end = min64(to, n - start);
            for (int64_t j = from; j < end; ++j) column_sums[j] += sum_term(x[start + j]);  // vectorised
        }
    });
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

// The same for every row of a matrix's entries [from, to), with the run's entries; `row_buffer` has room for a row.
template <class Visit>
inline void for_each_matrix_run(const float* x, const PolarLayout* layout, int64_t from, int64_t to, float* row_buffer,
                                const Visit& visit) {
    const int32_t* order = (const int32_t*)layout->order;
    for (int64_t row = from / layout->cols, start = from; start < to; ++row, start += layout->cols) {
        const int64_t count = min64(layout->cols, to - start);
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

// The passes below take rows in shares; `row_buffer` has room for a row of each.
const int MOST_SLOTS = 127;

// Where a share's entries of each class begin in the order of the tiles, if those of the matrix begin at `cursors`: in
// `mine`, or if there is one share at `cursors`, which it moves on.
inline int64_t* cursors_of_share(const Shares& shares, const PolarLayout* layout, int64_t from, int64_t* cursors,
                                 int64_t* mine) {
    if (shares.count == 1) return cursors;
    memcpy(mine, cursors, MOST_SLOTS * sizeof *mine);
    for (int64_t start = 0, row = 0; start < from; start += layout->cols, ++row)
        for_each_run(layout, row, layout->cols, [=](int slot, int64_t, int64_t length) { mine[slot] += length; });
    return mine;
}

// Places of entries of at least max(floor, (row factor slope) column factor + intercept) in magnitude: all are
// counted, the first `capacity` written. A factor that is the same everywhere is given once.
inline int64_t polar_places_beyond(const float* x, int64_t from, int64_t to, int64_t cols, const float* row_factors,
                                   bool by_row, const float* column_factors, bool by_column, float floor, float slope,
                                   float intercept, int64_t capacity, int64_t* places) {
    int64_t found = 0;
    for (int64_t start = from, row = from / cols; start < to; start += cols, ++row) {
        const int64_t count = min64(cols, to - start);
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

// The same by shares, each of which has a part of `places` until all are done.
inline int64_t polar_all_places_beyond(const Shares& shares, const float* x, int64_t cols, const float* row_factors,
                                       bool by_row, const float* column_factors, bool by_column, float floor,
                                       float slope, float intercept, int64_t capacity, int64_t* places) {
    const auto search = [=](int64_t from, int64_t to, int64_t most, int64_t* target) {
        return polar_places_beyond(x, from, to, cols, row_factors, by_row, column_factors, by_column, floor, slope,
                                   intercept, most, target);
    };
    const int64_t part = capacity / shares.count;
    int64_t counts[MOST_THREADS], found = 0;
    on_shares(shares, [&](int share, int64_t from, int64_t to) {
        counts[share] = search(from, to, part, places + share * part);
    });
    for (int share = 0; share < shares.count; ++share) {
        if (counts[share] > part && shares.count > 1) return search(0, shares.n, capacity, places);
        if (share > 0) memmove(places + found, places + share * part, (size_t)counts[share] * sizeof *places);
        found += counts[share];
    }
    return found;
}

// Per class the sum of squares of its scaled, rounded entries; slots are classes here.
inline void polar_class_energies(const Shares& shares, const float* x, const PolarLayout* layout, float* row_buffer,
                                 int64_t* totals) {
    const float* scales = (const float*)layout->scale;
    on_shares(shares, [=](int share, int64_t from, int64_t to) {
        int64_t mine[MOST_SLOTS] = {0};
        float* buffer = row_buffer + share * layout->cols;
        for_each_matrix_run(x, layout, from, to, buffer, [&](int slot, const float* entries, int64_t length) {
            const float scale = scales[slot];
            int64_t total = 0;
            for (int64_t j = 0; j < length; ++j) total += energy_of(entries[j] * scale);  // vectorised
            mine[slot] += total;
        });
        for (int slot = 0; slot < MOST_SLOTS; ++slot) add_to_shared(totals + slot, mine[slot]);
    });
}

// Samples in the order of the tiles. `cursors` holds each class's first position in `samples`.
inline void polar_gather_rows(const Shares& shares, const float* x, const PolarLayout* layout, int64_t* cursors,
                              float* row_buffer, int8_t* samples) {
    const float* scales = (const float*)layout->scale;
    on_shares(shares, [=](int share, int64_t from, int64_t to) {
        int64_t own[MOST_SLOTS], *mine = cursors_of_share(shares, layout, from, cursors, own);
        float* buffer = row_buffer + share * layout->cols;
        for_each_matrix_run(x, layout, from, to, buffer, [=](int slot, const float* entries, int64_t length) {
            const float scale = scales[slot];
            int8_t* target = samples + mine[slot];
            for (int64_t j = 0; j < length; ++j) target[j] = sample_of(entries[j] * scale);  // vectorised
            mine[slot] += length;
        });
    });
}

// The inverse: values in the order of the tiles back to the matrix, by a mode; what is not coded is 0.
template <int mode>
void polar_scatter_rows(const Shares& shares, const float* values, const PolarLayout* layout, int64_t* cursors,
                        float* row_buffer, float* out) {
    const int32_t* order = (const int32_t*)layout->order;
    on_shares(shares, [=](int share, int64_t from, int64_t to) {
        int64_t own[MOST_SLOTS], *mine = cursors_of_share(shares, layout, from, cursors, own);
        float* buffer = row_buffer + share * layout->cols;
        for (int64_t row = from / layout->cols, start = from; start < to; ++row, start += layout->cols) {
            const int64_t count = min64(layout->cols, to - start);
            float* target = out + start;
            memset(buffer, 0, (size_t)count * sizeof(float));
            for_each_run(layout, row, count, [=](int slot, int64_t first, int64_t length) {
                memcpy(buffer + first, values + mine[slot], (size_t)length * sizeof(float));
                mine[slot] += length;
            });
            if (order)
                for (int64_t j = 0; j < count; ++j) target[order[j]] = put_value<mode>(target[order[j]], buffer[j]);
            else
                for (int64_t j = 0; j < count; ++j) target[j] = put_value<mode>(target[j], buffer[j]);
        }
    });
}

}  // namespace
#endif
