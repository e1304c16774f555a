// Polar's plan: which rate every variance gets (gcompress/compressors/polar/water.py).
#ifndef GCOMPRESS_POLAR_PLAN_WATER_H
#define GCOMPRESS_POLAR_PLAN_WATER_H

#include "layout.h"

namespace {

const int64_t HEADER_BYTES = 12, CLASS_BYTES = 4, TILE_BYTES = 2, SMALLEST_PAYLOAD = 28;
const int64_t LOWEST_RATE = 2, PLAIN_RATE = 384, PLAIN_COST = 512;

// Numbers of classes in falling order of their values, equal ones in rising order. Values that rise need the least time.
template <class T>
inline void falling_order(const T* values, int count, int* order) {
    for (int k = count - 1, n = 0; k >= 0; --k, ++n) {
        int i = n;
        for (; i > 0 && values[order[i - 1]] <= values[k]; --i) order[i] = order[i - 1];
        order[i] = k;
    }
}

// Whether there is a level above which half-logarithmic variances cost `bits` bits, and the level.
inline bool water_level(const int64_t* counts, const int64_t* variances, const int* order, int64_t bits,
                        int64_t* level) {
    if (bits <= 0) return false;
    int64_t members = 0, volume = 0;
    bool found = false;
    for (int i = 0; i < CLASSES; ++i) {
        const int k = order[i];
        if (counts[k] <= 0) continue;
        members += counts[k];
        volume += counts[k] * variances[k];
        const int64_t here = floor_div(volume - 64 * bits, members);
        if (variances[k] - here < LOWEST_RATE) continue;
        *level = here;
        found = true;
    }
    return found;
}

// Rates in 1/64 bit per entry of all classes, 0 for those not coded; false if nothing can be coded.
inline bool class_rates(const int64_t* counts, const int64_t* variances, int64_t bits, bool flat, int64_t* rates) {
    if (flat) {
        int64_t total = 0;
        for (int k = 0; k < CLASSES; ++k) total += counts[k];
        if (total == 0 || bits <= 0) return false;
        for (int k = 0; k < CLASSES; ++k) rates[k] = counts[k] > 0 ? max64(1, 64 * bits / total) : 0;
        return true;
    }
    int order[CLASSES];
    falling_order(variances, CLASSES, order);
    int64_t water, lower, rest[CLASSES], left = bits;
    if (!water_level(counts, variances, order, bits, &water)) return false;
    bool plain[CLASSES], any = false;
    for (int k = 0; k < CLASSES; ++k) {
        plain[k] = variances[k] - water > PLAIN_RATE && counts[k] > 0;
        any |= plain[k];
        rest[k] = plain[k] ? 0 : counts[k];
        left -= plain[k] ? 8 * counts[k] : 0;
    }
    if (any && water_level(rest, variances, order, left, &lower))
        water = lower;
    else
        any = false;
    for (int k = 0; k < CLASSES; ++k) {
        const int64_t rate = any && plain[k] ? PLAIN_COST : min64(variances[k] - water, PLAIN_RATE);
        rates[k] = rate >= LOWEST_RATE && counts[k] > 0 ? rate : 0;
    }
    return true;
}

// The modelled error of a payload with a layout's scale codes, from its bits, by the codes alone; infinite where nothing
// fits. It and `energy` are in squares of what code 0 stands for.
struct ErrorModel {
    const PlanTables* tables;
    int64_t counts[CLASSES], variances[CLASSES], overhead;
    bool flat;
    double energy;

    ErrorModel(const PlanTables* tables_, const Layout& layout, bool flat_) : tables(tables_), flat(flat_) {
        int64_t nothing[CLASSES] = {0};
        class_counts(layout, counts);
        for (int k = 0; k < CLASSES; ++k) variances[k] = 16 * k;
        overhead = 8 * (HEADER_BYTES + CLASS_BYTES + TILE_BYTES + side_bytes(layout));
        energy = error_of(nothing);
    }
    double error_of(const int64_t* rates) const {
        double terms[CLASSES];
        int n = 0;
        for (int k = 0; k < CLASSES; ++k)
            if (counts[k]) terms[n++] = (double)counts[k] * tables->power(2 * (variances[k] - rates[k]));
        return exact_sum(terms, n);
    }
    double error(double bits) const {  // bits are cut to a whole number
        int64_t rates[CLASSES];
        return class_rates(counts, variances, (int64_t)bits - overhead, flat, rates) ? error_of(rates) : PLAN_INFINITY;
    }
    double left_over(double bits) const { return least_of(error(bits) / energy, 1.0); }
};

// The total of magnitudes, how to class entries, whether there is anything to code, and the squared error expected.
struct Survey {
    double total, error;
    Layout layout;
    bool something;
};

// The layout with the least modelled error, judged by the finest one's variances: which of the candidates.
inline bool choose_layout(const PlanTables* tables, const Layout* layouts, int count, int64_t nbytes, bool flat,
                          Survey* survey) {
    const double least_gain = 0.96;
    const Layout& finest = layouts[count - 1];
    const double row_power = mean_power(tables, finest.row_codes, finest.rows());
    const double column_power = mean_power(tables, finest.column_codes, finest.columns);
    survey->something = false;
    survey->error = PLAN_INFINITY;
    for (int k = 0; k < count; ++k) {
        double error = ErrorModel(tables, layouts[k], flat).error((double)(8 * nbytes));
        error *= layouts[k].row_codes ? 1.0 : row_power;
        error *= layouts[k].column_codes ? 1.0 : column_power;
        if (!(error < survey->error * (survey->something ? least_gain : 1.0))) continue;
        survey->layout = layouts[k];
        survey->error = error;
        survey->something = true;
    }
    return survey->something;
}

// What code 0 stands for in a layout of entries whose magnitudes sum to `total`.
inline double deviation_of_zero(const PlanTables* tables, const int64_t* counts, double total) {
    double terms[CLASSES];
    int n = 0;
    for (int k = 0; k < CLASSES; ++k)
        if (counts[k]) terms[n++] = (double)counts[k] * tables->power(16 * k);
    return total * GAUSSIAN_RMS / exact_sum(terms, n);
}

// coding._survey, from sums over rows and, or null, columns; `codes` has room for rows and columns.
inline Survey survey_of(const PlanTables* tables, int64_t numel, int64_t columns, const float* row_sums,
                        const float* column_sums, bool by_tensor, int64_t nbytes, bool flat, uint8_t* codes) {
    Layout layouts[4] = {{numel, numel, 0, 0}, {numel, columns, codes, 0}, {numel, columns, 0, 0}, {}};
    const int64_t rows = ceil_div(numel, columns);
    Survey survey = {0.0, PLAN_INFINITY, layouts[0], false};
    for (int64_t i = 0; i < rows; ++i) survey.total += (double)row_sums[i];
    survey.total *= 16777216.0;
    if (!(__builtin_fabs(survey.total) <= 1.7976931348623157e308)) return survey;
    if (survey.total / (double)numel < 3.2311742677852644e-27) {  // 2^-88
        survey.error = 0.0;
        return survey;
    }
    int count = 1;
    if (!by_tensor) {
        scale_codes(tables, row_sums, rows, (double)columns, (double)(numel - columns * (rows - 1)), codes);
        count = 2;
        if (column_sums) {
            scale_codes(tables, column_sums, columns, 1.0, 1.0, codes + rows);
            layouts[2].column_codes = codes + rows;
            layouts[3] = {numel, columns, codes, codes + rows};
            count = 4;
        }
    }
    choose_layout(tables, layouts, count, nbytes, flat, &survey);
    int64_t counts[CLASSES];
    class_counts(layouts[count - 1], counts);
    survey.error *= python_square(deviation_of_zero(tables, counts, survey.total));
    return survey;
}

}  // namespace
#endif
