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
    for (int k = 0; k < MOST_SHORTS; ++k) {
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
    for (int k = 0; k < MOST_SHORTS; ++k) {
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
        Metrics penalty = no_metrics();
        for (int i = start; i < n && i < start + MAX_REPETITION; ++i) add_to(&penalty, shortfall(l[i]));
        penalize<L>(paths, penalty);
    }
}

template <int L>
inline void list_repetition(const Bytes* l, int n, Bytes* code, Paths* paths, Bytes* map) {
    Metrics penalty = no_metrics(), sum = no_metrics(), price, sign;
    for (int i = 0; i < n; ++i) {
        add_to(&penalty, shortfall(l[i]));
        add_to(&sum, l[i]);
    }
    for (int k = 0; k < MOST_SHORTS; ++k) {
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
    for (int k = 0; k < MOST_SHORTS; ++k) price.part[k] += toggle.part[k];
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
        for (int k = 0; k < MOST_SHORTS; ++k)
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
