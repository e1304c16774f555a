// BinMeans: bins in units of the deviation, the mean of each (gcompress/compressors/binmean.py).
#ifndef GCOMPRESS_ARITH_BINMEAN_H
#define GCOMPRESS_ARITH_BINMEAN_H

#include "base.h"

namespace {

struct Bins {
    double shift, scale;  // the mean, and the width of a bin
    double factor;        // from an entry to its fixed point, below 2^31
    int count;
};

// Nearest integer, ties to even, for |value| < 2^51: vectorises on every instruction set.
GC_INLINE double nearest_even(double value) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52
    return (value + magic) - magic;
}

// `squares`: the sum of those of n entries less their mean.
GC_INLINE double bin_width(double squares, int64_t n, double range, int count) {
    const double deviation = square_root(squares) / square_root((double)(n > 1 ? n - 1 : 1));
    const double width = deviation * range / (double)count;
    return width > 0.0 ? width : 1.0;
}

GC_INLINE double fixed_factor(uint32_t largest_key) {
    const uint32_t exponent = largest_key >> 23;
    return bits_double((uint64_t)(157 + 1023 - (exponent > 1 ? exponent : 1)) << 52);
}

GC_INLINE double fixed_of(float value, const Bins& bins) { return nearest_even((double)value * bins.factor); }

GC_INLINE uint8_t bin_of(float value, const Bins& bins) {
    const double top = (double)(bins.count - 1);
    double place = ((double)value - bins.shift) / bins.scale + (double)(bins.count / 2);
    place = place < 0.0 ? 0.0 : place;
    place = place > top ? top : place;
    return (uint8_t)(int32_t)nearest_even(place);
}

// Of a bin whose entries' fixed points add up to `sum`.
GC_INLINE float bin_mean(int64_t sum, int64_t entries, const Bins& bins) {
    return entries > 0 ? (float)((double)sum / (double)entries / bins.factor) : (float)bins.shift;
}

}  // namespace
#endif
