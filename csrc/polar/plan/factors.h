// Polar's plan: a product of two thin matrices of integers as bytes, and what a matrix is without it or with it
// (the bytes of gcompress/compressors/polar/products.py; products.h finds one).
#ifndef GCOMPRESS_POLAR_PLAN_FACTORS_H
#define GCOMPRESS_POLAR_PLAN_FACTORS_H

#include "layout.h"
#include "streams.h"
#include "thin.h"
#include "water.h"

namespace {

const int64_t FACTORS_BYTES = 7, COMPONENT_BYTES = 3, LENGTH_BYTES = 4;
const int MOST_COMPONENTS = 32, LARGEST_EXPONENT = 200, WIDEST = 20, MOST_SHIFT = 10;
const int32_t LARGEST_FACTOR = 1 << 18;

// Component j counts 2^exponents[j]: left[j] has an entry for every row, right[j] for every column.
struct Factors {
    int64_t rows, columns, count;
    int32_t *left[MOST_COMPONENTS], *right[MOST_COMPONENTS];
    int exponents[MOST_COMPONENTS];

    int least() const {
        int found = exponents[0];
        for (int64_t j = 1; j < count; ++j) found = exponents[j] < found ? exponents[j] : found;
        return found;
    }
};

// Rows of the product: sums of integers in doubles, which are exact, times a power of two.
struct ProductRows {
    enum { AT_ONCE = 4, CHUNK = 256 };  // rows; columns
    const Factors* factors;
    int64_t width;         // of a chunk
    double *right, scale;  // right: [chunk of columns][component][width], zeros behind the last column
    bool small;            // whether no entry can be beyond float32
    bool set(const Factors* factors_, Room* room) {
        factors = factors_;
        scale = ldexp(1.0, factors->least());
        small = factors->least() < 64;  // sums are below 2^53
        const int64_t count = factors->count, columns = factors->columns;
        width = (ceil_div(columns, ceil_div(columns, CHUNK)) + 7) / 8 * 8;
        right = room->take<double>(ceil_div(columns, width) * count * width);
        if (room->full()) return false;
        double* row = right;
        for (int64_t first = 0; first < columns; first += width)
            for (int64_t j = 0; j < count; ++j, row += width)
                for (int64_t i = 0; i < width; ++i)
                    row[i] = first + i < columns ? (double)factors->right[j][first + i] : 0.0;
        return true;
    }
    // Calls use(row, first column, count, their float32 products) for all columns of up to AT_ONCE rows.
    template <class Use>
    void for_rows(int64_t row, int64_t rows, const Use& use) const {
        const int64_t columns = factors->columns, count = factors->count;
        const int least = factors->least();
        double weights[AT_ONCE][MOST_COMPONENTS], exact[AT_ONCE * CHUNK];
        float product[CHUNK];
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t j = 0; j < count; ++j)
                weights[m][j] = (double)factors->left[j][row + m] * (double)(1 << (factors->exponents[j] - least));
        for (int64_t first = 0; first < columns; first += width) {
            const int64_t some = min64(width, columns - first);
            times_thin({weights[0], count, MOST_COMPONENTS}, rows, {right + first * count, count, width, width}, exact);
            for (int64_t m = 0; m < rows; ++m) {
                const double* sums = exact + m * width;
                if (small)
                    for (int64_t i = 0; i < some; ++i) product[i] = (float)(sums[i] * scale);  // vectorised
                else
                    for (int64_t i = 0; i < some; ++i) product[i] = rounded(sums[i]);
                use(row + m, first, some, product);
            }
        }
    }

private:
    float rounded(double sum) const {
        double value = sum * scale;
        value = value > PLAN_LARGEST ? PLAN_LARGEST : value;
        return (float)(value < -PLAN_LARGEST ? -PLAN_LARGEST : value);
    }
};

inline uint32_t folded_factor(int32_t value) { return value >= 0 ? 2 * (uint32_t)value : 2 * (uint32_t)-value - 1; }

// The number of low bits with which a Rice code of the column is shortest, and how long its unary part then is.
inline int rice_width(const int32_t* column, int64_t length, int most, int64_t* unary) {
    int best = -1;
    int64_t least = 0;
    for (int width = 0; width <= most; ++width) {
        int64_t above = 0;
        for (int64_t i = 0; i < length; ++i) above += folded_factor(column[i]) >> width;  // vectorised
        const int64_t bits = length * width + above;
        if (best < 0 || bits < least) best = width, least = bits, *unary = above + length;
    }
    return best;
}

inline int most_rice_bits(int32_t* const* columns, int64_t count, int64_t length) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < length; ++i) {
            const uint32_t value = folded_factor(columns[j][i]);
            largest = value > largest ? value : largest;
        }
    const int bits = bit_length(largest);
    return bits < WIDEST ? bits : WIDEST;
}

// Writes the section of the payload, of at most `most` bytes, and returns its size; what it were if that is more.
inline int64_t pack_factors(const Factors* factors, uint8_t* section, int64_t most) {
    int widths[MOST_COMPONENTS][2];
    int64_t low = 0, unary = 0;
    const int64_t lengths[2] = {factors->rows, factors->columns};
    for (int side = 0; side < 2; ++side) {
        int32_t* const* columns = side ? factors->right : factors->left;
        const int bits = most_rice_bits(columns, factors->count, lengths[side]);
        for (int64_t j = 0; j < factors->count; ++j) {
            int64_t above = 0;
            widths[j][side] = rice_width(columns[j], lengths[side], bits, &above);
            low += lengths[side] * widths[j][side];
            unary += above;
        }
    }
    const int64_t head = FACTORS_BYTES + COMPONENT_BYTES * factors->count;
    const int64_t size = head + packed_bytes(low, 1) + packed_bytes(unary, 1) + LENGTH_BYTES;
    if (size > most) return size;
    const int least = factors->least();
    uint8_t* at = put_number(section, (uint32_t)factors->columns);
    *at++ = (uint8_t)factors->count;
    at = put_number(at, (int16_t)least);
    for (int64_t j = 0; j < factors->count; ++j) {
        *at++ = (uint8_t)(factors->exponents[j] - least);
        *at++ = (uint8_t)widths[j][0];
        *at++ = (uint8_t)widths[j][1];
    }
    StreamWriter lows(at), highs(at + packed_bytes(low, 1));
    for (int64_t j = 0; j < factors->count; ++j) {
        for (int side = 0; side < 2; ++side) {
            const int32_t* column = side ? factors->right[j] : factors->left[j];
            const int width = widths[j][side];
            for (int64_t i = 0; i < lengths[side]; ++i)
                lows.put(folded_factor(column[i]) & (((uint32_t)1 << width) - 1), width);
        }
    }
    lows.finish();
    for (int64_t j = 0; j < factors->count; ++j) {
        for (int side = 0; side < 2; ++side) {
            const int32_t* column = side ? factors->right[j] : factors->left[j];
            for (int64_t i = 0; i < lengths[side]; ++i) highs.put_unary(folded_factor(column[i]) >> widths[j][side]);
        }
    }
    put_number(highs.finish(), (uint32_t)size);
    return size;
}

// Reads the section at the end of a payload; returns its size, or 0 if it contradicts itself or there is no room.
inline int64_t unpack_factors(const uint8_t* payload, int64_t nbytes, int64_t numel, Factors* factors, Room* room) {
    const int64_t size = load<uint32_t>(payload + nbytes - LENGTH_BYTES);
    if (size < FACTORS_BYTES + LENGTH_BYTES || size > nbytes - SMALLEST_PAYLOAD) return 0;
    const uint8_t *section = payload + nbytes - size, *end = payload + nbytes - LENGTH_BYTES;
    const int64_t columns = load<uint32_t>(section), count = section[4];
    const int least = load<int16_t>(section + 5);
    const uint8_t *components = section + FACTORS_BYTES, *at = components + COMPONENT_BYTES * count;
    if (count < 1 || count > MOST_COMPONENTS || columns < 1 || columns > numel || numel % columns || at > end) return 0;
    if (least > LARGEST_EXPONENT || least < -LARGEST_EXPONENT) return 0;
    const int64_t lengths[2] = {numel / columns, columns};
    if (count > lengths[0] || count > lengths[1]) return 0;
    int64_t low = 0, marks = 0;
    for (int64_t j = 0; j < count; ++j) {
        const uint8_t* component = components + COMPONENT_BYTES * j;
        if (component[0] > MOST_SHIFT || component[1] > WIDEST || component[2] > WIDEST) return 0;
        factors->exponents[j] = least + component[0];
        low += component[1] * lengths[0] + component[2] * lengths[1];
    }
    const int64_t entries = count * (lengths[0] + lengths[1]);
    if (packed_bytes(low, 1) > end - at) return 0;
    const uint8_t* unary = at + packed_bytes(low, 1);
    for (const uint8_t* byte = unary; byte < end; ++byte) marks += __builtin_popcount(*byte);
    if (marks != entries) return 0;
    int32_t* memory = room->take<int32_t>(entries);
    if (room->full()) return 0;
    factors->rows = lengths[0];
    factors->columns = columns;
    factors->count = count;
    StreamReader lows(at, end), highs(unary, end);
    for (int64_t j = 0; j < count; ++j) {
        for (int side = 0; side < 2; ++side) {
            const int width = components[COMPONENT_BYTES * j + 1 + side];
            (side ? factors->right : factors->left)[j] = memory;
            for (int64_t i = 0; i < lengths[side]; ++i) {
                const int64_t value = highs.get_unary() << width | (int64_t)lows.get(width);
                if (value > 2 * (int64_t)LARGEST_FACTOR) return 0;
                *memory++ = (int32_t)(value % 2 == 0 ? value / 2 : -(value + 1) / 2);
            }
        }
    }
    return size;
}

}  // namespace
#endif
