// Polar's plan: products with thin matrices, of up to 32 columns. All numbers are integers held in doubles and every sum
// stays below 2^53: exact in any order, so that four members are taken at a time.
#ifndef GCOMPRESS_POLAR_PLAN_THIN_H
#define GCOMPRESS_POLAR_PLAN_THIN_H

#include "room.h"

namespace {

// Vectors as wide as registers are, by gcc's and clang's types: left to itself, gcc 12 shuffles across rows, and of wider
// ones than there are it makes memory.
typedef double Doubles __attribute__((vector_size(4 * WIDE)));
const int DOUBLES_WIDE = sizeof(Doubles) / sizeof(double);
GC_HOT void load_doubles_wide(Doubles* value, const double* p) { memcpy(value, p, sizeof *value); }
GC_HOT void store_doubles_wide(double* p, const Doubles* value) { memcpy(p, value, sizeof *value); }

// Row by row, with `stride` columns, a multiple of 8: those behind the first `count` are zeros.
struct ThinMatrix {
    double* at;
    int64_t rows, count, stride;
    double* row(int64_t i) const { return at + i * stride; }
    static ThinMatrix with_room(int64_t rows, int64_t count, Room* room) {
        const int64_t stride = (count + 7) / 8 * 8;
        return {room->take<double>(rows * stride), rows, count, stride};
    }
    void clear() const { memset(at, 0, (size_t)(rows * stride) * sizeof(double)); }
};

// Members have `length` entries and begin `apart` entries after each other.
struct Members {
    const double* at;
    int64_t length, apart;
    Members from(int64_t number) const { return {at + number * apart, length, apart}; }
};

// Row m of the result: the sum of the thin matrix's rows, each times an entry of member m; of the columns from `first` on.
template <int vectors, int members>
inline void times_thin_of(const Members& of, const ThinMatrix& thin, int64_t first, double* result) {
    Doubles sums[members][vectors] = {};
    for (int64_t i = 0; i < of.length; ++i) {
        Doubles row[vectors];
        for (int k = 0; k < vectors; ++k) load_doubles_wide(row + k, thin.row(i) + first + DOUBLES_WIDE * k);
        for (int m = 0; m < members; ++m)
            for (int k = 0; k < vectors; ++k) sums[m][k] += of.at[m * of.apart + i] * row[k];
    }
    for (int m = 0; m < members; ++m)
        for (int k = 0; k < vectors; ++k)
            store_doubles_wide(result + m * thin.stride + first + DOUBLES_WIDE * k, &sums[m][k]);
}

// The thin matrix's row i grows by the sum of rows m, each times entry i of member m.
template <int vectors, int members>
inline void add_outer_of(const Members& of, const double* rows, const ThinMatrix& thin, int64_t first) {
    Doubles row[members][vectors];
    for (int m = 0; m < members; ++m)
        for (int k = 0; k < vectors; ++k)
            load_doubles_wide(&row[m][k], rows + m * thin.stride + first + DOUBLES_WIDE * k);
    for (int64_t i = 0; i < of.length; ++i) {
        for (int k = 0; k < vectors; ++k) {
            Doubles sum;
            load_doubles_wide(&sum, thin.row(i) + first + DOUBLES_WIDE * k);
            for (int m = 0; m < members; ++m) sum += of.at[m * of.apart + i] * row[m][k];
            store_doubles_wide(thin.row(i) + first + DOUBLES_WIDE * k, &sum);
        }
    }
}

// By two vectors of columns, or the last one.
template <int members>
inline void times_thin_some(const Members& of, const ThinMatrix& thin, double* result) {
    int64_t first = 0;
    for (; first + 2 * DOUBLES_WIDE <= thin.stride; first += 2 * DOUBLES_WIDE)
        times_thin_of<2, members>(of, thin, first, result);
    if (first < thin.stride) times_thin_of<1, members>(of, thin, first, result);
}
template <int members>
inline void add_outer_some(const Members& of, const double* rows, const ThinMatrix& thin) {
    int64_t first = 0;
    for (; first + 2 * DOUBLES_WIDE <= thin.stride; first += 2 * DOUBLES_WIDE)
        add_outer_of<2, members>(of, rows, thin, first);
    if (first < thin.stride) add_outer_of<1, members>(of, rows, thin, first);
}

// The same for any number of members; `result` and `rows` have the thin matrix's stride.
inline void times_thin(const Members& of, int64_t members, const ThinMatrix& thin, double* result) {
    int64_t m = 0;
    for (; m + 4 <= members; m += 4) times_thin_some<4>(of.from(m), thin, result + m * thin.stride);
    for (; m < members; ++m) times_thin_some<1>(of.from(m), thin, result + m * thin.stride);
}
inline void add_outer(const Members& of, int64_t members, const double* rows, const ThinMatrix& thin) {
    int64_t m = 0;
    for (; m + 4 <= members; m += 4) add_outer_some<4>(of.from(m), rows + m * thin.stride, thin);
    for (; m < members; ++m) add_outer_some<1>(of.from(m), rows + m * thin.stride, thin);
}

}  // namespace
#endif
