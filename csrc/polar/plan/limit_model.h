// Polar's plan: from which magnitude on an entry is an outlier (gcompress/compressors/polar/limit_model.py): a model of
// what it costs to send it apart, and what to leave it in.
#ifndef GCOMPRESS_POLAR_PLAN_LIMIT_MODEL_H
#define GCOMPRESS_POLAR_PLAN_LIMIT_MODEL_H

#include "outliers.h"
#include "water.h"

namespace {

const int64_t LIMIT_SAMPLE = 1 << 16;  // entries
const int LIMIT_BINS = 128, LOWEST_OCTAVE = -4;
const int STRONGEST = 80, STRONGEST_ABOVE = 104, WEAKEST = 320;
const double SLOPE = 0.69, INTERCEPT = 0.4;
const double LOW_LIMIT_RATE = 1.0 / 32;
const double GAUSSIAN_TAIL[8] = {1.0, 0.4191, 0.1507, 0.0461, 0.0115, 0.0024, 0.0004, 0.0};

// What limits of some strength would do; strength 0: no limits.
struct LimitOption {
    bool there;
    int strength, lowest;
    Limits limits;
    double error, outliers;
};

// A sample of the entries of every class by magnitude, in deviations that the class's code stands for.
struct LimitModel {
    const PlanTables* tables;
    int classes[CLASSES], count;
    int64_t all, nbytes;
    double counts[CLASSES], deviations[CLASSES], squares[CLASSES], unit;
    double* above[3];  // [class][LIMIT_BINS + 1]: share, sum of magnitudes, of squares in a bin and higher ones
    bool flat;

    double from(int which, int k, double limit) const {
        double place = octave_place(limit, LOWEST_OCTAVE);
        place = place > 0.0 ? place : 0.0;
        place = place > LIMIT_BINS ? LIMIT_BINS : place;
        const int64_t low = min64((int64_t)place, LIMIT_BINS - 1);
        const double part = place - (double)low, *sums = above[which] + k * (LIMIT_BINS + 1) + low;
        return sums[0] * (1 - part) + sums[1] * part;
    }
    double mean_from(int which, int k) const { return above[which][k * (LIMIT_BINS + 1)]; }

    bool set(const PlanTables* tables_, const float* values, const Layout& layout, double total, int64_t nbytes_,
             bool flat_, Room* room);
    double tail() const;
    double bits(const double* limits, double outliers) const;
    double error(const double* rates, const double* energy, const double* magnitude, const double* limits) const;
    bool fill_water(const double* logarithms, double bits, double* rates, double* water) const;
    LimitOption modelled(int strength) const;
    LimitOption for_share(double share) const;
    LimitOption choose(double share, bool thorough) const;
};

// Adds the magnitudes of about LIMIT_SAMPLE entries to their classes' bins, [CLASSES][LIMIT_BINS]; those of a code 0 count in 0.
inline void count_magnitudes(const float* x, const Layout& layout, const float* scales, int32_t* members) {
    const int64_t step = ceil_div(layout.numel, LIMIT_SAMPLE), lone = layout.lone();
    const int64_t columns = lone ? 256 : layout.columns, rows = ceil_div(layout.numel, columns);
    for (int64_t row = 0; row < rows; row += step) {
        const int64_t start = row * columns, length = min64(columns, layout.numel - start);
        if (lone && step > 1 && length < columns) break;
        const int of_row = layout.row_codes ? layout.row_codes[row] : NO_CODE;
        for (int64_t first = 0; first < length; first += 64) {
            const int64_t end = min64(length, first + 64);
            int32_t bins[64];
            const float* part = x + start;
            if (layout.column_codes) {
                for (int64_t j = first; j < end; ++j) {
                    const int of_column = layout.column_codes[j];
                    const int of_class = of_row > 0 && of_column > 0 ? of_row + of_column : 0;
                    bins[j - first] = (int32_t)float_bits(magnitude_of(part[j]) * scales[of_class]);
                }
            } else {
                const float scale = scales[of_row > 0 ? of_row + NO_CODE : 0];
                for (int64_t j = first; j < end; ++j)  // vectorised
                    bins[j - first] = (int32_t)float_bits(magnitude_of(part[j]) * scale);
            }
            for (int64_t j = first; j < end; ++j) {
                const int of_column = layout.column_codes ? layout.column_codes[j] : NO_CODE;
                const int of_class = of_row > 0 && of_column > 0 ? of_row + of_column : 0;
                int32_t bin = (bins[j - first] >> 20) - ((127 + LOWEST_OCTAVE) << 3);
                bin = bin < 0 ? 0 : bin > LIMIT_BINS - 1 ? LIMIT_BINS - 1 : bin;
                ++members[of_class * LIMIT_BINS + bin];
            }
        }
    }
}

inline bool LimitModel::set(const PlanTables* tables_, const float* values, const Layout& layout, double total,
                            int64_t nbytes_, bool flat_, Room* room) {
    tables = tables_;
    nbytes = nbytes_;
    flat = flat_;
    all = 0;
    count = 0;
    int64_t of_class[CLASSES];
    double terms[CLASSES];
    float scales[CLASSES];
    class_counts(layout, of_class);
    for (int k = 0; k < CLASSES; ++k) {
        if (!of_class[k]) continue;
        classes[count] = k;
        counts[count] = (double)of_class[k];
        deviations[count] = tables->power(16 * k);
        squares[count] = deviations[count] * deviations[count];
        terms[count] = counts[count] * deviations[count];
        all += of_class[k];
        ++count;
    }
    int32_t* members = room->take<int32_t>(CLASSES * LIMIT_BINS);
    for (int which = 0; which < 3; ++which) above[which] = room->take<double>(count * (LIMIT_BINS + 1));
    if (room->full()) return false;
    unit = total * GAUSSIAN_RMS / exact_sum(terms, count);
    for (int k = 0; k < CLASSES; ++k) scales[k] = (float)(1.0 / (unit * tables->power(16 * k)));
    memset(members, 0, CLASSES * LIMIT_BINS * sizeof *members);
    count_magnitudes(values, layout, scales, members);
    double middle[LIMIT_BINS];
    for (int bin = 0; bin < LIMIT_BINS; ++bin)
        middle[bin] = bin ? times_two_to(1 + (bin % 8 + 0.5) / 8, bin / 8 + LOWEST_OCTAVE) : 0.0;
    for (int k = 0; k < count; ++k) {
        const int32_t* mine = members + classes[k] * LIMIT_BINS;
        int64_t sum = 0;
        for (int bin = 0; bin < LIMIT_BINS; ++bin) sum += mine[bin];
        double *n = above[0] + k * (LIMIT_BINS + 1), *s1 = above[1] + k * (LIMIT_BINS + 1),
               *s2 = above[2] + k * (LIMIT_BINS + 1);
        n[LIMIT_BINS] = s1[LIMIT_BINS] = s2[LIMIT_BINS] = 0.0;
        for (int bin = LIMIT_BINS - 1; bin >= 0; --bin) {
            const double share = mine[bin] / (double)max64(sum, 1), size = share * middle[bin];
            n[bin] = n[bin + 1] + share;
            s1[bin] = s1[bin + 1] + size;
            s2[bin] = s2[bin + 1] + size * middle[bin];
        }
    }
    return true;
}

// The share of the energy that lies beyond 4 modelled deviations.
inline double LimitModel::tail() const {
    double beyond[CLASSES], whole[CLASSES];
    for (int k = 0; k < count; ++k) {
        const double energy = counts[k] * tables->power(32 * classes[k]);
        beyond[k] = energy * from(2, k, 4.0);
        whole[k] = energy * mean_from(2, k);
    }
    return exact_sum(beyond, count) / most_of(exact_sum(whole, count), 1e-300);
}

// -p log2 p - (1 - p) log2(1 - p)
inline double entropy_of(double share) {
    if (!(0 < share && share < 1)) return 0.0;
    return -(share * logarithm(share) + (1 - share) * logarithm(1 - share)) / PLAN_LOG_TWO;
}

// About what outliers take: layers of gaps, signs, mantissas.
inline double LimitModel::bits(const double* limits, double outliers) const {
    double found = 8.0 * OUTLIERS_BYTES + outliers, universe = (double)all, factor = 1.0, members = outliers;
    double terms[CLASSES];
    for (int layers = 0; members > 0.5 && layers < MOST_LAYERS; ++layers) {
        found += 8 * LAYER_BYTES + universe * entropy_of(members / universe) + 0.06 * members;
        universe = members;
        factor = 2 * factor;
        for (int k = 0; k < count; ++k) terms[k] = counts[k] * from(0, k, factor * limits[k]);
        members = exact_sum(terms, count);
        found += members;
    }
    return found;
}

// The modelled squared error of every class: what a real code makes of a Gaussian, and what it loses otherwise.
inline double LimitModel::error(const double* rates, const double* energy, const double* magnitude,
                                const double* limits) const {
    double terms[CLASSES];
    const double rms = python_square(GAUSSIAN_RMS);
    for (int k = 0; k < count; ++k) {
        const double rate = rates[k], ideal = 1 / exponential(-2 * PLAN_LOG_TWO * rate);
        const double loss = least_of(1.012 + rate / 8, 1.2);
        double gain = 1 - least_of(loss / ideal, 1.0);
        double peaked = 1 - magnitude[k] * magnitude[k] / most_of(energy[k], 1e-300) * rms;
        peaked = least_of(most_of(peaked, 0.0), 1.0);
        gain *= 1 - peaked * (rate <= 0.6 ? 0.3 + 0.9 * rate : 0.25);
        double part = energy[k] * (1 - gain);
        if (rate > 1) {
            const int64_t steps = (int64_t)(64 * rate), levels = levels_for(steps);
            const PlanDesign& design = tables->design(design_index(tables, (int)levels, (steps + 4) / 8));
            const double largest = (double)design.largest / (levels == 1 ? 1 : POINT_ONE);
            const double place = least_of(2 * largest, 8 - 1.001);
            const int low = (int)place;
            const double tail = GAUSSIAN_TAIL[low] + (place - low) * (GAUSSIAN_TAIL[low + 1] - GAUSSIAN_TAIL[low]);
            const double reach = largest * square_root(energy[k]), first = least_of(reach, limits[k]);
            const double n = from(0, k, first) - from(0, k, limits[k]), s1 = from(1, k, first) - from(1, k, limits[k]);
            const double s2 = from(2, k, first) - from(2, k, limits[k]);
            const double excess = s2 - 2 * reach * s1 + reach * reach * n - 0.6 * tail * energy[k];
            part += 0.35 * most_of(excess, 0.0);
        } else {
            part += 0.0;
        }
        terms[k] = counts[k] * part * squares[k];
    }
    return exact_sum(terms, count);
}

// Rates of the classes in bits and the root of the mean error of what is coded; false if nothing can be coded.
inline bool LimitModel::fill_water(const double* logarithms, double bits, double* rates, double* water) const {
    if (!(bits > 0)) return false;
    if (flat) {
        const double rate = bits / (double)all;
        double sum = 0.0;
        for (int k = 0; k < count; ++k) {
            rates[k] = rate;
            sum += counts[k] * (logarithms[k] - rate);
        }
        *water = two_to(sum / (double)all);
        return true;
    }
    int order[CLASSES], last = -1;
    falling_order(logarithms, count, order);
    double volume = 0.0, members = 0.0, level = 0.0;
    for (int i = 0; i < count; ++i) {
        const int k = order[i];
        volume += counts[k] * logarithms[k];
        members += counts[k];
        const double here = (volume - bits) / members;
        if (logarithms[k] - here >= LOW_LIMIT_RATE) last = i, level = here;
    }
    *water = two_to(last < 0 ? logarithms[order[0]] : level);  // too little for any: all is for outliers
    for (int k = 0; k < count; ++k) {
        const double rate = logarithms[k] - level;
        rates[k] = last >= 0 && rate >= LOW_LIMIT_RATE ? rate : 0.0;
    }
    return true;
}

// The option, after three rounds in which water level and limits find each other.
inline LimitOption LimitModel::modelled(int strength) const {
    LimitOption option = {false, strength, CLASSES, {0.0f, 0.0f}, 0.0, 0.0};
    double energy[CLASSES], magnitude[CLASSES], limits[CLASSES], rates[CLASSES], logarithms[CLASSES], guess[CLASSES];
    double terms[CLASSES], weights[CLASSES], floor = 0.0, slope = 0.0, spent = 0.0, water;
    for (int k = 0; k < count; ++k) {
        energy[k] = mean_from(2, k);
        magnitude[k] = mean_from(1, k);
        limits[k] = PLAN_INFINITY;
    }
    for (int turn = 0;; ++turn) {
        for (int k = 0; k < count; ++k) {
            guess[k] = turn == 0 && strength ? 1.0 : energy[k];
            logarithms[k] = logarithm(most_of(guess[k], 1e-12) * squares[k]) / (2 * PLAN_LOG_TWO);
        }
        if (!fill_water(logarithms, (double)(8 * nbytes) - spent, rates, &water)) return option;
        if (turn == 3 || !strength) break;
        for (int k = 0; k < count; ++k) {
            weights[k] = rates[k] > 0 ? counts[k] * squares[k] : 1e-300;
            terms[k] = weights[k] * guess[k];
        }
        const double relative = square_root(exact_sum(terms, count) / exact_sum(weights, count));
        const double factor = tables->power(strength);
        floor = factor * water;
        slope = factor * SLOPE * relative;
        double shares[CLASSES];
        for (int k = 0; k < count; ++k) {
            limits[k] = most_of(floor, slope * deviations[k] + INTERCEPT * floor) / deviations[k];
            shares[k] = from(0, k, limits[k]);
            terms[k] = counts[k] * shares[k];
        }
        option.outliers = exact_sum(terms, count);
        for (int k = 0; k < count; ++k) {
            energy[k] = mean_from(2, k) - from(2, k, limits[k]) + shares[k] * limits[k] * limits[k] / 12;
            magnitude[k] = mean_from(1, k) - from(1, k, limits[k]) + shares[k] * limits[k] / 4;
        }
        spent = bits(limits, option.outliers);
    }
    option.error = error(rates, energy, magnitude, limits);
    for (int k = count - 1; k >= 0; --k)
        if (rates[k] > 0) option.lowest = classes[k];
    option.limits = {(float)least_of(floor * unit, PLAN_LARGEST), (float)least_of(slope * unit, PLAN_LARGEST)};
    option.there = !strength || !(option.limits.floor < 7.888609052210118e-31f);  // 2^-100
    return option;
}

// The strongest limits that about `share` of the entries reach, or fewer.
inline LimitOption LimitModel::for_share(double share) const {
    int strong = STRONGEST - 4, weak = WEAKEST;
    while (weak - strong > 4) {
        const int middle = (strong + weak) / 2;
        const LimitOption option = modelled(middle);
        const bool fits = option.there && option.outliers <= share * (double)all;
        if (fits)
            weak = middle;
        else
            strong = middle;
    }
    LimitOption option = modelled(weak);
    option.there = option.there && option.outliers >= 1;
    return option;
}

// The limits of least modelled error, or with a share of at least 0 for about that many entries.
inline LimitOption LimitModel::choose(double share, bool thorough) const {
    const int starts[2] = {128, 192}, steps[8] = {32, -32, 16, -16, 8, -8, 4, -4};
    if (share >= 0) return for_share(share);
    LimitOption best = {false, 0, CLASSES, {0.0f, 0.0f}, 0.0, 0.0};
    const double bits = (double)(8 * nbytes);
    if (!thorough && tail() < 0.0035 && bits < 2.2 * (double)all) return best;
    const int strongest = bits < 0.8 * (double)all ? STRONGEST : STRONGEST_ABOVE;
    const LimitOption none = modelled(0);
    for (int first : starts) {
        LimitOption option = modelled(first);
        while (!option.there && first < WEAKEST) option = modelled(first += 64);  // more outliers than bytes can name
        if (!option.there || (none.there && !(option.error < (thorough ? 0.995 : 0.985) * none.error))) continue;
        best = option;
        break;
    }
    for (int k = 0; best.there && k < 8; ++k) {
        while (strongest <= best.strength + steps[k] && best.strength + steps[k] <= WEAKEST) {
            const LimitOption option = modelled(best.strength + steps[k]);
            if (!option.there || option.error >= best.error) break;
            best = option;
        }
    }
    return best;
}

}  // namespace
#endif
