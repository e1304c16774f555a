// Vectors under one set of names, so that an algorithm is written once (cpu/simd.h, polar/). A backend gives the names
// their meaning for one width of registers: avx512.h, avx2.h, and narrow.h with 16 bytes, which is SSE2, NEON or, for any
// other processor, what the compiler makes of its own vector types. To add one, write all that avx2.h has.
//
//   64 bytes      Bytes: 64 signed bytes; Signs: 64 bits in the form that is cheapest to choose by
//                 Metrics: 64 values of 16 bits, in MOST_SHORTS parts of a register (Shorts)
//                 ByteSum, Dots: sums that `folded` adds up
//   a register    Floats, Ints: WIDE of them; Lanes: a decision on each
//   tables        Table16 and PointTable: floats by code; Table128: bytes by magnitude, where has_tables()
//   codes         pack_fours, pack_twos, unpack_fours, unpack_twos: 64 codes of 4 or 2 bits
//   halves        load_halves, store_halves: floats of 16 bits, where HAS_HALVES
//
// These headers and kernels.cc are compiled several times with different flags, so everything in them must have internal
// linkage and no template of the C++ library may be instantiated: the linker would keep one copy of it, perhaps the one
// this processor cannot run.
#ifndef GCOMPRESS_VECTORS_VECTORS_H
#define GCOMPRESS_VECTORS_VECTORS_H

#include "../arith/base.h"

// What handles 64 entries is inlined always, and what handles the last few never: left to itself, a compiler decides
// anew with every function that the file gains, and speed changes by factors.
#define GC_HOT inline __attribute__((always_inline))
#define GC_COLD __attribute__((noinline))

namespace {

const int LANES = 64;  // of Bytes

template <class T>
GC_HOT T load(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}
template <class T>
GC_HOT void store(void* p, T value) {
    memcpy(p, &value, sizeof value);
}

}  // namespace

#if defined(__AVX512BW__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "narrow.h"
#endif

namespace {

// a, or -a where c.
inline Bytes negate_where(Bytes a, Signs c) { return variable_node(a, zero_bytes(), c); }

inline Metrics no_metrics() {
    Metrics result;
    memset(&result, 0, sizeof result);
    return result;
}
inline void add_to(Metrics* sum, Bytes a) {
    const Metrics wide = widen(a);
    for (int k = 0; k < MOST_SHORTS; ++k) sum->part[k] += wide.part[k];
}

}  // namespace
#endif
