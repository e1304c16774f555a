// Polar's plan: what Python, numpy and gcompress/compressors/polar/tables.py make of doubles, to the last bit.
#ifndef GCOMPRESS_POLAR_PLAN_DOUBLES_H
#define GCOMPRESS_POLAR_PLAN_DOUBLES_H

#include <math.h>

#include "../../cpu/simd.h"

namespace {

const double PLAN_LOG_TWO = 0.6931471805599453;
const double PLAN_INFINITY = __builtin_inf();
const double PLAN_LARGEST = 3.4028234663852886e38;  // of float32

inline double least_of(double a, double b) { return b < a ? b : a; }
inline double most_of(double a, double b) { return b > a ? b : a; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }  // Python's //
inline int bit_length(int64_t value) { return value > 0 ? 64 - __builtin_clzll((uint64_t)value) : 0; }

// Python's x ** 2, which is the C library's and, for some x, not x * x.
inline double python_square(double x) {
    volatile double two = 2.0;
    return pow(x, two);
}

// x 2^e where neither that nor 2^e leaves the normal numbers.
inline double times_two_to(double x, int64_t e) { return x * bits_double((uint64_t)(e + 1023) << 52); }

inline double exponential(double x) {  // tables._exp
    const double small = (x < -184.0 ? -184.0 : x) / 4096.0;
    double y = 1.0 + small * (1.0 + small / 2.0 * (1.0 + small / 3.0 * (1.0 + small / 4.0)));
    for (int k = 0; k < 12; ++k) y = y * y;
    return y;
}

inline double logarithm(double y) {  // tables._log
    int exponent;
    const double mantissa = frexp(y, &exponent), t = (mantissa - 1.0) / (mantissa + 1.0), square = t * t;
    double series = 0.0;
    for (int odd = 31; odd > 0; odd -= 2) series = series * square + 1.0 / odd;
    return exponent * PLAN_LOG_TWO + 2.0 * t * series;
}

inline double two_to(double exponent) {  // limit_model._power_of_two
    const double whole = floor(exponent);
    return ldexp(1 / exponential(-(exponent - whole) * PLAN_LOG_TWO), (int)whole);
}

// math.fsum, as CPython has it (Shewchuk 1997): the exact sum, rounded once.
inline double exact_sum_by_parts(const double* terms, int64_t count) {
    double parts[64], special = 0.0;
    int n = 0;
    bool finite = true;
    for (int64_t k = 0; k < count; ++k) {
        double x = terms[k];
        if (!(__builtin_fabs(x) <= 1.7976931348623157e308)) finite = false, special += x;
        int i = 0;
        for (int j = 0; j < n && finite; ++j) {
            double y = parts[j];
            if (__builtin_fabs(x) < __builtin_fabs(y)) {
                const double other = x;
                x = y;
                y = other;
            }
            const double high = x + y, low = y - (high - x);
            if (low != 0.0) parts[i++] = low;
            x = high;
        }
        n = i;
        if (x != 0.0 && n < 63) parts[n++] = x;
    }
    if (!finite) return special;
    double high = 0.0, low = 0.0;
    if (n > 0) high = parts[--n];
    while (n > 0) {
        const double x = high, y = parts[--n];
        high = x + y;
        low = y - (high - x);
        if (low != 0.0) break;
    }
    if (n > 0 && ((low < 0.0 && parts[n - 1] < 0.0) || (low > 0.0 && parts[n - 1] > 0.0))) {
        const double y = low * 2.0, x = high + y;
        if (y == x - high) high = x;
    }
    return high;
}

// The same, mostly by a sum and its error, which say whether they suffice.
inline double exact_sum(const double* terms, int64_t count) {
    double sum = 0.0, error = 0.0, size = 0.0;
    for (int64_t k = 0; k < count; ++k) {
        const double x = terms[k], total = sum + x, part = total - sum;
        const double low = (sum - (total - part)) + (x - part);
        sum = total;
        error += low;
        size += __builtin_fabs(low);
    }
    const double result = sum + error, rest = error - (result - sum), bound = size * (double)(count + 2) * 4.5e-16;
    if (result + (rest + bound) == result && result + (rest - bound) == result) return result;
    return exact_sum_by_parts(terms, count);
}

// numpy's frexp, as far as a place in a histogram goes.
inline double octave_place(double limit, int lowest) {
    int exponent = 0;
    const double mantissa = frexp(limit, &exponent);
    return (exponent - 1 - lowest + 2 * mantissa - 1) * 8;
}

// A double to binary16, half to even, for 0 … 60000; and any binary16 back.
inline uint16_t half_of(double value) {
    if (!(value > 0.0)) return 0;
    int exponent;
    frexp(value, &exponent);                                    // value = f 2^exponent, f from 1/2 to 1
    const int low = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last bit
    const int64_t steps = (int64_t)rint(ldexp(value, -low));
    return (uint16_t)(steps + ((int64_t)(low + 24) << 10));  // a carry goes to the exponent
}
inline double double_of_half(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31  ? (mantissa ? __builtin_nan("") : PLAN_INFINITY)
                        : exponent == 0 ? ldexp((double)mantissa, -24)
                                        : ldexp((double)(mantissa + 1024), exponent - 25);
    return half >> 15 ? -size : size;
}

}  // namespace
#endif
