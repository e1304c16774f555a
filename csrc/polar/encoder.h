// Polar: the successive-cancellation encoder of one level, 64 blocks side by side (Korada and Urbanke, arXiv 0903.0307).
//
// Position i of a block is the row that has the bits of i reversed, so that in the order of rows every step of the code
// pairs neighbours. What costs time is moving rows of long nodes through the second cache: they are made by the chunk,
// several steps are taken with a row in registers, and information bits leave from the leaves of the code.
#ifndef GCOMPRESS_POLAR_ENCODER_H
#define GCOMPRESS_POLAR_ENCODER_H

#include "lanes.h"
#include "transform.h"

namespace {

// Types of the 2 N - 1 subtrees, the root at 1 and the children of t at 2 t and 2 t + 1: position i carries information
// if rank[i] < free.
inline void subtree_types(const uint16_t* rank, int rows, int free, uint8_t* types) {
    for (int i = 0; i < rows; ++i) types[rows + i] = rank[i] < free ? ALL_FREE : ALL_FROZEN;
    for (int size = 2, level = rows / 2; level > 0; level /= 2, size *= 2)
        for (int node = level; node < 2 * level; ++node)
            types[node] = subtree_type(types[2 * node], types[2 * node + 1], size);
}

// Where the information bits of a block go: a word of `step` bytes for each, up to 8 bytes more are touched.
struct Output {
    uint8_t* at;
    int step;
    int rows;                   // of the whole block
    const uint16_t* positions;  // of the whole block
    uint64_t* buffer;           // of as many rows
};
inline void put_words(const uint64_t* words, int count, Output* out) {
    if (out->step == 8) {
        memcpy(out->at, words, (size_t)count * sizeof(uint64_t));
    } else {
        for (int i = 0; i < count; ++i) store(out->at + out->step * i, words[i]);
    }
    out->at += out->step * count;
}

// The row of a node's position i: its bits reversed.
template <int n>
struct Reversed {
    uint8_t row[n];
    constexpr Reversed() : row() {
        for (int i = 0; i < n; ++i)
            for (int bit = 1; bit < n; bit *= 2) row[i] = (uint8_t)(2 * row[i] + (i & bit ? 1 : 0));
    }
};

// The words of a node's positions but the first `skipped`, by its codeword.
template <int fixed>
inline void put_node(const Signs* code, int size, int skipped, Output* out) {
    if constexpr (fixed > 0) {
        static constexpr Reversed<fixed> reversed;
        const int group = fixed < 8 ? fixed : 8;
        uint64_t words[fixed];
        for (int i = 0; i < fixed; i += group) {
            uint64_t w[group];
            for (int k = 0; k < group; ++k) w[k] = word_of(code[reversed.row[i + k]]);
            for (int half = 1; half < group; half *= 2)
                for (int k = 0; k < group; ++k)
                    if (!(k & half)) w[k] ^= w[k + half];
            memcpy(words + i, w, sizeof w);
        }
        for (int half = 8; half < fixed; half *= 2) {
            for (int i = 0; i < fixed; i += 8) {
                if (i & half) continue;
                EightWords a, b;
                load_eight(&a, words + i);
                load_eight(&b, words + i + half);
                a ^= b;
                store_eight(words + i, &a);
            }
        }
        put_words(words + skipped, fixed - skipped, out);
    } else {
        for (int i = 0; i < size; ++i) out->buffer[i] = word_of(code[i]);
        transform(out->buffer, size);
        const int stride = out->rows / size;
        for (int i = 0; i < size; ++i) {
            store(out->at, out->buffer[out->positions[i] / stride]);
            out->at += out->step;
        }
    }
}

// Rows of log-likelihoods: in memory, or computed when they are asked for. The rows of a node come in such an order that
// the first step pairs neighbours (a tile's own: position i of a block is the row that has the bits of i reversed), so
// that every step streams through memory.
struct Stored {
    enum { in_memory = 1, sums = 0 };
    const Bytes* l;
    Bytes operator()(int i) const { return l[i]; }
};
struct Variable {  // inputs of the second half, given the first half's code
    enum { in_memory = 0, sums = 0 };
    const Bytes* l;
    const Signs* left;
    Bytes operator()(int i) const { return variable_node(l[2 * i], l[2 * i + 1], left[i]); }
};
template <class Row>
struct Sums {  // the same if the first half is frozen
    enum { in_memory = 0, sums = 1 };
    Row row;
    Bytes operator()(int i) const { return add_saturated(row(2 * i), row(2 * i + 1)); }
};
inline const Bytes* place_of(const Stored& rows, const Bytes*) { return rows.l; }
template <class Row>
inline const Bytes* place_of(const Row&, const Bytes* scratch) {  // where they go to be stored
    return scratch;
}

// The sign of the sum of n <= 128 rows, summed in 16 bits.
template <class Row>
inline Signs sum_signs(const Row& rows, int n) {
    Metrics sums = no_metrics();
    for (int i = 0; i < n; ++i) add_to(&sums, rows(i));
    return negative(sums);
}

// Wagner's rule: hard decisions, and where their parity is odd the least reliable one at the first position flips.
template <int n>
inline void single_parity(const Bytes* l, Signs* code) {
    static constexpr Reversed<n> reversed;
    Signs odd = no_signs();
    Bytes weakest = magnitude(l[0]);
    for (int i = 0; i < n; ++i) {
        code[i] = negative(l[i]);
        odd = exclusive_or(odd, code[i]);
        weakest = least(weakest, magnitude(l[i]));
    }
    for (int k = 0; k < n; ++k) {
        const int i = reversed.row[k];
        const Signs flip = both(odd, equal(magnitude(l[i]), weakest));
        code[i] = exclusive_or(code[i], flip);
        odd = without(odd, flip);
    }
}

// How many steps in a row begin with check nodes, from this node on along the first halves; at most AHEAD, which are
// taken together.
const int AHEAD = WIDE == 16 ? 3 : 2;  // fewer registers
inline int steps_ahead(const uint8_t* types, int node) {
    int steps = 0;
    for (; steps < AHEAD && types[node] == GENERAL && types[2 * node] != ALL_FROZEN; node *= 2) ++steps;
    return steps;
}

// Rows from … to - 1 of n go to l unless they are there already, and that many steps of check nodes, one behind the
// other, to `next`: n / 2 rows, n / 4, n / 8.
template <int steps, class Row>
inline void take_steps_of(const Row& row, int from, int to, int n, Bytes* l, Bytes* next) {
    Bytes *half = next, *quarter = next + n / 2, *eighth = quarter + n / 4;
    for (int i = from; i < to; i += 1 << steps) {
        Bytes a[1 << steps];
        for (int k = 0; k < 1 << steps; ++k) {
            a[k] = row(i + k);
            if (l) l[i + k] = a[k];
        }
        for (int k = 0; k < 1 << (steps - 1); ++k) half[i / 2 + k] = a[k] = check_node(a[2 * k], a[2 * k + 1]);
        for (int k = 0; k < 1 << steps >> 2; ++k) quarter[i / 4 + k] = a[k] = check_node(a[2 * k], a[2 * k + 1]);
        if (steps == 3) eighth[i / 8] = check_node(a[0], a[1]);
    }
}
template <class Row>
inline void take_steps(int steps, const Row& row, int from, int to, int n, Bytes* l, Bytes* next) {
    switch (steps) {
        case 1: return take_steps_of<1>(row, from, to, n, l, next);
        case 2: return take_steps_of<2>(row, from, to, n, l, next);
        default: return take_steps_of<AHEAD>(row, from, to, n, l, next);
    }
}

// A codeword from those of both halves.
inline void join(const Signs* left, const Signs* right, int half, Signs* code) {
    for (int i = 0; i < half; ++i) {
        const Signs second = right[i];
        code[2 * i] = exclusive_or(left[i], second);
        code[2 * i + 1] = second;
    }
}

// Successive cancellation with min-sum in saturated bytes: the codeword nearest to n rows of log-likelihoods, as this
// node of the code sees them. `scratch` has room for 2 n rows less what `rows` takes there, `parts` for 2 n signs.
// With fixed = 0 the size is known at run time only, and above 64.
template <int fixed>
struct Node {
    template <class Row>
    static void encode(int size, const uint8_t* types, int node, const Row& row, Signs* code, Bytes* scratch,
                       Signs* parts, Output* out) {
        const int n = fixed ? fixed : size;
        const Bytes* l = place_of(row, scratch);
        switch (types[node]) {
            case ALL_FROZEN:
                for (int i = 0; i < n; ++i) code[i] = no_signs();
                return;
            case ALL_FREE:
                for (int i = 0; i < n; ++i) code[i] = negative(row(i));
                return put_node<fixed>(code, n, 0, out);
            case REPETITION: {
                const Signs sign = sum_signs(row, n);
                for (int i = 0; i < n; ++i) code[i] = sign;
                const uint64_t word = word_of(sign);
                return put_words(&word, 1, out);
            }
            case SINGLE_PARITY:
                for (int i = 0; i < n && !Row::in_memory; ++i) scratch[i] = row(i);
                if constexpr (fixed >= 4) {
                    single_parity<fixed>(l, code);
                    put_node<fixed>(code, n, 1, out);
                }
                return;
            default: break;
        }
        if (types[2 * node] == ALL_FROZEN) {
            encode_sums(n, types, node, Sums<Row>{row}, parts, scratch, parts + n / 2, out);
            for (int i = 0; i < n / 2; ++i) code[2 * i] = code[2 * i + 1] = parts[i];
            return;
        }
        const int steps = steps_ahead(types, node);
        Bytes* next = Row::in_memory ? scratch : scratch + n;
        take_steps(steps, row, 0, n, n, Row::in_memory ? 0 : scratch, next);
        encode_ahead(n, types, node, l, steps, code, next, parts, out);
    }

    // The second half of a node whose first half is frozen.
    template <class Row>
    static void encode_sums(int n, const uint8_t* types, int node, const Sums<Row>& sums, Signs* code, Bytes* scratch,
                            Signs* parts, Output* out) {
        if constexpr (Row::sums) {  // sums of sums
            for (int i = 0; i < n / 2; ++i) scratch[i] = sums(i);
            encode_half(n, types, 2 * node + 1, Stored{scratch}, code, scratch + n / 2, parts, out);
        } else {
            encode_half(n, types, 2 * node + 1, sums, code, scratch, parts, out);
        }
    }

    // The same for a node that begins with check nodes, if its rows are stored and that many steps taken, to `scratch`.
    static void encode_ahead(int size, const uint8_t* types, int node, const Bytes* l, int steps, Signs* code,
                             Bytes* scratch, Signs* parts, Output* out) {
        const int n = fixed ? fixed : size, half = n / 2;
        Signs *left = parts, *right = parts + half;
        if (steps > 1)
            encode_half_ahead(n, types, 2 * node, scratch, steps - 1, left, scratch + half, parts + n, out);
        else
            encode_half(n, types, 2 * node, Stored{scratch}, left, scratch + half, parts + n, out);
        const Variable below = {l, left};
        encode_half(n, types, 2 * node + 1, below, right, scratch, parts + n, out);
        join(left, right, half, code);
    }

    template <class Row>
    static void encode_half(int n, const uint8_t* types, int child, const Row& row, Signs* code, Bytes* scratch,
                            Signs* parts, Output* out) {
        if constexpr (fixed > 0)
            Node<fixed / 2>::encode(n / 2, types, child, row, code, scratch, parts, out);
        else if (n == 128)
            Node<64>::encode(64, types, child, row, code, scratch, parts, out);
        else
            Node<0>::encode(n / 2, types, child, row, code, scratch, parts, out);
    }
    static void encode_half_ahead(int n, const uint8_t* types, int child, const Bytes* l, int steps, Signs* code,
                                  Bytes* scratch, Signs* parts, Output* out) {
        if constexpr (fixed > 0)
            Node<fixed / 2>::encode_ahead(n / 2, types, child, l, steps, code, scratch, parts, out);
        else if (n == 128)
            Node<64>::encode_ahead(64, types, child, l, steps, code, scratch, parts, out);
        else
            Node<0>::encode_ahead(n / 2, types, child, l, steps, code, scratch, parts, out);
    }
};
template <>
struct Node<1> {
    template <class Row>
    static void encode(int, const uint8_t* types, int node, const Row& row, Signs* code, Bytes*, Signs*, Output* out) {
        code[0] = types[node] == ALL_FROZEN ? no_signs() : negative(row(0));
        if (types[node] != ALL_FROZEN) put_node<1>(code, 1, 0, out);
    }
    static void encode_ahead(int, const uint8_t*, int, const Bytes*, int, Signs*, Bytes*, Signs*, Output*) {}  // never
};

// A whole block: its rows are at l and that many steps taken, to `scratch`.
inline void encode_block(int rows, const uint8_t* types, const Bytes* l, int steps, Signs* code, Bytes* scratch,
                         Signs* parts, Output* out) {
    const Stored stored = {l};
    if (rows > 64)
        return steps ? Node<0>::encode_ahead(rows, types, 1, l, steps, code, scratch, parts, out)
                     : Node<0>::encode(rows, types, 1, stored, code, scratch, parts, out);
    switch (rows) {
        case 16: return Node<16>::encode(16, types, 1, stored, code, scratch, parts, out);
        case 32: return Node<32>::encode(32, types, 1, stored, code, scratch, parts, out);
        default: return Node<64>::encode(64, types, 1, stored, code, scratch, parts, out);
    }
}

}  // namespace
#endif
