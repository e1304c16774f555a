// Polar's plan: the strongest outer products of a matrix, found on a sample and rounded to steps that the water level asks
// for (`find` of gcompress/compressors/polar/products.py).
//
// Every product of matrices here is of integers held in doubles and stays below 2^53: exact in any order.
#ifndef GCOMPRESS_POLAR_PLAN_PRODUCTS_H
#define GCOMPRESS_POLAR_PLAN_PRODUCTS_H

#include "factors.h"

namespace {

const int MOST_OF_FEW = 16, PRODUCT_ROUNDS = 3, BASIS_BITS = 15;
const int64_t SMALLEST_MATRIX = 4096, LARGEST_MATRIX = (int64_t)1 << 28, LARGEST_SIDE = 1 << 22;
const int64_t PRODUCT_SAMPLE = 1 << 17;  // entries
const double LEAST_GAIN = 0.95;  // to this a product must seem to lower the error, before it is made and has to do so
const double LEAST_SHARE = 5.960464477539063e-08;  // 2^-24: of energy, where it is none

struct SquareMatrix {
    double at[MOST_COMPONENTS][MOST_COMPONENTS];
};

inline void gram_of(const ThinMatrix& columns, SquareMatrix* gram) {
    double sums[MOST_COMPONENTS * MOST_COMPONENTS] = {0.0};
    const ThinMatrix square = {sums, columns.stride, columns.count, columns.stride};
    add_outer({columns.at, columns.count, columns.stride}, columns.rows, columns.at, square);
    for (int64_t j = 0; j < columns.count; ++j)
        for (int64_t k = 0; k < columns.count; ++k) gram->at[j][k] = square.row(j)[k];
}

// Columns times a power of two each, in integers of up to 2^BASIS_BITS, in place; the powers.
inline void make_integral(const ThinMatrix& columns, double* powers) {
    double largest[MOST_COMPONENTS] = {0.0};
    for (int64_t i = 0; i < columns.rows; ++i) {
        const double* row = columns.row(i);
        for (int64_t k = 0; k < columns.stride; ++k) {
            const double size = __builtin_fabs(row[k]);
            largest[k] = size > largest[k] ? size : largest[k];
        }
    }
    for (int64_t k = 0; k < columns.stride; ++k) {
        int exponent;
        frexp(largest[k], &exponent);
        powers[k] = ldexp(1.0, BASIS_BITS - exponent);
    }
    for (int64_t i = 0; i < columns.rows; ++i) {
        double* row = columns.row(i);
        for (int64_t k = 0; k < columns.stride; ++k) row[k] = __builtin_rint(row[k] * powers[k]);
    }
}

// columns @ weights, the weights rounded to few enough bits that the product is exact; in place.
inline void combine(const ThinMatrix& columns, const SquareMatrix& weights) {
    double memory[MOST_COMPONENTS * MOST_COMPONENTS] = {0.0}, powers[MOST_COMPONENTS], result[4 * MOST_COMPONENTS];
    const ThinMatrix rounded = {memory, columns.count, columns.count, columns.stride};
    for (int64_t j = 0; j < columns.count; ++j)
        for (int64_t k = 0; k < columns.count; ++k) rounded.row(j)[k] = weights.at[j][k];
    make_integral(rounded, powers);
    for (int64_t k = 0; k < columns.stride; ++k) powers[k] = 1 / powers[k];  // of two: exact
    for (int64_t i = 0; i < columns.rows; i += 4) {
        const int64_t members = min64(4, columns.rows - i);
        double* rows = columns.row(i);
        times_thin({rows, columns.count, columns.stride}, members, rounded, result);
        for (int64_t m = 0; m < members; ++m)
            for (int64_t k = 0; k < columns.stride; ++k)
                rows[m * columns.stride + k] = result[m * columns.stride + k] * powers[k];
    }
}

// The upper triangular W with W^T G W = 1, columns of dependent ones 0.
inline void whiten(const SquareMatrix& gram, int64_t size, SquareMatrix* white) {
    double work[MOST_COMPONENTS][2 * MOST_COMPONENTS] = {{0.0}}, roots[MOST_COMPONENTS] = {0.0};
    for (int64_t i = 0; i < size; ++i) {
        for (int64_t k = 0; k < size; ++k) work[i][k] = gram.at[i][k];
        work[i][size + i] = 1.0;
    }
    for (int64_t i = 0; i < size; ++i) {
        if (work[i][i] <= LEAST_SHARE * gram.at[i][i]) {
            for (int64_t k = 0; k < size; ++k) work[k][i] = 0.0;
            for (int64_t k = 0; k < 2 * size; ++k) work[i][k] = 0.0;
            continue;
        }
        roots[i] = 1.0 / square_root(work[i][i]);
        for (int64_t r = i + 1; r < size; ++r) {
            const double ratio = work[r][i] / work[i][i];
            for (int64_t k = 0; k < 2 * size; ++k) work[r][k] -= ratio * work[i][k];
        }
    }
    for (int64_t j = 0; j < size; ++j)
        for (int64_t k = 0; k < size; ++k) white->at[j][k] = work[k][size + j] * roots[k];
}

// Gram-Schmidt, rounded to integers of length 2^BASIS_BITS; columns that depend on others become 0. In place.
inline void orthogonalize(const ThinMatrix& columns) {
    double powers[MOST_COMPONENTS];
    SquareMatrix gram, white;
    make_integral(columns, powers);
    gram_of(columns, &gram);
    whiten(gram, columns.count, &white);
    combine(columns, white);
    for (int64_t i = 0; i < columns.rows; ++i)
        for (int64_t k = 0; k < columns.stride; ++k)
            columns.row(i)[k] = __builtin_rint(columns.row(i)[k] * (double)(1 << BASIS_BITS));
}

inline double factor_rounded(double value, double factor) {
    const double nearest = __builtin_rint(value * factor);
    return nearest > LARGEST_FACTOR ? LARGEST_FACTOR : nearest < -LARGEST_FACTOR ? -LARGEST_FACTOR : nearest;
}

// The whole number nearest to the logarithm of a positive double to 2.
inline int octave_of(double value) {
    int exponent;
    const double mantissa = frexp(value, &exponent);
    return exponent - (mantissa * mantissa < 0.5);
}

// A float32 matrix as integers, the longer side's members one after the other.
struct LongSide {
    const float* x;
    int64_t members, length;  // length: of a member
    bool turned;              // members are columns of x
    float factor;             // by which entries become integers

    double integer(float value) const {
        const float nearest = nearest_float(value * factor);
        return nearest > 131072.0f ? 131072.0 : nearest < -131072.0f ? -131072.0 : (double)nearest;
    }
    static float nearest_float(float value) { return __builtin_rintf(value); }
    // `count` of the members, every `step`-th from `first` on, one after the other; at most 8.
    void take(int64_t first, int64_t step, int64_t count, double* integers) const {
        if (!turned) {
            for (int64_t k = 0; k < count; ++k)
                for (int64_t i = 0; i < length; ++i)
                    integers[k * length + i] = integer(x[(first + k * step) * length + i]);
            return;
        }
        int64_t i = 0;
        double block[8][8];  // as x has them
        for (; count == 8 && i + 8 <= length; i += 8) {
            for (int64_t j = 0; j < 8; ++j)
                for (int64_t k = 0; k < 8; ++k) block[j][k] = integer(x[(i + j) * members + first + k * step]);
            for (int64_t k = 0; k < 8; ++k)
                for (int64_t j = 0; j < 8; ++j) integers[k * length + i + j] = block[j][k];
        }
        for (; i < length; ++i)
            for (int64_t k = 0; k < count; ++k) integers[k * length + i] = integer(x[i * members + first + k * step]);
    }
    // Calls use(number of the first, count, their integers) for up to 8 members at a time; `memory` has room for 8.
    template <class Use>
    void for_each(double* memory, const Use& use) const {
        for (int64_t first = 0; first < members; first += 8) {
            const int64_t count = min64(8, members - first);
            take(first, 1, count, memory);
            use(first, count, memory);
        }
    }
};

// The strongest directions of the sample [members][length], integers that are about orthogonal, of length 2^BASIS_BITS.
inline void find_basis(const double* sample, int64_t members, int64_t length, const ThinMatrix& right,
                       const ThinMatrix& left) {
    const Members of = {sample, length, length};
    for (int round = 0; round < PRODUCT_ROUNDS; ++round) {
        if (round) {
            times_thin(of, members, right, left.at);
            orthogonalize(left);
        } else {
            left.clear();
            for (int64_t i = 0, index = 0; i < members; ++i)
                for (int64_t k = 0; k < left.count; ++k)
                    left.row(i)[k] = 1.0 - 2.0 * (hashed((uint32_t)index++, 0) & 1);
        }
        right.clear();
        add_outer(of, members, left.at, right);
        orthogonalize(right);
    }
}

// Squares of the components in the sample (packing.ordered_sum).
inline void component_powers(const double* sample, int64_t members, int64_t length, const ThinMatrix& basis,
                             const ThinMatrix& results, double* powers) {
    double lanes[SUM_LANES][MOST_COMPONENTS], totals[MOST_COMPONENTS] = {0.0};
    const int64_t stride = basis.stride;
    times_thin({sample, length, length}, members, basis, results.at);
    for (int64_t first = 0; first < members; first += SUM_BLOCK) {
        memset(lanes, 0, sizeof lanes);
        for (int64_t i = first; i < min64(members, first + SUM_BLOCK); ++i) {
            const double* result = results.row(i);
            double* lane = lanes[(i - first) % SUM_LANES];
            for (int64_t k = 0; k < stride; ++k) lane[k] += result[k] * result[k] * 9.313225746154785e-10;  // 2^-30
        }
        for (int half = SUM_LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane)
                for (int64_t k = 0; k < stride; ++k) lanes[lane][k] += lanes[lane + half][k];
        for (int64_t k = 0; k < stride; ++k) totals[k] += lanes[0][k];
    }
    memcpy(powers, totals, sizeof totals);
}

// Bits of a factor with that many entries whose component has energy `power`.
inline double factor_bits(double power, int64_t entries, double water) {
    const double ratio = power / ((double)entries * water);
    return (double)entries * most_of(logarithm(least_of(most_of(ratio, 1e-9), 1e300)) / (2 * PLAN_LOG_TWO) + 0.7, 1.0);
}

// Whether the first of the components, or some, or all, seem to pay if they have not taken what a sample of noise would show
// (`_left_beyond_noise` of products.py).
inline bool beats_noise(const double* powers, const double* spent, int count, double energy, int64_t members,
                        int64_t length, int64_t rows, double bits, const ErrorModel& model) {
    const double enough = LEAST_GAIN * energy * model.left_over(bits);
    double rest = energy;
    for (int k = 0; k < count; ++k) rest = most_of(rest - powers[k], 0.0);
    const double entries = (double)(members * length);
    const double shown =
        (1.0 - (double)members / (double)rows) * ((double)length + 2.0 * square_root(entries)) / entries;
    for (int k = 0; k < count; ++k) {
        energy -= most_of(powers[k] - rest * shown, 0.0);
        if (energy * model.left_over(bits - spent[k]) < enough) return true;
    }
    return false;
}

// The number of components of least modelled error, the water level: the mean squared error of an entry, and the bits of the
// first, of two and so on.
inline int choose_components(const double* powers, int64_t most, double energy, double sampled, const LongSide& matrix,
                             int64_t bits, const ErrorModel& model, double* water, double* bits_of) {
    const double entries = (double)(matrix.members * matrix.length);
    double least = energy * model.left_over((double)bits), spent = 8 * (FACTORS_BYTES + LENGTH_BYTES), left = energy;
    if (least <= 0) return 0;
    int best = 0, worse = 0;
    double level = *water = least / sampled;
    for (int count = 1; count <= most; ++count) {
        const double power = powers[count - 1];
        left = most_of(left - power, 0.0);
        const double here = power * entries / sampled;
        spent +=
            8 * COMPONENT_BYTES + (factor_bits(here, matrix.members, level) + factor_bits(here, matrix.length, level));
        bits_of[count - 1] = spent;
        if (power <= 0 || spent >= 0.9 * (double)bits) break;
        const double error = left * model.left_over((double)bits - spent);
        level = most_of(error, LEAST_SHARE * energy) / sampled;
        if (error < least) {
            best = count;
            *water = level;
            least = error;
            worse = 0;
        } else if (++worse > 2) {
            break;
        }
    }
    return best;
}

// The factors of least modelled error of a float32 matrix whose magnitudes sum to `total`; false: none, or no room.
// `most`: components at most, -1: as many as pay.
inline bool find_factors(const float* x, int64_t rows, int64_t columns, double total, int64_t nbytes,
                         const ErrorModel& model, int most, Factors* factors, Room* room) {
    const int64_t numel = rows * columns;
    if (numel < SMALLEST_MATRIX || numel > LARGEST_MATRIX || rows > LARGEST_SIDE || columns > LARGEST_SIDE)
        return false;
    if (most < 0) most = (double)(8 * nbytes) >= 0.4 * (double)numel ? MOST_COMPONENTS : MOST_OF_FEW;
    int octave;
    frexp(total / (double)numel, &octave);
    const int exponent = 5 - octave;  // the mean magnitude is about 2^5 steps of the integers
    const bool turned = rows < columns;
    const LongSide matrix = {x, turned ? columns : rows, turned ? rows : columns, turned, (float)ldexp(1.0, exponent)};
    const int64_t length = matrix.length, count = min64(most, length);
    const int64_t step = max64(1, matrix.members / max64(PRODUCT_SAMPLE / length, 4 * MOST_OF_FEW));
    const int64_t members = ceil_div(matrix.members, step);
    int32_t* memory = room->take<int32_t>(count * (rows + columns));
    const Room before = *room;
    double* sample = room->take<double>(members * length);
    double* buffer = room->take<double>(8 * length);
    const ThinMatrix right = ThinMatrix::with_room(length, count, room);
    const ThinMatrix left = ThinMatrix::with_room(members, count, room);
    if (room->full()) return false;
    double energy = 0.0, powers[MOST_COMPONENTS], spent[MOST_COMPONENTS], water = 0.0;
    for (int64_t i = 0; i < members; ++i) {
        double* integers = sample + i * length;
        if (i % 8 == 0) matrix.take(i * step, step, min64(8, members - i), integers);
        double sums[8] = {0.0};
        int64_t j = 0;
        for (; j + 8 <= length; j += 8)
            for (int k = 0; k < 8; ++k) sums[k] += integers[j + k] * integers[j + k];
        for (; j < length; ++j) sums[0] += integers[j] * integers[j];
        for (int k = 0; k < 8; ++k) energy += sums[k];
    }
    find_basis(sample, members, length, right, left);
    component_powers(sample, members, length, right, left, powers);
    const int chosen =
        choose_components(powers, count, energy, (double)(members * length), matrix, 8 * nbytes, model, &water, spent);
    if (!beats_noise(powers, spent, chosen, energy, members, length, matrix.members, (double)(8 * nbytes), model))
        return false;

    const double root = square_root(12 * water);
    const ThinMatrix basis = ThinMatrix::with_room(length, chosen, room);
    const ThinMatrix sums = ThinMatrix::with_room(length, chosen, room);
    const ThinMatrix rounded = ThinMatrix::with_room(matrix.members, chosen, room);
    if (room->full()) return false;
    basis.clear();
    for (int64_t i = 0; i < length; ++i) memcpy(basis.row(i), right.row(i), (size_t)chosen * sizeof(double));
    sums.clear();
    const double factor = ldexp(1.0, -(BASIS_BITS + octave_of(root)));
    matrix.for_each(buffer, [&](int64_t first, int64_t some, const double* integers) {
        double* rows_of = rounded.row(first);
        times_thin({integers, length, length}, some, basis, rows_of);
        for (int64_t k = 0; k < some * rounded.stride; ++k) rows_of[k] = factor_rounded(rows_of[k], factor);
        add_outer({integers, length, length}, some, rows_of, sums);
    });
    SquareMatrix lengths, white, weights;
    gram_of(rounded, &lengths);
    make_integral(sums, powers);
    whiten(lengths, chosen, &white);
    for (int j = 0; j < chosen; ++j) {
        for (int k = 0; k < chosen; ++k) {
            double sum = 0.0;
            for (int i = 0; i < chosen; ++i) sum += white.at[j][i] * white.at[k][i];
            weights.at[j][k] = sum / powers[j];
        }
    }
    combine(sums, weights);
    int steps[MOST_COMPONENTS], highest = -(1 << 20);
    for (int j = 0; j < chosen; ++j) {
        steps[j] = octave_of(root / square_root(most_of(lengths.at[j][j], 1.0)));
        highest = steps[j] > highest ? steps[j] : highest;
    }
    *factors = {};
    factors->rows = rows;
    factors->columns = columns;
    factors->count = chosen;
    for (int j = 0; j < chosen; ++j) {
        const int here = steps[j] > highest - MOST_SHIFT ? steps[j] : highest - MOST_SHIFT;
        factors->exponents[j] = here - exponent;
        int32_t *of_members = memory, *of_length = memory + matrix.members;
        memory += rows + columns;
        factors->left[j] = turned ? of_length : of_members;
        factors->right[j] = turned ? of_members : of_length;
        for (int64_t i = 0; i < matrix.members; ++i) of_members[i] = (int32_t)rounded.row(i)[j];
        for (int64_t i = 0; i < length; ++i) of_length[i] = (int32_t)factor_rounded(sums.row(i)[j], ldexp(1.0, -here));
    }
    *room = before;
    return true;
}

}  // namespace
#endif
