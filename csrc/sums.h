// Sums of doubles that have the same bits on every instruction set, because their order is laid
// down (docs/FORMAT.md, "ordered sum"): 16 lanes within blocks of 4096 terms, lanes in pairs, blocks in turn.
#ifndef GCOMPRESS_SUMS_H
#define GCOMPRESS_SUMS_H

#include "simd.h"

namespace {

const int64_t SUM_BLOCK = 4096;
const int LANES = 16;

// gcc's and clang's vector types: they stay in registers, as arrays of sums do not always.
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));

struct LaneSum {
    Doubles low, high;
    LaneSum() : low(), high() {}
    // Add 16 terms, one to each lane.
    void add(const float* terms) {
        Floats a[2];
        memcpy(a, terms, sizeof a);
        low += __builtin_convertvector(a[0], Doubles);
        high += __builtin_convertvector(a[1], Doubles);
    }
    // Add 16 products, which are exact.
    void add_products(const float* left, const float* right) {
        Floats a[2], b[2];
        memcpy(a, left, sizeof a);
        memcpy(b, right, sizeof b);
        low += __builtin_convertvector(a[0], Doubles) * __builtin_convertvector(b[0], Doubles);
        high += __builtin_convertvector(a[1], Doubles) * __builtin_convertvector(b[1], Doubles);
    }
    double folded() const {
        const Doubles eight = low + high;
        double lane[8];
        memcpy(lane, &eight, sizeof lane);
        for (int half = 4; half > 0; half /= 2)
            for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
        return lane[0];
    }
};

}  // namespace
#endif
