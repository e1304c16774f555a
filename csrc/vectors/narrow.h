// Vectors of 16 bytes, of which 64 bytes are four: in the compiler's own notation, which every processor runs. What that
// notation cannot say is in narrow_parts.h: by SSE2, by NEON, or plainly.
#ifndef GCOMPRESS_VECTORS_NARROW_H
#define GCOMPRESS_VECTORS_NARROW_H

#include "vectors.h"

namespace {

typedef int8_t Part __attribute__((vector_size(16)));
typedef uint8_t UnsignedPart __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef int64_t Pair __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
struct Bytes {
    Part part[4];
};
typedef Bytes Signs;  // 0 or -1

}  // namespace

#include "narrow_parts.h"

namespace {

#define GC_PARTS(expression)                                   \
    Bytes result;                                              \
    for (int k = 0; k < 4; ++k) result.part[k] = (expression); \
    return result
// Part by part: gcc takes four of them at once through memory on ARM.
inline Bytes load_bytes(const int8_t* p) { GC_PARTS(load<Part>(p + 16 * k)); }
inline void store_bytes(int8_t* p, Bytes a) {
    for (int k = 0; k < 4; ++k) store(p + 16 * k, a.part[k]);
}
inline Bytes zero_bytes() { GC_PARTS(Part{}); }
inline Bytes every_byte(int8_t a) { GC_PARTS(Part{} + a); }
inline Bytes add_saturated(Bytes a, Bytes b) { GC_PARTS(add_saturated_part(a.part[k], b.part[k])); }
inline Bytes check_node(Bytes a, Bytes b) { GC_PARTS(check_node_part(a.part[k], b.part[k])); }
inline Part select_part(Part where, Part a, Part b) { return (where & a) | (~where & b); }
inline Bytes choose(Signs where, Bytes a, Bytes b) { GC_PARTS(select_part(where.part[k], a.part[k], b.part[k])); }
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    GC_PARTS(select_part(c.part[k], subtract_saturated_part(b.part[k], a.part[k]),
                         add_saturated_part(b.part[k], a.part[k])));
}
inline Bytes magnitude(Bytes a) {
    GC_PARTS(subtract_saturated_part(a.part[k] ^ (Part)(a.part[k] < 0), (Part)(a.part[k] < 0)));
}
inline Bytes magnitude_to_128(Bytes a) {  // as an unsigned byte
    GC_PARTS((Part)((UnsignedPart)(a.part[k] ^ (Part)(a.part[k] < 0)) - (UnsignedPart)(a.part[k] < 0)));
}
inline Bytes least(Bytes a, Bytes b) { GC_PARTS(least_part(a.part[k], b.part[k])); }
inline Bytes shortfall(Bytes a) { GC_PARTS(subtract_saturated_part(Part{}, a.part[k] & (Part)(a.part[k] < 0))); }
inline Bytes different(Bytes a, Bytes b) { GC_PARTS(a.part[k] ^ b.part[k]); }
inline Signs less(Bytes a, Bytes b) { GC_PARTS((Part)(a.part[k] < b.part[k])); }
inline Signs equal(Bytes a, Bytes b) { GC_PARTS((Part)(a.part[k] == b.part[k])); }
inline Signs negative(Bytes a) { GC_PARTS((Part)(a.part[k] < 0)); }
inline Signs has_bit(Bytes a, int bit) { GC_PARTS((Part)((a.part[k] & (int8_t)(1 << bit)) != 0)); }
inline Signs no_signs() { return zero_bytes(); }
inline Bytes cleared(Bytes a, Signs where) { GC_PARTS(a.part[k] & ~where.part[k]); }
inline Signs exclusive_or(Signs a, Signs b) { return different(a, b); }
inline Signs both(Signs a, Signs b) { GC_PARTS(a.part[k] & b.part[k]); }
inline Signs without(Signs a, Signs b) { GC_PARTS(a.part[k] & ~b.part[k]); }
inline uint64_t word_of(Signs a) { return word_of_tops(a); }
inline Bytes bytes_of(Signs a) { return a; }
inline Signs signs_in(Bytes a) { return a; }
inline Bytes doubled_plus(Bytes a, Signs bit) { GC_PARTS(((a.part[k] & 127) << 1) - bit.part[k]); }

inline Bytes shuffled(Bytes a, Bytes index) { GC_PARTS(shuffled_part(a.part[k], index.part[k])); }
inline Bytes lower_four(Bytes index) { GC_PARTS(index.part[k] & 15); }
inline Bytes repeat_16(const int8_t* p) { GC_PARTS(load<Part>(p)); }
inline void interleave_bytes(Bytes low, Bytes high, uint16_t* values) {  // on processors with the lower byte first
    for (int k = 0; k < 4; ++k) {
        store(values + 16 * k, interleaved_low(low.part[k], high.part[k]));
        store(values + 16 * k + 8, interleaved_high(low.part[k], high.part[k]));
    }
}
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)shuffled_part((Part)a, (Part)index); }
const int MOST_SHORTS = 8;
struct Metrics {
    Shorts part[MOST_SHORTS];
};
inline Metrics widen(Bytes a) {
    Metrics result;
    for (int k = 0; k < 4; ++k) {
        const Part minus = (Part)(a.part[k] < 0);
        result.part[2 * k] = (Shorts)interleaved_low(a.part[k], minus);
        result.part[2 * k + 1] = (Shorts)interleaved_high(a.part[k], minus);
    }
    return result;
}
inline Bytes narrow(const Metrics& a) {  // values from -128 to 127
    GC_PARTS(low_bytes(a.part[2 * k], a.part[2 * k + 1]));
}
inline Signs negative(const Metrics& a) { GC_PARTS(low_bytes(a.part[2 * k] >> 15, a.part[2 * k + 1] >> 15)); }

enum { WIDE = 4 };
typedef Ints Lanes;  // by their top bits
GC_HOT Floats load_floats(const float* p) { return load<Floats>(p); }
GC_HOT void store_floats(float* p, Floats a) { store(p, a); }
GC_HOT Floats every_float(float a) { return Floats{a, a, a, a}; }
GC_HOT Ints load_ints(const void* p) { return load<Ints>(p); }
GC_HOT Ints every_int(int32_t a) { return Ints{a, a, a, a}; }
GC_HOT Lanes above(Ints a, Ints b) { return (Ints)(a > b); }
GC_HOT Lanes top_bits(Ints a) { return a; }
template <class Test>
GC_HOT uint64_t word_where(const Test& test) {
    Bytes tops;
    for (int j = 0; j < 64; j += 16) tops.part[j / 16] = tops_of(test(j), test(j + 4), test(j + 8), test(j + 12));
    return word_of_tops(tops);
}
GC_HOT Ints bits_to_masks(uint64_t bits) {
    const Ints each = {1, 2, 4, 8};
    return (Ints)((every_int((int32_t)(uint32_t)bits) & each) == each);
}
GC_HOT Floats choose_by_bits(uint64_t bits, Floats ones, Floats zeros) {
    const Ints where = bits_to_masks(bits);
    return (Floats)(((Ints)ones & where) | ((Ints)zeros & ~where));
}
GC_HOT Floats negate_by_bits(uint64_t bits, Floats a) {
    return (Floats)((Ints)a ^ (bits_to_masks(bits) & every_int(INT32_MIN)));
}

inline Bytes negated_samples(Bytes found, Signs minus, Bytes) {
    GC_PARTS((found.part[k] ^ minus.part[k]) - minus.part[k]);
}

template <class From>
GC_HOT Bytes limited_bytes(const From& from, int more) {
    Bytes result;
    const Shorts all = Shorts{} + (int16_t)more;
    for (int j = 0; j < 64; j += 16) {
        const Shorts low = low_shorts(from(j), from(j + 4)), high = low_shorts(from(j + 8), from(j + 12));
        result.part[j / 16] = limited_part(low + all, high + all);
    }
    return result;
}

// Floats one by one; `levels` bits of a label choose.
struct PointTable {
    const float* at;
};
GC_HOT PointTable load_points(const float* p) { return {p}; }
GC_HOT Floats looked_up(const PointTable& points, const uint8_t* labels, int) {
    const float* at = points.at;
    return Floats{at[labels[0]], at[labels[1]], at[labels[2]], at[labels[3]]};
}

// 64 codes, one a byte: neighbours meet in the lower byte of two.
template <int bits>
GC_HOT Part packed_pairs(Part a, Part b) {
    const UnsignedShorts one = (UnsignedShorts)a, other = (UnsignedShorts)b;
    return low_bytes((Shorts)(one | one >> (8 - bits)), (Shorts)(other | other >> (8 - bits)));
}
GC_HOT void pack_fours(const Bytes& codes, uint8_t* packed) {
    for (int j = 0; j < 2; ++j) store(packed + 16 * j, packed_pairs<4>(codes.part[2 * j], codes.part[2 * j + 1]));
}
GC_HOT void pack_twos(const Bytes& codes, uint8_t* packed) {
    const Part low = packed_pairs<2>(codes.part[0], codes.part[1]);
    const Part high = packed_pairs<2>(codes.part[2], codes.part[3]);
    store(packed, packed_pairs<4>(low, high));
}
template <int bits>
GC_HOT void unpacked_pairs(Part packed, Part* two) {
    const Part low = packed & (int8_t)((1 << bits) - 1);
    const Part high = (Part)((UnsignedPart)packed >> bits) & (int8_t)((1 << bits) - 1);
    two[0] = interleaved_low(low, high);
    two[1] = interleaved_high(low, high);
}
GC_HOT void unpack_fours(const uint8_t* packed, uint8_t* codes) {
    for (int j = 0; j < 2; ++j) {
        Part two[2];
        unpacked_pairs<4>(load<Part>(packed + 16 * j), two);
        store(codes + 32 * j, two[0]);
        store(codes + 32 * j + 16, two[1]);
    }
}
GC_HOT void unpack_twos(const uint8_t* packed, uint8_t* codes) {
    Part two[2], four[4];
    unpacked_pairs<4>(load<Part>(packed), two);
    for (int j = 0; j < 2; ++j) unpacked_pairs<2>(two[j], four + 2 * j);
    for (int j = 0; j < 4; ++j) store(codes + 16 * j, four[j]);
}
#undef GC_PARTS

}  // namespace
#endif
