// Polar: what is done to entries before and after the code. Sums read 4 bytes an entry (8 with column sums, each of
// which is one chain of additions); energies read 4; the gathering of samples reads 4 and writes 1, the scattering of
// values reads 4 and writes 4, or reads 4 more to add; the search for outliers reads 4 twice.
#include "../arith/polar.h"
#include "select.cuh"

namespace {

enum { MOST_CLASSES = 127, MOST_CODES = 63, SECTION = 64, PLACES = 1024 };

struct EnergyShared {
    uint64_t of_class[MOST_CLASSES];
};

// A thread's column and its first row where a block goes over `width` columns of a matrix at once.
struct Sweep {
    int64_t column, row, rows_apart;
    bool active;
};
GC_INLINE Sweep sweep_over(int64_t first, int64_t columns) {
    const int64_t width = min64(THREADS, columns);
    Sweep own;
    own.rows_apart = THREADS / width;
    own.row = quotient(threadIdx.x, width);
    own.column = first + threadIdx.x - own.row * width;
    own.active = own.row < own.rows_apart && own.column < columns;
    return own;
}

}  // namespace

// Four threads a row, four of its 16 interleaved sums each.
GC_KERNEL(polar_row_sums)(const float* x, int64_t n, int64_t columns, float* sums_of_rows) {
    const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / 4, start = row * columns;
    const int64_t count = start < n ? min64(columns, n - start) : 0;
    const float* entries = x + start;
    const bool aligned = is_aligned(entries, 16);
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int64_t j = 4 * (threadIdx.x & 3);
    for (; j + 4 <= count; j += 16) {
        float four[4];
        load_four(entries + j, aligned, four);
        for (int k = 0; k < 4; ++k) sums[k] += sum_term(four[k]);
    }
    for (int k = 0; j + k < count; ++k) sums[k] += sum_term(entries[j + k]);
    for (int half = 2; half > 0; half /= 2)
        for (int k = 0; k < 4; ++k) sums[k] += __shfl_down_sync(ALL_LANES, sums[k], half, 4);
    sums[0] += sums[2];
    sums[1] += sums[3];
    if ((threadIdx.x & 3) == 0 && count > 0) sums_of_rows[row] = sums[0] + sums[1];
}
GC_REGISTER(polar_row_sums)

// A thread a column, from top to bottom.
GC_KERNEL(polar_column_sums)(const float* x, int64_t rows, int64_t columns, float* sums) {
    const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns) return;
    float sum = 0.0f;
    for (int64_t row = 0; row < rows; ++row) sum += sum_term(x[row * columns + column]);
    sums[column] = sum;
}
GC_REGISTER(polar_column_sums)

// Per class the sum of squares of its scaled, rounded entries. A class is the sum of a row's and a column's code (1 where
// there are none), 0 for a code 0. A block takes SECTION rows and PLACES columns.
GC_KERNEL(polar_energies)(const float* x, int64_t n, int64_t columns, const uint8_t* row_codes,
                          const uint8_t* column_codes, const float* scales, uint64_t* totals) {
    GC_SHARED(EnergyShared, shared);
    uint64_t* found = shared.of_class;
    const int64_t tiles = (columns + PLACES - 1) / PLACES, section = quotient(blockIdx.x, tiles);
    const int64_t first = ((int64_t)blockIdx.x - section * tiles) * PLACES;
    if (threadIdx.x < MOST_CLASSES) found[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t pass = first; pass < min64(columns, first + PLACES); pass += THREADS) {
        const Sweep own = sweep_over(pass, columns);
        const int code = !own.active ? 0 : column_codes ? column_codes[own.column] : 1;
        int of_class = 0;
        uint64_t total = 0;
        for (int64_t row = section * SECTION + own.row; code && row < (section + 1) * SECTION; row += own.rows_apart) {
            const int64_t i = row * columns + own.column;
            if (i >= n) break;
            const int row_code = row_codes ? row_codes[row] : 1, here = row_code ? row_code + code : 0;
            if (here != of_class) {
                if (total) atomicAdd(&found[of_class], total);
                of_class = here;
                total = 0;
            }
            if (here) total += (uint64_t)energy_of(x[i] * scales[here]);
        }
        if (total) atomicAdd(&found[of_class], total);
    }
    __syncthreads();
    if (threadIdx.x < MOST_CLASSES && found[threadIdx.x]) atomicAdd(&totals[threadIdx.x], found[threadIdx.x]);
}
GC_REGISTER(polar_energies)

namespace {

// How a matrix falls apart into classes: the entry in a row and at a place has the class row_codes[row] + run_codes[run
// of the place], columns being taken in `order` (null: as they lie); null row codes are 1. Class classes[s] is coded as
// number s, and its entries of section k of the rows begin at starts[k][s] among those of all tiles.
struct PolarLayout {
    int64_t n, columns;
    const uint8_t* row_codes;
    const int32_t* order;
    int64_t runs;
    const int32_t* run_ends;
    const uint8_t* run_codes;
    int64_t slots;
    const uint8_t* classes;
    const int64_t* starts;
    const float* scales;  // by which entries of each number become samples; null to decode
};

struct SpreadShared {
    int16_t run_of_code[MOST_CODES + 1];
};

// Calls visit(entry, where it lies among the tiles' or -1, its scale) for all entries of SECTION rows and PLACES places.
// `cursors` is shared memory for as many rows and all runs: where a row's entries of a run begin, and above 8 bits their
// number, or -1.
template <class Visit>
GC_INLINE void visit_entries(const PolarLayout& layout, SpreadShared* shared, int64_t* cursors, const Visit& visit) {
    const int64_t columns = layout.columns, tiles = (columns + PLACES - 1) / PLACES;
    const int64_t section = quotient(blockIdx.x, tiles), first = ((int64_t)blockIdx.x - section * tiles) * PLACES;
    const int64_t first_row = section * SECTION,
                  end_row = min64((layout.n + columns - 1) / columns, first_row + SECTION);
    if (threadIdx.x <= MOST_CODES) shared->run_of_code[threadIdx.x] = -1;
    for (int64_t i = threadIdx.x; i < SECTION * layout.runs; i += THREADS) cursors[i] = -1;
    __syncthreads();
    for (int64_t run = threadIdx.x; run < layout.runs; run += THREADS)
        if (layout.run_codes[run]) shared->run_of_code[layout.run_codes[run]] = (int16_t)run;
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < layout.slots; slot += THREADS) {
        int64_t at = layout.starts[section * layout.slots + slot];
        for (int64_t row = first_row; row < end_row; ++row) {
            const int row_code = layout.row_codes ? layout.row_codes[row] : 1, code = layout.classes[slot] - row_code;
            const int64_t run = row_code && code > 0 && code <= MOST_CODES ? shared->run_of_code[code] : -1;
            if (run < 0) continue;
            cursors[(row - first_row) * layout.runs + run] = at << 8 | slot;
            at += layout.run_ends[run] - (run ? layout.run_ends[run - 1] : 0);
        }
    }
    __syncthreads();
    for (int64_t pass = first; pass < min64(columns, first + PLACES); pass += THREADS) {
        const Sweep own = sweep_over(pass, columns);
        if (!own.active) continue;
        int64_t run = 0;  // the first that ends behind the place
        for (int64_t high = layout.runs - 1; run < high;) {
            const int64_t middle = (run + high) / 2;
            if (layout.run_ends[middle] > own.column)
                high = middle;
            else
                run = middle + 1;
        }
        const int64_t within = own.column - (run ? layout.run_ends[run - 1] : 0);
        const int64_t column = layout.order ? layout.order[own.column] : own.column;
        for (int64_t row = first_row + own.row; row < end_row; row += own.rows_apart) {
            const int64_t entry = row * columns + column, cursor = cursors[(row - first_row) * layout.runs + run];
            if (entry >= layout.n) break;
            const float scale = cursor >= 0 && layout.scales ? layout.scales[cursor & 255] : 0.0f;
            visit(entry, cursor >= 0 ? (cursor >> 8) + within : -1, scale);
        }
    }
}

}  // namespace

// Samples in the order of the tiles.
GC_KERNEL(polar_gather)(const float* x, const PolarLayout* layout, int8_t* samples) {
    GC_DYNAMIC_SHARED(int64_t, cursors);
    GC_SHARED(SpreadShared, shared);
    visit_entries(*layout, &shared, cursors, [&](int64_t entry, int64_t place, float scale) {
        if (place >= 0) samples[place] = sample_of(x[entry] * scale);
    });
}
GC_REGISTER(polar_gather)

// The inverse: what is not coded is 0.
GC_KERNEL(polar_scatter)(const float* values, const PolarLayout* layout, int64_t add, float* out) {
    GC_DYNAMIC_SHARED(int64_t, cursors);
    GC_SHARED(SpreadShared, shared);
    visit_entries(*layout, &shared, cursors, [&](int64_t entry, int64_t place, float) {
        const float value = place >= 0 ? values[place] : 0.0f;
        out[entry] = add ? out[entry] + value : value;
    });
}
GC_REGISTER(polar_scatter)

namespace {

// The limits of outliers: factors of rows and columns, of which there is only one where all are alike.
struct PolarLimits {
    const float* x;
    int64_t n, columns;
    const float* rows;
    int64_t by_row;
    const float* of_columns;
    int64_t by_column;
    float floor, slope, intercept;
    GC_INLINE bool reached(int64_t i) const {
        const int64_t row = by_row || by_column ? quotient(i, columns) : 0;
        const float of_row = rows[by_row ? row : 0] * slope;
        const float of_column = of_columns[by_column ? i - row * columns : 0];
        return magnitude_of(x[i]) >= outlier_limit(of_row, of_column, intercept, floor);
    }
};

struct BeyondShared {
    TileBits bits;
    ScanShared scan;
};

// The entries of a tile that reach their limits, as ranked bits; returns their number.
GC_INLINE uint32_t find_beyond(const PolarLimits& limits, BeyondShared* shared) {
    for (int round = 0; round < ROUNDS; ++round) {
        const int place = round * THREADS + (int)threadIdx.x;
        const int64_t i = (int64_t)blockIdx.x * TILE + place;
        const uint32_t word = __ballot_sync(ALL_LANES, i < limits.n && limits.reached(i));
        if (lane() == 0) shared->bits.words[place >> 5] = word;
    }
    return rank_bits(&shared->bits, &shared->scan);
}

}  // namespace

GC_KERNEL(polar_count_beyond)(const float* x, int64_t n, int64_t columns, const float* rows, int64_t by_row,
                              const float* of_columns, int64_t by_column, double floor, double slope, double intercept,
                              uint32_t* counts) {
    GC_SHARED(BeyondShared, shared);
    const PolarLimits limits = {x,          n,         columns,      rows,         by_row,
                                of_columns, by_column, (float)floor, (float)slope, (float)intercept};
    const uint32_t total = find_beyond(limits, &shared);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}
GC_REGISTER(polar_count_beyond)

// Their places, in rising order; `before` counts those of the tiles before.
GC_KERNEL(polar_beyond)(const float* x, int64_t n, int64_t columns, const float* rows, int64_t by_row,
                        const float* of_columns, int64_t by_column, double floor, double slope, double intercept,
                        const uint32_t* before, int64_t* places) {
    GC_SHARED(BeyondShared, shared);
    const PolarLimits limits = {x,          n,         columns,      rows,         by_row,
                                of_columns, by_column, (float)floor, (float)slope, (float)intercept};
    find_beyond(limits, &shared);
    for (int place = (int)threadIdx.x; place < TILE; place += THREADS)
        if (shared.bits.has(place))
            places[before[blockIdx.x] + shared.bits.rank(place)] = (int64_t)blockIdx.x * TILE + place;
}
GC_REGISTER(polar_beyond)
