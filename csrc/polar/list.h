// Polar: the successive-cancellation list encoder. It keeps the L best candidates for a block, its
// "paths", in neighbouring byte lanes, so that 64 / L blocks are encoded side by side and a path
// that takes another's place is a shuffle of bytes within a group of L.
//
// A path's metric is the sum of |l| over the decisions it took against the sign of l, relative to
// the best path of its block and at most WORST. gcompress/compressors/polar/reference.py says the same in torch.
#ifndef GCOMPRESS_POLAR_LIST_H
#define GCOMPRESS_POLAR_LIST_H

#include "encoder.h"

namespace {

// Vectors of 16-bit values, and what Bytes need beyond lanes.h. Shuffles stay within 16 bytes.
#if defined(__AVX512BW__)
typedef int16_t Shorts __attribute__((vector_size(64)));
inline Shorts least(Shorts a, Shorts b) { return (Shorts)_mm512_min_epi16((__m512i)a, (__m512i)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)_mm512_max_epi16((__m512i)a, (__m512i)b); }
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)_mm512_shuffle_epi8((__m512i)a, (__m512i)index); }
inline Bytes shuffled(Bytes a, Bytes index) { return _mm512_shuffle_epi8(a, index); }
inline Bytes different(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes shortfall(Bytes a) { return _mm512_subs_epi8(zero_bytes(), _mm512_min_epi8(a, zero_bytes())); }
inline Bytes choose(Signs where, Bytes a, Bytes b) { return _mm512_mask_mov_epi8(b, where, a); }
inline Signs less(Bytes a, Bytes b) { return _mm512_cmplt_epi8_mask(a, b); }
inline Bytes bytes_of(Signs a) { return _mm512_movm_epi8(a); }
inline Signs signs_in(Bytes a) { return _mm512_movepi8_mask(a); }
#elif defined(__AVX2__)
typedef int16_t Shorts __attribute__((vector_size(32)));
inline Shorts least(Shorts a, Shorts b) { return (Shorts)_mm256_min_epi16((__m256i)a, (__m256i)b); }
inline Shorts most(Shorts a, Shorts b) { return (Shorts)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)_mm256_shuffle_epi8((__m256i)a, (__m256i)index); }
inline Bytes shuffled(Bytes a, Bytes index) {
    return {_mm256_shuffle_epi8(a.low, index.low), _mm256_shuffle_epi8(a.high, index.high)};
}
inline Bytes different(Bytes a, Bytes b) { return exclusive_or(a, b); }
inline Bytes shortfall(Bytes a) {
    const __m256i zero = _mm256_setzero_si256();
    return {_mm256_subs_epi8(zero, _mm256_min_epi8(a.low, zero)),
            _mm256_subs_epi8(zero, _mm256_min_epi8(a.high, zero))};
}
inline Bytes choose(Signs where, Bytes a, Bytes b) {
    return {_mm256_blendv_epi8(b.low, a.low, where.low), _mm256_blendv_epi8(b.high, a.high, where.high)};
}
inline Signs less(Bytes a, Bytes b) { return {_mm256_cmpgt_epi8(b.low, a.low), _mm256_cmpgt_epi8(b.high, a.high)}; }
inline Bytes bytes_of(Signs a) { return a; }
inline Signs signs_in(Bytes a) { return a; }
#else
typedef int16_t Shorts __attribute__((vector_size(16)));
inline Shorts least(Shorts a, Shorts b) { return ((a < b) & a) | (~(a < b) & b); }
inline Shorts most(Shorts a, Shorts b) { return ((a < b) & b) | (~(a < b) & a); }
inline Part shuffled_part(Part a, Part index) {
    Part result;
    for (int k = 0; k < 16; ++k) result[k] = a[index[k]];
    return result;
}
inline Shorts shuffled(Shorts a, Shorts index) { return (Shorts)shuffled_part((Part)a, (Part)index); }
#define GC_PARTS(expression)                                   \
    Bytes result;                                              \
    for (int k = 0; k < 4; ++k) result.part[k] = (expression); \
    return result
inline Bytes shuffled(Bytes a, Bytes index) { GC_PARTS(shuffled_part(a.part[k], index.part[k])); }
inline Bytes different(Bytes a, Bytes b) { return exclusive_or(a, b); }
inline Bytes shortfall(Bytes a) { GC_PARTS(subtract_saturated_part(Part{}, smaller(a.part[k], Part{}))); }
inline Bytes choose(Signs where, Bytes a, Bytes b) { GC_PARTS(select(where.part[k], a.part[k], b.part[k])); }
inline Signs less(Bytes a, Bytes b) { GC_PARTS(a.part[k] < b.part[k]); }
inline Bytes bytes_of(Signs a) { return a; }
inline Signs signs_in(Bytes a) { return a; }
#undef GC_PARTS
#endif

// A vector of f(place within 16 bytes); the compiler makes a constant of it.
template <class F>
inline Shorts each_short(F f) {
    Shorts v;
    for (int k = 0; k < (int)(sizeof v / sizeof(int16_t)); ++k) v[k] = (int16_t)f(k & 7);
    return v;
}
template <class F>
inline Bytes each_byte(F f) {
    int8_t bytes[LANES];
    for (int j = 0; j < LANES; ++j) bytes[j] = (int8_t)f(j & 15);
    return load_bytes(bytes);
}

// 64 values of 16 bits.
const int WIDE_PARTS = 128 / (int)sizeof(Shorts);
struct Metrics {
    Shorts part[WIDE_PARTS];
};
inline Metrics wide_zero() {
    Metrics result;
    memset(&result, 0, sizeof result);
    return result;
}
inline Metrics widen(Bytes a) {
    Metrics result;
#if defined(__AVX512BW__)
    result.part[0] = (Shorts)_mm512_cvtepi8_epi16(_mm512_castsi512_si256(a));
    result.part[1] = (Shorts)_mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(a, 1));
#elif defined(__AVX2__)
    result.part[0] = (Shorts)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a.low));
    result.part[1] = (Shorts)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(a.low, 1));
    result.part[2] = (Shorts)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a.high));
    result.part[3] = (Shorts)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(a.high, 1));
#else
    int8_t bytes[LANES];
    int16_t shorts[LANES];
    store_bytes(bytes, a);
    for (int j = 0; j < LANES; ++j) shorts[j] = bytes[j];  // vectorised
    memcpy(&result, shorts, sizeof result);
#endif
    return result;
}
inline Bytes narrow(const Metrics& a) {  // values from -128 to 127
#if defined(__AVX512BW__)
    const __m256i low = _mm512_cvtepi16_epi8((__m512i)a.part[0]), high = _mm512_cvtepi16_epi8((__m512i)a.part[1]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__AVX2__)
    const __m256i low = _mm256_packs_epi16((__m256i)a.part[0], (__m256i)a.part[1]);
    const __m256i high = _mm256_packs_epi16((__m256i)a.part[2], (__m256i)a.part[3]);
    return {_mm256_permute4x64_epi64(low, 0xd8), _mm256_permute4x64_epi64(high, 0xd8)};
#else
    int16_t shorts[LANES];
    int8_t bytes[LANES];
    memcpy(shorts, &a, sizeof a);
    for (int j = 0; j < LANES; ++j) bytes[j] = (int8_t)shorts[j];  // vectorised
    return load_bytes(bytes);
#endif
}
inline void add_to(Metrics* sum, Bytes a) {
    const Metrics wide = widen(a);
    for (int k = 0; k < WIDE_PARTS; ++k) sum->part[k] += wide.part[k];
}

// Bitonic sorting of groups of L: every value beside that `distance` places away.
template <int distance>
inline Shorts partner(Shorts a) {
    return shuffled(a, each_short([](int k) { return (k ^ distance) * 2 | ((k ^ distance) * 2 + 1) << 8; }));
}
// The lesser of two comes first in runs of `run` values that alternate with runs of the other order.
template <int distance, int run, bool falling>
inline Shorts exchange(Shorts a) {
    const Shorts other = partner<distance>(a);
    const Shorts lesser = each_short([](int k) { return (!(k & distance) == (!(k & run) != falling)) ? -1 : 0; });
    return (least(a, other) & lesser) | (most(a, other) & ~lesser);
}
template <int L, bool falling>
inline Shorts sorted(Shorts a) {
    if (L == 2) return exchange<1, 8, falling>(a);
    a = exchange<1, 2, falling>(a);
    if (L == 4) return exchange<1, 8, falling>(exchange<2, 8, falling>(a));
    a = exchange<1, 4, falling>(exchange<2, 4, falling>(a));
    return exchange<1, 8, falling>(exchange<2, 8, falling>(exchange<4, 8, falling>(a)));
}
template <int L>
inline Shorts sorted_bitonic(Shorts a) {
    if (L > 4) a = exchange<4, 8, false>(a);
    if (L > 2) a = exchange<2, 8, false>(a);
    return exchange<1, 8, false>(a);
}
template <int L>
inline Shorts least_of_group(Shorts a) {
    a = least(a, partner<1>(a));
    if (L > 2) a = least(a, partner<2>(a));
    return L > 4 ? least(a, partner<4>(a)) : a;
}

struct Paths {
    Metrics metric;
    bool differ;  // until the first split all paths of a block are the same, and penalties change nothing
};

template <int L>
inline void penalize(Paths* paths, const Metrics& penalty) {
    const Shorts worst = each_short([](int) { return WORST; });
    for (int k = 0; k < WIDE_PARTS; ++k) {
        const Shorts sum = paths->metric.part[k] + penalty.part[k];
        paths->metric.part[k] = least(sum - least_of_group<L>(sum), worst);
    }
}

// Splits every path into one that goes on as it is and one that pays `price` >= 0, and keeps the
// best L, best first, of equals those that do not pay and then those that came first. Returns
// which paths paid (-1); path j was path (*map)[j], a place within 16 bytes.
template <int L>
inline Bytes split(Paths* paths, const Metrics& price, Bytes* map) {
    const Shorts worst = each_short([](int) { return WORST; }), own = each_short([](int k) { return k & (L - 1); });
    Metrics from, paid;
    for (int k = 0; k < WIDE_PARTS; ++k) {
        const Shorts metric = paths->metric.part[k];
        const Shorts stay = metric << 4 | own;
        const Shorts pay = least(metric + least(price.part[k], worst), worst) << 4 | own | 8;
        const Shorts keys = sorted_bitonic<L>(least(sorted<L, false>(stay), sorted<L, true>(pay)));
        paths->metric.part[k] = keys >> 4;
        from.part[k] = keys & (int16_t)(L - 1);
        paid.part[k] = keys << 12 >> 15;
    }
    *map = different(narrow(from), each_byte([](int j) { return j & ~(L - 1); }));
    paths->differ = true;
    return narrow(paid);
}

template <int L>
inline void list_frozen(const Bytes* l, int n, Paths* paths) {
    for (int start = 0; start < n && paths->differ; start += MAX_REPETITION) {
        Metrics penalty = wide_zero();
        for (int i = start; i < n && i < start + MAX_REPETITION; ++i) add_to(&penalty, shortfall(l[i]));
        penalize<L>(paths, penalty);
    }
}

template <int L>
inline void list_repetition(const Bytes* l, int n, Bytes* code, Paths* paths, Bytes* map) {
    Metrics penalty = wide_zero(), sum = wide_zero(), price, sign;
    for (int i = 0; i < n; ++i) {
        add_to(&penalty, shortfall(l[i]));
        add_to(&sum, l[i]);
    }
    for (int k = 0; k < WIDE_PARTS; ++k) {
        sign.part[k] = sum.part[k] >> 15;
        price.part[k] = (sum.part[k] ^ sign.part[k]) - sign.part[k];
        penalty.part[k] += sum.part[k] & sign.part[k];  // of the better sign
    }
    penalize<L>(paths, penalty);
    const Bytes paid = split<L>(paths, price, map);
    const Bytes bit = different(shuffled(narrow(sign), *map), paid);
    for (int i = 0; i < n; ++i) code[i] = bit;
}

// Hard decisions, or those with the first of the least reliable ones changed.
template <int L>
inline void list_free(const Bytes* l, int n, Bytes* code, Paths* paths, Bytes* map) {
    Bytes weakest = magnitude(l[0]), place = zero_bytes();
    for (int i = 1; i < n; ++i) {
        const Bytes candidate = magnitude(l[i]);
        place = choose(less(candidate, weakest), each_byte([=](int) { return i; }), place);
        weakest = least(weakest, candidate);
    }
    const Bytes paid = split<L>(paths, widen(weakest), map);
    place = choose(signs_in(paid), shuffled(place, *map), each_byte([](int) { return -1; }));
    for (int i = 0; i < n; ++i) {
        const Signs flip = equal(place, each_byte([=](int) { return i; }));
        code[i] = different(shuffled(bytes_of(negative(l[i])), *map), bytes_of(flip));
    }
}

// Wagner's rule, or that with the two least reliable bits both changed: parity stays even.
template <int L>
inline void list_parity(const Bytes* l, int n, Bytes* code, Paths* paths, Bytes* map) {
    const Bytes nowhere = each_byte([](int) { return -1; });
    Bytes first = magnitude(l[0]), second = each_byte([](int) { return 127; });
    Bytes first_place = zero_bytes(), second_place = each_byte([](int) { return 1; });
    Signs odd = negative(l[0]);
    for (int i = 1; i < n; ++i) {
        const Bytes candidate = magnitude(l[i]), place = each_byte([=](int) { return i; });
        const Signs is_first = less(candidate, first), is_second = less(candidate, second);
        second_place = choose(is_first, first_place, choose(is_second, place, second_place));
        second = choose(is_first, first, least(second, candidate));
        first_place = choose(is_first, place, first_place);
        first = least(first, candidate);
        odd = exclusive_or(odd, negative(l[i]));
    }
    const Bytes repair = choose(odd, first, zero_bytes());
    penalize<L>(paths, widen(repair));
    Metrics price = widen(second), toggle = widen(choose(odd, negate_where(first, odd), first));
    for (int k = 0; k < WIDE_PARTS; ++k) price.part[k] += toggle.part[k];
    const Bytes paid = split<L>(paths, price, map);
    const Bytes change_first = different(shuffled(bytes_of(odd), *map), paid);
    first_place = choose(signs_in(change_first), shuffled(first_place, *map), nowhere);
    second_place = choose(signs_in(paid), shuffled(second_place, *map), nowhere);
    for (int i = 0; i < n; ++i) {
        const Bytes place = each_byte([=](int) { return i; });
        const Signs flip = exclusive_or(equal(first_place, place), equal(second_place, place));
        code[i] = different(shuffled(bytes_of(negative(l[i])), *map), bytes_of(flip));
    }
}

// The codewords of all paths for a subtree of n rows, each byte 0 or -1. True if paths moved:
// path j of the result was path (*map)[j] before. `scratch` has room for n rows.
template <int L>
bool list_node(const uint8_t* types, int node, int n, const Bytes* l, Bytes* code, Bytes* scratch, Paths* paths,
               Bytes* map) {
    const int half = n / 2;
    if (types[node] == ALL_FROZEN) {
        list_frozen<L>(l, n, paths);
        for (int i = 0; i < n; ++i) code[i] = zero_bytes();
        return false;
    }
    if (types[node] == REPETITION) return list_repetition<L>(l, n, code, paths, map), true;
    if (types[node] == SINGLE_PARITY) return list_parity<L>(l, n, code, paths, map), true;
    if (types[node] == ALL_FREE && n <= MAX_REPETITION) return list_free<L>(l, n, code, paths, map), true;
    Bytes left = zero_bytes(), right = zero_bytes();
    bool left_moved = false;
    if (types[2 * node] == ALL_FROZEN) {
        if (paths->differ) {
            for (int i = 0; i < half; ++i) scratch[i] = check_node(l[i], l[i + half]);
            list_frozen<L>(scratch, half, paths);
        }
        for (int i = 0; i < half; ++i) scratch[i] = add_saturated(l[i + half], l[i]);
    } else {
        for (int i = 0; i < half; ++i) scratch[i] = check_node(l[i], l[i + half]);
        left_moved = list_node<L>(types, 2 * node, half, scratch, code, scratch + half, paths, &left);
        for (int i = 0; i < half && left_moved; ++i)
            scratch[i] = variable_node(shuffled(l[i], left), shuffled(l[i + half], left), signs_in(code[i]));
        for (int i = 0; i < half && !left_moved; ++i) scratch[i] = variable_node(l[i], l[i + half], signs_in(code[i]));
    }
    const bool moved = list_node<L>(types, 2 * node + 1, half, scratch, code + half, scratch + half, paths, &right);
    if (types[2 * node] == ALL_FROZEN)
        for (int i = 0; i < half; ++i) code[i] = code[i + half];
    else
        for (int i = 0; i < half; ++i) code[i] = different(moved ? shuffled(code[i], right) : code[i], code[i + half]);
    *map = !left_moved ? right : moved ? shuffled(left, right) : left;
    return left_moved || moved;
}

// Rows of 64 lanes like `encode_block`, of which the first `lanes` hold blocks; `positions` says where in a block a
// row goes, `memory` has room for three times as many rows.
template <int L>
void list_encode(int rows, int lanes, const uint8_t* types, const uint16_t* positions, const Bytes* l, Signs* code,
                 Bytes* memory) {
    Bytes *inputs = memory, *scratch = memory + rows, *codes = memory + 2 * rows, map;
    const int blocks = LANES / L;
    int8_t row[LANES], bits[LANES];
    int16_t metric[LANES];
    for (int i = 0; i < rows; ++i) code[i] = no_signs();
    for (int start = 0; start < lanes; start += blocks) {
        for (int i = 0; i < rows; ++i) {
            const int8_t* source = (const int8_t*)(l + i) + start;
            for (int j = 0; j < LANES; ++j) row[j] = source[j / L];
            inputs[positions[i]] = load_bytes(row);
        }
        Paths paths = {{}, false};
        for (int k = 0; k < WIDE_PARTS; ++k)
            paths.metric.part[k] = each_short([](int j) { return j & (L - 1) ? WORST : 0; });
        list_node<L>(types, 1, rows, inputs, codes, scratch, &paths, &map);
        memcpy(metric, &paths.metric, sizeof metric);
        int best[LANES];
        for (int j = 0; j < blocks; ++j) {
            best[j] = j * L;
            for (int k = j * L; k < (j + 1) * L; ++k)
                if (metric[k] < metric[best[j]]) best[j] = k;
        }
        memset(bits, 0, LANES);
        for (int i = 0; i < rows; ++i) {
            const int8_t* found = (const int8_t*)(codes + positions[i]);
            for (int j = 0; j < blocks; ++j) bits[start + j] = found[best[j]];
            code[i] = exclusive_or(code[i], signs_in(load_bytes(bits)));
        }
    }
}

inline void list_encode_block(int rows, int lanes, int list_size, const uint8_t* types, const uint16_t* positions,
                              const Bytes* l, Signs* code, Bytes* memory) {
    switch (list_size) {
        case 2: return list_encode<2>(rows, lanes, types, positions, l, code, memory);
        case 4: return list_encode<4>(rows, lanes, types, positions, l, code, memory);
        default: return list_encode<8>(rows, lanes, types, positions, l, code, memory);
    }
}

}  // namespace
#endif
