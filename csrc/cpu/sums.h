// Sums of doubles that have the same bits on every instruction set, because their order is laid
// down (docs/FORMAT.md, "ordered sum"): 16 lanes within blocks of 4096 terms, lanes in pairs, blocks in turn.
#ifndef GCOMPRESS_CPU_SUMS_H
#define GCOMPRESS_CPU_SUMS_H

#include "simd.h"

namespace {

// gcc's and clang's vector types: they stay in registers, as arrays of sums do not always.
typedef double FourDoubles __attribute__((vector_size(32)));

inline void load_doubles(const float* four, FourDoubles* doubles) {
#if defined(__AVX2__)  // gcc 12 makes two halves of a conversion
    *doubles = (FourDoubles)_mm256_cvtps_pd(_mm_loadu_ps(four));
#else
    typedef float FourFloats __attribute__((vector_size(16)));
    *doubles = __builtin_convertvector(load<FourFloats>(four), FourDoubles);
#endif
}

struct LaneSum {
    FourDoubles a, b, c, d;  // lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15
    LaneSum() : a(), b(), c(), d() {}
    static void add_four(const float* terms, FourDoubles* sum) {
        FourDoubles four;
        load_doubles(terms, &four);
        *sum += four;
    }
    static void add_four_products(const float* left, const float* right, FourDoubles* sum) {
        FourDoubles one, other;
        load_doubles(left, &one);
        load_doubles(right, &other);
        *sum += one * other;
    }
    // Add 16 terms, one to each lane.
    void add(const float* terms) {
        add_four(terms, &a);
        add_four(terms + 4, &b);
        add_four(terms + 8, &c);
        add_four(terms + 12, &d);
    }
    // Add 16 products, which are exact.
    void add_products(const float* left, const float* right) {
        add_four_products(left, right, &a);
        add_four_products(left + 4, right + 4, &b);
        add_four_products(left + 8, right + 8, &c);
        add_four_products(left + 12, right + 12, &d);
    }
    // Add 16 terms that are doubles.
    void add_doubles(const double* terms) {
        FourDoubles four;
        memcpy(&four, terms, sizeof four);
        a += four;
        memcpy(&four, terms + 4, sizeof four);
        b += four;
        memcpy(&four, terms + 8, sizeof four);
        c += four;
        memcpy(&four, terms + 12, sizeof four);
        d += four;
    }
    double folded() const {
        const FourDoubles four = (a + c) + (b + d);
        double lane[4];
        memcpy(lane, &four, sizeof lane);
        return (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
};

}  // namespace
#endif
