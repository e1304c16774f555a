// Polar: the successive-cancellation encoder and the decoder of a polar source code, 64
// blocks side by side (gcompress/compressors/polar.py, docs/polar.md).
//
// A tile is N rows of 64 lanes, one block a lane: entry (row, lane) is byte 64 row + lane, so
// nothing is transposed. A row of 64 values is one `Bytes`, its 64 bits one `Signs`.
//
// Position i of a block is the row that has the bits of i reversed, so that in the order of rows every step of the code
// pairs neighbours. What costs time is moving rows of long nodes through the second cache: they are made by the chunk,
// several steps are taken with a row in registers, and information bits leave from the leaves of the code. Decoding,
// which needs words alone, goes by positions.
#ifndef GCOMPRESS_POLAR_H
#define GCOMPRESS_POLAR_H

#include "arith/polar.h"
#include "gcompress.h"
#include "simd.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

const int LANES = 64;
const int MAX_BLOCK = 16384;
const uint8_t PADDING_ROW = 255;

// 64 signed bytes (sums saturate at -128 and 127, magnitudes at 127), and 64 bits in the form that is cheapest to select by.
#if defined(__AVX512BW__)
typedef __m512i Bytes;
typedef uint64_t Signs;
inline Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(int8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes add_saturated(Bytes a, Bytes b) { return _mm512_adds_epi8(a, b); }
inline Bytes check_node(Bytes a, Bytes b) {
    return _mm512_max_epi8(_mm512_min_epi8(a, b), _mm512_subs_epi8(zero_bytes(), _mm512_max_epi8(a, b)));
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    return _mm512_mask_subs_epi8(_mm512_adds_epi8(b, a), c, b, a);
}
inline Bytes magnitude(Bytes a) { return _mm512_abs_epi8(_mm512_max_epi8(a, _mm512_set1_epi8(-127))); }
inline Bytes least(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
inline Signs negative(Bytes a) { return _mm512_movepi8_mask(a); }
inline Signs equal(Bytes a, Bytes b) { return _mm512_cmpeq_epi8_mask(a, b); }
inline Signs no_signs() { return 0; }
inline Signs exclusive_or(Signs a, Signs b) { return a ^ b; }
inline Signs both(Signs a, Signs b) { return a & b; }
inline Signs without(Signs a, Signs b) { return a & ~b; }
inline uint64_t word_of(Signs a) { return a; }
inline Bytes doubled_plus(Bytes a, Signs bit) {  // 2 a + bit
    const __m512i twice = _mm512_add_epi8(a, a);
    return _mm512_mask_sub_epi8(twice, bit, twice, _mm512_set1_epi8(-1));
}
#elif defined(__AVX2__)
struct Bytes {
    __m256i low, high;
};
typedef Bytes Signs;  // 0 or -1
#define GC_PAIR(expression_low, expression_high) \
    Bytes result = {expression_low, expression_high}; \
    return result
inline Bytes load_bytes(const int8_t* p) {
    GC_PAIR(_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32)));
}
inline void store_bytes(int8_t* p, Bytes a) {
    _mm256_storeu_si256((__m256i*)p, a.low);
    _mm256_storeu_si256((__m256i*)(p + 32), a.high);
}
inline Bytes zero_bytes() { GC_PAIR(_mm256_setzero_si256(), _mm256_setzero_si256()); }
inline Bytes add_saturated(Bytes a, Bytes b) {
    GC_PAIR(_mm256_adds_epi8(a.low, b.low), _mm256_adds_epi8(a.high, b.high));
}
inline __m256i check_node_half(__m256i a, __m256i b) {
    return _mm256_max_epi8(_mm256_min_epi8(a, b), _mm256_subs_epi8(_mm256_setzero_si256(), _mm256_max_epi8(a, b)));
}
inline Bytes check_node(Bytes a, Bytes b) { GC_PAIR(check_node_half(a.low, b.low), check_node_half(a.high, b.high)); }
inline __m256i variable_node_half(__m256i a, __m256i b, __m256i c) {
    return _mm256_blendv_epi8(_mm256_adds_epi8(b, a), _mm256_subs_epi8(b, a), c);
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    GC_PAIR(variable_node_half(a.low, b.low, c.low), variable_node_half(a.high, b.high, c.high));
}
inline __m256i magnitude_half(__m256i a) { return _mm256_abs_epi8(_mm256_max_epi8(a, _mm256_set1_epi8(-127))); }
inline Bytes magnitude(Bytes a) { GC_PAIR(magnitude_half(a.low), magnitude_half(a.high)); }
inline Bytes least(Bytes a, Bytes b) { GC_PAIR(_mm256_min_epu8(a.low, b.low), _mm256_min_epu8(a.high, b.high)); }
inline Signs equal(Bytes a, Bytes b) {
    GC_PAIR(_mm256_cmpeq_epi8(a.low, b.low), _mm256_cmpeq_epi8(a.high, b.high));
}
inline Signs negative(Bytes a) {
    GC_PAIR(_mm256_cmpgt_epi8(_mm256_setzero_si256(), a.low), _mm256_cmpgt_epi8(_mm256_setzero_si256(), a.high));
}
inline Signs no_signs() { return zero_bytes(); }
inline Signs exclusive_or(Signs a, Signs b) { GC_PAIR(a.low ^ b.low, a.high ^ b.high); }
inline Signs both(Signs a, Signs b) { GC_PAIR(a.low & b.low, a.high & b.high); }
inline Signs without(Signs a, Signs b) { GC_PAIR(a.low & ~b.low, a.high & ~b.high); }
inline uint64_t word_of(Signs a) {
    return (uint32_t)_mm256_movemask_epi8(a.low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(a.high) << 32;
}
inline Bytes doubled_plus(Bytes a, Signs bit) {
    GC_PAIR(_mm256_sub_epi8(_mm256_add_epi8(a.low, a.low), bit.low),
            _mm256_sub_epi8(_mm256_add_epi8(a.high, a.high), bit.high));
}
#undef GC_PAIR
#else
// Four vectors of 16 bytes in the compiler's own notation: SSE2, NEON or whatever there is.
typedef int8_t Part __attribute__((vector_size(16)));
struct Bytes {
    Part part[4];
};
typedef Bytes Signs;  // 0 or -1
#if defined(__SSE2__)
inline Part add_saturated_part(Part a, Part b) { return (Part)_mm_adds_epi8((__m128i)a, (__m128i)b); }
inline Part subtract_saturated_part(Part a, Part b) { return (Part)_mm_subs_epi8((__m128i)a, (__m128i)b); }
#else
typedef uint8_t UnsignedPart __attribute__((vector_size(16)));
inline Part saturate(Part sum, Part overflow, Part a) {
    return (sum & ~(overflow >> 7)) | (((a >> 7) ^ 127) & (overflow >> 7));
}
inline Part add_saturated_part(Part a, Part b) {
    const Part sum = (Part)((UnsignedPart)a + (UnsignedPart)b);
    return saturate(sum, (a ^ sum) & (b ^ sum), a);
}
inline Part subtract_saturated_part(Part a, Part b) {
    const Part difference = (Part)((UnsignedPart)a - (UnsignedPart)b);
    return saturate(difference, (a ^ b) & (a ^ difference), a);
}
#endif
#define GC_PARTS(expression)                       \
    Bytes result;                                  \
    for (int k = 0; k < 4; ++k) result.part[k] = (expression); \
    return result
inline Part select(Part where, Part a, Part b) { return (where & a) | (~where & b); }
inline Part larger(Part a, Part b) { return select(a > b, a, b); }
inline Part smaller(Part a, Part b) { return select(a > b, b, a); }
inline Bytes load_bytes(const int8_t* p) { return load<Bytes>(p); }
inline void store_bytes(int8_t* p, Bytes a) { store(p, a); }
inline Bytes zero_bytes() { GC_PARTS(Part{}); }
inline Bytes add_saturated(Bytes a, Bytes b) { GC_PARTS(add_saturated_part(a.part[k], b.part[k])); }
inline Bytes check_node(Bytes a, Bytes b) {
    GC_PARTS(larger(smaller(a.part[k], b.part[k]), subtract_saturated_part(Part{}, larger(a.part[k], b.part[k]))));
}
inline Bytes variable_node(Bytes a, Bytes b, Signs c) {
    GC_PARTS(select(c.part[k], subtract_saturated_part(b.part[k], a.part[k]),
                    add_saturated_part(b.part[k], a.part[k])));
}
inline Bytes magnitude(Bytes a) { GC_PARTS(select(a.part[k] < 0, subtract_saturated_part(Part{}, a.part[k]), a.part[k])); }
inline Bytes least(Bytes a, Bytes b) { GC_PARTS(smaller(a.part[k], b.part[k])); }
inline Signs equal(Bytes a, Bytes b) { GC_PARTS(a.part[k] == b.part[k]); }
inline Signs negative(Bytes a) { GC_PARTS(a.part[k] < 0); }
inline Signs no_signs() { return zero_bytes(); }
inline Signs exclusive_or(Signs a, Signs b) { GC_PARTS(a.part[k] ^ b.part[k]); }
inline Signs both(Signs a, Signs b) { GC_PARTS(a.part[k] & b.part[k]); }
inline Signs without(Signs a, Signs b) { GC_PARTS(a.part[k] & ~b.part[k]); }
inline uint64_t word_of(Signs a) {
    uint64_t word = 0;
    for (int group = 0; group < 8; ++group) {  // eight low bits meet in the top byte of a product
        const uint64_t ones = load<uint64_t>((const char*)&a + 8 * group) & 0x0101010101010101ull;
        word |= ((ones * 0x0102040810204080ull) >> 56) << (8 * group);
    }
    return word;
}
inline Bytes doubled_plus(Bytes a, Signs bit) { GC_PARTS(((a.part[k] & 127) << 1) - bit.part[k]); }
#undef GC_PARTS
#endif

// a, or -a where c.
inline Bytes negate_where(Bytes a, Signs c) { return variable_node(a, zero_bytes(), c); }

// Types of the 2 N - 1 subtrees, the root at 1 and the children of t at 2 t and 2 t + 1:
// position i carries information if rank[i] < free.
inline void subtree_types(const uint16_t* rank, int rows, int free, uint8_t* types, uint16_t* counts) {
    for (int i = 0; i < rows; ++i) counts[rows + i] = rank[i] < free;
    for (int i = 0; i < rows; ++i) types[rows + i] = counts[rows + i] ? ALL_FREE : ALL_FROZEN;
    for (int size = 2, level = rows / 2; level > 0; level /= 2, size *= 2) {
        for (int node = level; node < 2 * level; ++node) {
            const int count = counts[2 * node] + counts[2 * node + 1];
            const int left = counts[2 * node];
            counts[node] = (uint16_t)count;
            uint8_t type = GENERAL;
            if (count == 0)
                type = ALL_FROZEN;
            else if (count == size)
                type = ALL_FREE;
            else if (count == 1 && size <= MAX_REPETITION && (types[2 * node + 1] == REPETITION || size == 2) &&
                     left == 0)
                type = REPETITION;
            else if (count == size - 1 && size >= 4 && size <= MAX_PARITY && rank[node * size - rows] >= free)
                type = SINGLE_PARITY;
            types[node] = type;
        }
    }
}

// Eight words at once; the compiler makes of it what registers there are.
typedef uint64_t EightWords __attribute__((vector_size(64)));
inline void load_eight(EightWords* value, const uint64_t* words) { memcpy(value, words, sizeof *value); }
inline void store_eight(uint64_t* words, const EightWords* value) { memcpy(words, value, sizeof *value); }

// The polar transform of 8 words; and of N >= 16 words, in place, of which those of every eight are done. It is its own
// inverse. Strides from 8 on are taken three at a time.
inline void transform_eight(uint64_t* w) {
    for (int half = 1; half < 8; half *= 2)
        for (int k = 0; k < 8; ++k)
            if (!(k & half)) w[k] ^= w[k + half];
}
template <int strides>
inline void transform_strides(uint64_t* words, int rows, int first) {
    const int count = 1 << strides;
    for (int i = 0; i < rows; i += count * first) {
        for (int j = i; j < i + first; j += 8) {
            EightWords w[count];
            for (int k = 0; k < count; ++k) load_eight(w + k, words + j + k * first);
            for (int half = 1; half < count; half *= 2)
                for (int k = 0; k < count; ++k)
                    if (!(k & half)) w[k] ^= w[k + half];
            for (int k = 0; k < count; ++k) store_eight(words + j + k * first, w + k);
        }
    }
}
inline void transform_beyond_eight(uint64_t* words, int rows) {
    int stride = 8;
    for (; 4 * stride < rows; stride *= 8) transform_strides<3>(words, rows, stride);
    if (2 * stride < rows)
        transform_strides<2>(words, rows, stride);
    else if (stride < rows)
        transform_strides<1>(words, rows, stride);
}
inline void transform(uint64_t* words, int rows) {
    for (int i = 0; i < rows; i += 8) {
        uint64_t w[8];
        memcpy(w, words + i, sizeof w);
        transform_eight(w);
        memcpy(words + i, w, sizeof w);
    }
    transform_beyond_eight(words, rows);
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
#if defined(__AVX512BW__)
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int i = 0; i < n; ++i) {
        const __m512i row = rows(i);
        low = _mm512_add_epi16(low, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(row)));
        high = _mm512_add_epi16(high, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(row, 1)));
    }
    return (uint64_t)_mm512_movepi16_mask(low) | (uint64_t)_mm512_movepi16_mask(high) << 32;
#else
    int16_t sums[LANES] = {0};
    int8_t row[LANES], signs[LANES];
    for (int i = 0; i < n; ++i) {
        store_bytes(row, rows(i));
        for (int j = 0; j < LANES; ++j) sums[j] = (int16_t)(sums[j] + row[j]);  // vectorised
    }
    for (int j = 0; j < LANES; ++j) signs[j] = (int8_t)(sums[j] >> 15);
    return load_bytes(signs);
#endif
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
#if defined(__AVX512BW__)
const int AHEAD = 3;
#else
const int AHEAD = 2;  // fewer registers
#endif
inline int steps_ahead(const uint8_t* types, int node) {
    int steps = 0;
    for (; steps < AHEAD && types[node] == GENERAL && types[2 * node] != ALL_FROZEN; node *= 2) ++steps;
    return steps;
}

// Rows from … to - 1 of n go to l unless they are there already, and so many steps of check nodes, one behind the
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
            default:
                break;
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

    // The same for a node that begins with check nodes, if its rows are stored and so many steps taken, to `scratch`.
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

// A whole block: its rows are at l and so many steps taken, to `scratch`.
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

// round(x scale) clamped to -127 … 127, for 64 entries.
inline Bytes samples_of(const float* x, float scale) {
#if defined(__AVX512BW__)
    const __m512 factor = _mm512_set1_ps(scale), top = _mm512_set1_ps(127.0f), bottom = _mm512_set1_ps(-127.0f);
    __m512i part[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * k), factor);
        part[k] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, bottom), top));
    }
    const __m512i low = _mm512_packs_epi32(part[0], part[1]), high = _mm512_packs_epi32(part[2], part[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
#elif defined(__AVX2__)
    const __m256 factor = _mm256_set1_ps(scale), top = _mm256_set1_ps(127.0f), bottom = _mm256_set1_ps(-127.0f);
    __m256i part[8];
    for (int k = 0; k < 8; ++k) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * k), factor);
        part[k] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, bottom), top));
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i half[2];
    for (int k = 0; k < 2; ++k) {
        const __m256i low = _mm256_packs_epi32(part[4 * k], part[4 * k + 1]);
        const __m256i high = _mm256_packs_epi32(part[4 * k + 2], part[4 * k + 3]);
        half[k] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    }
    Bytes result = {half[0], half[1]};
    return result;
#else
    int8_t bytes[LANES];
    for (int j = 0; j < LANES; ++j) {  // vectorised
        bytes[j] = sample_of(x[j] * scale);
    }
    return load_bytes(bytes);
#endif
}

// The sum of 64 signed bytes, in parts that `folded` adds up.
#if defined(__AVX512BW__)
typedef __m512i ByteSum;
inline ByteSum no_sum() { return _mm512_setzero_si512(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {  // 128 more for every byte
    return _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_xor_si512(a, _mm512_set1_epi8(-128)), zero_bytes()));
}
inline int64_t folded(ByteSum sum, int64_t rows) { return _mm512_reduce_add_epi64(sum) - 128 * LANES * rows; }
#elif defined(__AVX2__)
typedef __m256i ByteSum;
inline ByteSum no_sum() { return _mm256_setzero_si256(); }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {
    const __m256i zero = _mm256_setzero_si256(), top = _mm256_set1_epi8(-128);
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(a.low ^ top, zero));
    return _mm256_add_epi64(sum, _mm256_sad_epu8(a.high ^ top, zero));
}
inline int64_t folded(ByteSum sum, int64_t rows) {
    int64_t parts[4];
    memcpy(parts, &sum, sizeof parts);
    return parts[0] + parts[1] + parts[2] + parts[3] - 128 * LANES * rows;
}
#else
typedef int64_t ByteSum;
inline ByteSum no_sum() { return 0; }
inline ByteSum with_bytes(ByteSum sum, Bytes a) {
    int8_t bytes[LANES];
    int16_t total = 0;
    store_bytes(bytes, a);
    for (int j = 0; j < LANES; ++j) total = (int16_t)(total + bytes[j]);  // vectorised
    return sum + total;
}
inline int64_t folded(ByteSum sum, int64_t) { return sum; }
#endif

// A row of `lanes` bytes, the rest 0; and its first `lanes` bytes to memory.
inline Bytes load_lanes(const int8_t* p, int lanes) {
    if (lanes == LANES) return load_bytes(p);
    int8_t row[LANES] = {0};
    memcpy(row, p, (size_t)lanes);
    return load_bytes(row);
}
inline void store_lanes(int8_t* p, Bytes a, int lanes) {
    if (lanes == LANES) return store_bytes(p, a);
    int8_t row[LANES];
    store_bytes(row, a);
    memcpy(p, row, (size_t)lanes);
}

// Signs from a word, the inverse of word_of.
inline Signs signs_of(uint64_t word) {
#if defined(__AVX512BW__)
    return word;
#elif defined(__AVX2__)
    const __m256i all = _mm256_set1_epi64x((long long)word), bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i second = _mm256_or_si256(first, _mm256_set1_epi8(4));
    const __m256i low = _mm256_shuffle_epi8(all, first), high = _mm256_shuffle_epi8(all, second);
    Signs result = {_mm256_cmpeq_epi8(low & bits, bits), _mm256_cmpeq_epi8(high & bits, bits)};
    return result;
#else
    int8_t bytes[LANES];
    for (int j = 0; j < LANES; ++j) bytes[j] = (int8_t)-(int)(word >> j & 1);
    return load_bytes(bytes);
#endif
}

// The labels of a row from their bits, the first at `bits` and the next ones `stride` further.
inline Bytes label_of(const uint64_t* bits, int stride, int levels) {
    Bytes label = zero_bytes();
    for (int k = levels - 1; k >= 0; --k) label = doubled_plus(label, signs_of(bits[k * stride]));
    return label;
}

// Labels of rows from … to - 1 of a tile, a byte each, from their bits: words[level][row].
inline void labels_of(const uint64_t* words, int rows, int levels, int from, int to, int lanes, int8_t* labels) {
    for (int i = from; i < to; ++i) store_lanes(labels + lanes * (i - from), label_of(words + i, rows, levels), lanes);
}

// Log-likelihoods of a level, from its table of [2^level prefixes][256 sample values]. All bits of a label of the negative
// sample are those of the sample inverted, so the tables' halves for samples >= 0 are enough: the rest is
// table[prefix][x] = -table[~prefix][-x], and 0 for ERASED.
const int CHUNK_ROWS = 64;
#if defined(__AVX512BW__)
#define GC_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))
template <int level>
struct Prefix {
    GC_VBMI static inline __m512i look_up(const __m512i* table, __m512i magnitude, const Signs* prefix) {
        const __m512i zero = Prefix<level - 1>::look_up(table, magnitude, prefix);
        const __m512i one = Prefix<level - 1>::look_up(table + (1 << level), magnitude, prefix);
        return _mm512_mask_mov_epi8(zero, prefix[level - 1], one);
    }
};
template <>
struct Prefix<0> {
    GC_VBMI static inline __m512i look_up(const __m512i* table, __m512i magnitude, const Signs*) {
        return _mm512_permutex2var_epi8(table[0], magnitude, table[1]);
    }
};
template <int level>
GC_VBMI void level_inputs_vbmi(const int8_t* samples, int rows, int from, int to, int lanes, const int8_t* table,
                               const uint64_t* words, Bytes* l) {
    __m512i halves[2 << level];  // in registers, if there are few
    for (int k = 0; k < 2 << level; ++k) halves[k] = _mm512_loadu_si512(table + 256 * (k / 2) + 64 * (k % 2));
    for (int i = from; i < to; ++i) {
        const __m512i x = load_lanes(samples + lanes * i, lanes);
        const Signs minus = _mm512_movepi8_mask(x), there = _mm512_cmpneq_epi8_mask(x, _mm512_set1_epi8(ERASED));
        Signs prefix[MAX_LEVELS];
        for (int k = 0; k < level; ++k) prefix[k] = words[k * rows + i] ^ minus;
        const __m512i found = Prefix<level>::look_up(halves, _mm512_abs_epi8(x), prefix);
        l[i] = _mm512_maskz_mov_epi8(there, _mm512_mask_sub_epi8(found, minus, zero_bytes(), found));
    }
}
#undef GC_VBMI
inline bool level_inputs_by_vectors(const int8_t* samples, int rows, int from, int to, int lanes, int level,
                                    const int8_t* table, const uint64_t* words, Bytes* l) {
    if (!__builtin_cpu_supports("avx512vbmi")) return false;
    switch (level) {
        case 0: return level_inputs_vbmi<0>(samples, rows, from, to, lanes, table, words, l), true;
        case 1: return level_inputs_vbmi<1>(samples, rows, from, to, lanes, table, words, l), true;
        case 2: return level_inputs_vbmi<2>(samples, rows, from, to, lanes, table, words, l), true;
        case 3: return level_inputs_vbmi<3>(samples, rows, from, to, lanes, table, words, l), true;
        case 4: return level_inputs_vbmi<4>(samples, rows, from, to, lanes, table, words, l), true;
        default: return false;  // by then as many tables as entries in a row
    }
}
#elif defined(__AVX2__)
// table[magnitude] by shuffles of 16 bytes, among which bits 4, 5 and 6 choose; 0 for a magnitude of 128.
inline __m256i look_up_magnitude(const int8_t* table, __m256i magnitude) {
    __m256i part[8];
    for (int k = 0; k < 8; ++k)
        part[k] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(table + 16 * k))),
                                      magnitude);
    const __m256i bit4 = _mm256_slli_epi16(magnitude, 3), bit5 = _mm256_slli_epi16(magnitude, 2);
    const __m256i bit6 = _mm256_slli_epi16(magnitude, 1);
    for (int k = 0; k < 4; ++k) part[k] = _mm256_blendv_epi8(part[2 * k], part[2 * k + 1], bit4);
    for (int k = 0; k < 2; ++k) part[k] = _mm256_blendv_epi8(part[2 * k], part[2 * k + 1], bit5);
    return _mm256_blendv_epi8(part[0], part[1], bit6);
}
template <int level>
inline __m256i look_up_half(const int8_t* table, __m256i magnitude, const __m256i* prefix) {
    if constexpr (level == 0) {
        return look_up_magnitude(table, magnitude);
    } else {
        const __m256i zero = look_up_half<level - 1>(table, magnitude, prefix);
        const __m256i one = look_up_half<level - 1>(table + (128 << level), magnitude, prefix);
        return _mm256_blendv_epi8(zero, one, prefix[level - 1]);
    }
}
template <int level>
inline __m256i level_input(const int8_t* table, __m256i x, const __m256i* bits) {
    const __m256i minus = _mm256_cmpgt_epi8(_mm256_setzero_si256(), x);
    __m256i prefix[MAX_LEVELS];
    for (int k = 0; k < level; ++k) prefix[k] = bits[k] ^ minus;
    return _mm256_sub_epi8(look_up_half<level>(table, _mm256_abs_epi8(x), prefix) ^ minus, minus);
}
template <int level>
void level_inputs_shuffled(const int8_t* samples, int rows, int from, int to, int lanes, const int8_t* table,
                           const uint64_t* words, Bytes* l) {
    for (int i = from; i < to; ++i) {
        const Bytes x = load_lanes(samples + lanes * i, lanes);
        __m256i low[MAX_LEVELS], high[MAX_LEVELS];
        for (int k = 0; k < level; ++k) {
            const Signs bits = signs_of(words[k * rows + i]);
            low[k] = bits.low, high[k] = bits.high;
        }
        l[i].low = level_input<level>(table, x.low, low);
        l[i].high = level_input<level>(table, x.high, high);
    }
}
inline bool level_inputs_by_vectors(const int8_t* samples, int rows, int from, int to, int lanes, int level,
                                    const int8_t* table, const uint64_t* words, Bytes* l) {
    switch (level) {
        case 0: return level_inputs_shuffled<0>(samples, rows, from, to, lanes, table, words, l), true;
        case 1: return level_inputs_shuffled<1>(samples, rows, from, to, lanes, table, words, l), true;
        case 2: return level_inputs_shuffled<2>(samples, rows, from, to, lanes, table, words, l), true;
        default: return false;
    }
}
#else
inline bool level_inputs_by_vectors(const int8_t*, int, int, int, int, int, const int8_t*, const uint64_t*, Bytes*) {
    return false;
}
#endif

#if defined(__AVX2__)
// inputs[j] = table[256 labels[j] + samples[j] as a byte], for 64 of them: places by vectors, loads one by one.
inline void look_up_samples(const int8_t* table, const int8_t* samples, const int8_t* labels, int8_t* inputs) {
    uint16_t places[LANES];
    for (int part = 0; part < LANES; part += 32) {
        const __m256i sample = _mm256_loadu_si256((const __m256i*)(samples + part));
        const __m256i label = _mm256_loadu_si256((const __m256i*)(labels + part));
        const __m256i low = _mm256_unpacklo_epi8(sample, label), high = _mm256_unpackhi_epi8(sample, label);
        _mm256_storeu_si256((__m256i*)(places + part), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i*)(places + part + 16), _mm256_permute2x128_si256(low, high, 0x31));
    }
    for (int j = 0; j < LANES; j += 8) {
        uint64_t eight = 0;
        for (int k = 0; k < 8; ++k) eight |= (uint64_t)(uint8_t)table[places[j + k]] << (8 * k);  // unrolled
        store(inputs + j, eight);
    }
}
#endif

// Inputs of a level of rows from … to - 1, at most CHUNK_ROWS. A tile of 2 … 7 levels is of one class, whose tables these
// are; one of 8 has none: its labels are the samples.
inline void level_inputs(const int8_t* samples, int rows, int from, int to, int lanes, int level, const uint8_t* slots,
                         const int8_t* tables, const uint64_t* words, Bytes* l) {
    const int8_t* table = tables + 256 * ((1 << level) - 1);
    if (tables && level_inputs_by_vectors(samples, rows, from, to, lanes, level, table, words, l)) return;
    int8_t labels[CHUNK_ROWS * LANES];
    if (tables) labels_of(words, rows, level, from, to, lanes, labels);
    for (int i = from; i < to; ++i) {
        int8_t inputs[LANES] = {0};
        const int8_t *sample = samples + lanes * i, *label = labels + lanes * (i - from);
        if (slots[i] == PADDING_ROW) {
        } else if (!tables) {
            for (int j = 0; j < lanes; ++j) inputs[j] = (int8_t)(1 - 2 * (sample[j] >> level & 1));
#if defined(__AVX2__)
        } else if (lanes == LANES) {
            look_up_samples(table, sample, label, inputs);
#endif
        } else {
            for (int j = 0; j < lanes; ++j) inputs[j] = table[256 * (int)label[j] + (uint8_t)sample[j]];
        }
        l[i] = load_bytes(inputs);
    }
}

// One tile's part of the plan that Python makes (gcompress/compressors/polar/planning.py).
struct PolarTile {
    int64_t rows, lanes;       // block length N, blocks side by side: 8, 16, 32 or 64
    int64_t levels;            // label bits m
    int64_t rank, positions;   // addresses of uint16 [N]: a position's rank, where a row goes
    int64_t free[MAX_LEVELS];  // information bits a block of every level
};

// The design of a class: addresses of its tables [1 + 2 + … + 2^(m-1)][256] and of its 2^m points.
struct PolarDesign {
    int64_t tables, points;
};

// What the subtree types of a level in the workspace are of: the next tile's are mostly the same.
struct PolarTyped {
    const uint16_t* rank;
    int rows, free;
};

// What encoding a tile needs besides.
struct PolarWorkspace {
    Bytes *inputs, *scratch, *list;  // list: 3 MAX_BLOCK, shared with parts
    Signs *code, *parts;
    int8_t* samples;
    uint64_t *words, *information;  // words: [MAX_LEVELS][rows]
    uint8_t* types;                 // [MAX_LEVELS][2 MAX_BLOCK]
    uint16_t* counts;
    PolarTyped* typed;  // [MAX_LEVELS]
};

inline PolarWorkspace polar_workspace(uint8_t* memory) {
    memory = (uint8_t*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    PolarWorkspace work;
    work.inputs = (Bytes*)memory;
    work.scratch = (Bytes*)(memory + LANES * MAX_BLOCK);
    work.code = (Signs*)(memory + 2 * LANES * MAX_BLOCK);
    work.list = (Bytes*)(memory + 3 * LANES * MAX_BLOCK);
    work.parts = (Signs*)work.list;
    work.samples = (int8_t*)(memory + 6 * LANES * MAX_BLOCK);
    work.words = (uint64_t*)(memory + 7 * LANES * MAX_BLOCK);
    work.information = work.words + MAX_LEVELS * MAX_BLOCK;
    work.counts = (uint16_t*)(work.information + MAX_BLOCK);
    work.types = (uint8_t*)(work.counts + 2 * MAX_BLOCK);
    work.typed = (PolarTyped*)(work.types + 2 * MAX_LEVELS * MAX_BLOCK);
    memset(work.typed, 0, MAX_LEVELS * sizeof *work.typed);
    return work;  // (8 LANES + 29) MAX_BLOCK bytes
}

inline uint8_t* types_of(const uint16_t* rank, int rows, int level, int free, PolarWorkspace work) {
    uint8_t* types = work.types + 2 * MAX_BLOCK * level;
    PolarTyped* typed = work.typed + level;
    if (typed->rank != rank || typed->rows != rows || typed->free != free) {
        subtree_types(rank, rows, free, types, work.counts);
        typed->rank = rank;
        typed->rows = rows;
        typed->free = free;
    }
    return types;
}

// Adds <samples, points of their labels> and <points, points> over the samples that matter.
inline void label_products(const int8_t* samples, const int8_t* labels, int count, const int16_t* points, int levels,
                           int64_t* products) {
    int64_t dot = 0, norm = 0;
#if defined(__AVX512BW__)
    // Points of up to 32 labels by byte shuffles, their lower and upper bytes apart.
    int8_t bytes[2][32] = {{0}, {0}};
    for (int k = 0; k < 1 << levels && levels <= 5; ++k) {
        bytes[0][k] = (int8_t)(points[k] & 255);
        bytes[1][k] = (int8_t)(points[k] >> 8);
    }
    __m512i parts[4];
    for (int k = 0; k < 4; ++k)
        parts[k] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(bytes[k / 2] + 16 * (k % 2))));
    __m512i norms = _mm512_setzero_si512();
    int j = 0;
    while (levels <= 5 && j + 64 <= count) {
        __m512i dots = _mm512_setzero_si512(), squares = dots;
        for (int part = 0; part < 8 && j + 64 <= count; ++part, j += 64) {  // sums of points below 2^13.5 fit 32 bits
            const __m512i label = _mm512_loadu_si512(labels + j), sample = _mm512_loadu_si512(samples + j);
            const __mmask64 there = _mm512_cmpneq_epi8_mask(sample, _mm512_set1_epi8(ERASED));
            const __mmask64 upper = _mm512_mask_test_epi8_mask(there, label, _mm512_set1_epi8(16));
            __m512i low = _mm512_maskz_shuffle_epi8(there, parts[0], label);
            __m512i high = _mm512_maskz_shuffle_epi8(there, parts[2], label);
            if (levels == 5) {
                low = _mm512_mask_shuffle_epi8(low, upper, parts[1], label);
                high = _mm512_mask_shuffle_epi8(high, upper, parts[3], label);
            }
            const __m512i minus = _mm512_movm_epi8(_mm512_movepi8_mask(sample));
            for (int side = 0; side < 2; ++side) {
                const __m512i point = side ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
                const __m512i value = side ? _mm512_unpackhi_epi8(sample, minus) : _mm512_unpacklo_epi8(sample, minus);
                dots = _mm512_add_epi32(dots, _mm512_madd_epi16(point, value));
                squares = _mm512_add_epi32(squares, _mm512_madd_epi16(point, point));
            }
        }
        dot += _mm512_reduce_add_epi32(dots);
        norms = _mm512_add_epi64(norms, _mm512_and_si512(squares, _mm512_set1_epi64(0xffffffff)));
        norms = _mm512_add_epi64(norms, _mm512_srli_epi64(squares, 32));
    }
    norm = _mm512_reduce_add_epi64(norms);
#elif defined(__AVX2__)
    // The same by halves.
    __m256i low_bytes[2], high_bytes[2];
    for (int half = 0; half < 2; ++half) {
        int8_t bytes[2][16] = {{0}, {0}};
        for (int k = 0; k < 16 && 16 * half + k < 1 << levels; ++k) {
            bytes[0][k] = (int8_t)(points[16 * half + k] & 255);
            bytes[1][k] = (int8_t)(points[16 * half + k] >> 8);
        }
        low_bytes[half] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes[0]));
        high_bytes[half] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes[1]));
    }
    const __m256i erased = _mm256_set1_epi8(ERASED), zero = _mm256_setzero_si256();
    __m256i norms = zero;
    int j = 0;
    while (levels <= 5 && j + 32 <= count) {
        __m256i dots = zero, all_squares = zero;
        for (int part = 0; part < 8 && j + 32 <= count; ++part, j += 32) {
            const __m256i label = _mm256_loadu_si256((const __m256i*)(labels + j));
            const __m256i sample = _mm256_loadu_si256((const __m256i*)(samples + j));
            __m256i low = _mm256_shuffle_epi8(low_bytes[0], label), high = _mm256_shuffle_epi8(high_bytes[0], label);
            if (levels == 5) {
                const __m256i upper = _mm256_slli_epi16(label, 3);  // bit 4 to the top of its byte
                low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(low_bytes[1], label), upper);
                high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(high_bytes[1], label), upper);
            }
            const __m256i absent = _mm256_cmpeq_epi8(sample, erased);
            low = _mm256_andnot_si256(absent, low);
            high = _mm256_andnot_si256(absent, high);
            const __m256i minus = _mm256_cmpgt_epi8(zero, sample);
            for (int side = 0; side < 2; ++side) {
                const __m256i point = side ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
                const __m256i value = side ? _mm256_unpackhi_epi8(sample, minus) : _mm256_unpacklo_epi8(sample, minus);
                dots = _mm256_add_epi32(dots, _mm256_madd_epi16(point, value));
                all_squares = _mm256_add_epi32(all_squares, _mm256_madd_epi16(point, point));
            }
        }
        int32_t dot_parts[8];
        memcpy(dot_parts, &dots, sizeof dots);
        for (int k = 0; k < 8; ++k) dot += dot_parts[k];
        norms = _mm256_add_epi64(norms, _mm256_and_si256(all_squares, _mm256_set1_epi64x(0xffffffff)));
        norms = _mm256_add_epi64(norms, _mm256_srli_epi64(all_squares, 32));
    }
    int64_t norm_parts[4];
    memcpy(norm_parts, &norms, sizeof norms);
    for (int k = 0; k < 4; ++k) norm += norm_parts[k];
#else
    int j = 0;
    (void)levels;
#endif
    for (; j < count; ++j) {
        const int32_t point = samples[j] == ERASED ? 0 : points[(uint8_t)labels[j]];
        dot += samples[j] * point;
        norm += point * point;
    }
    products[0] += dot;
    products[1] += norm;
}

// The same with one level: the sum of samples, each by the sign of its codeword's bit.
inline void sign_products(const Bytes* samples, const Signs* code, int rows, int64_t* products) {
    ByteSum sum = no_sum();
    for (int i = 0; i < rows; ++i) sum = with_bytes(sum, negate_where(samples[i], code[i]));
    products[0] += folded(sum, rows);
}

struct PolarTables {
    const int8_t* levels[PADDING_ROW];  // by slot
    const int16_t* points[PADDING_ROW];
};

// Where a tile's samples come from: they are there, or `count` entries of a vector become them, which are all of one class.
struct PolarSource {
    const int8_t* samples;
    const float* x;
    int64_t count;
    float scale;
};

// The source of the next tile, or with direction -1 of the one before.
inline void polar_pass_tile(PolarSource* source, const PolarTile* tile, int direction) {
    const int64_t entries = direction * tile->lanes * tile->rows;
    if (source->samples) source->samples += entries;
    if (source->x) source->x += entries;
    source->count -= entries;
}

inline int64_t polar_tile_bytes(const PolarTile* tile) {
    int64_t words = 0;
    for (int64_t level = 0; level < tile->levels; ++level) words += tile->free[level];
    return words * tile->lanes / 8;
}

// polar_list.h
inline void list_encode_block(int rows, int lanes, int list_size, const uint8_t* types, const uint16_t* positions,
                              const Bytes* l, Signs* code, Bytes* memory);

// Row i of a tile made from entries; those beyond the last are `absent`.
inline Bytes row_of_entries(const PolarSource* source, int i, int lanes, int8_t absent) {
    const int64_t start = (int64_t)lanes * i, left = source->count - start;
    if (left >= LANES && lanes == LANES) return samples_of(source->x + start, source->scale);
    float entries[LANES] = {0};
    int8_t row[LANES];
    const int64_t present = left < 0 ? 0 : left < lanes ? left : lanes;
    if (present > 0) memcpy(entries, source->x + start, (size_t)present * sizeof(float));
    store_bytes(row, samples_of(entries, source->scale));
    for (int64_t j = present; j < lanes; ++j) row[j] = absent;
    return load_bytes(row);
}

// Inputs of a level in the order of the rows, chunk by chunk, of which the first steps are taken while they are in the
// nearest cache.
inline void polar_tile_inputs(const PolarSource* source, const PolarTile* tile, int level, const uint8_t* slots,
                              const int8_t* tables, int steps, PolarWorkspace work) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes;
    const int8_t* samples = source->samples ? source->samples : work.samples;
    for (int from = 0, to; from < rows; from = to) {
        to = from + CHUNK_ROWS < rows ? from + CHUNK_ROWS : rows;
        if (tile->levels == 1) {
            for (int i = from; i < to; ++i)
                work.inputs[i] = source->x ? row_of_entries(source, i, lanes, 0) : load_lanes(samples + lanes * i, lanes);
        } else {
            for (int i = from; i < to && level == 0 && source->x; ++i)
                store_lanes(work.samples + lanes * i, row_of_entries(source, i, lanes, ERASED), lanes);
            level_inputs(samples, rows, from, to, lanes, level, slots, tables, work.words, work.inputs);
        }
        if (steps) take_steps(steps, Stored{work.inputs}, from, to, rows, 0, work.scratch);
    }
}

// Per class <samples, codeword> and <codeword, codeword>, for the amplitude of least error.
inline void polar_tile_products(const int8_t* samples, const PolarTile* tile, const uint8_t* slots,
                                const PolarTables* tables, PolarWorkspace work, int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    int8_t labels[CHUNK_ROWS * LANES];
    for (int i = 0, end; i < rows && slots[i] != PADDING_ROW; i = end) {
        end = i + 1;
        while (end < rows && slots[end] == slots[i]) ++end;
        int64_t* mine = products + 2 * slots[i];
        if (levels == 1) {
            sign_products(work.inputs + i, work.code + i, end - i, mine);
            continue;
        }
        for (int from = i, to; from < end; from = to) {
            to = from + CHUNK_ROWS < end ? from + CHUNK_ROWS : end;
            labels_of(work.words, rows, levels, from, to, lanes, labels);
            label_products(samples + lanes * from, labels, lanes * (to - from), tables->points[slots[i]], levels, mine);
        }
    }
}

// Writes the words of a level by its codeword alone and returns their end.
inline uint8_t* put_block(const Signs* code, const PolarTile* tile, int free, uint64_t* information, uint8_t* words) {
    const int rows = (int)tile->rows, bytes = (int)tile->lanes / 8;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    for (int i = 0; i < rows; ++i) information[i] = word_of(code[i]);
    transform(information, rows);
    for (int i = 0; i < rows; ++i) {
        store(words, information[positions[i]]);
        words += rank[i] < free ? bytes : 0;
    }
    return words;
}

// Writes a tile's words and returns their end. `slots` gives every row's class.
inline uint8_t* polar_encode_tile(const PolarSource* source, const PolarTile* tile, const uint8_t* slots,
                                  const PolarTables* tables, int list_size, PolarWorkspace work, uint8_t* words,
                                  int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    const bool list = list_size > 1 && levels < MAX_LEVELS;
    for (int level = 0; level < levels; ++level) {
        const int free = (int)tile->free[level];
        const uint8_t* types = types_of(rank, rows, level, free, work);
        const int steps = list || rows <= 64 ? 0 : steps_ahead(types, 1);
        polar_tile_inputs(source, tile, level, slots, tables->levels[slots[0]], steps, work);
        if (list) {
            list_encode_block(rows, lanes, list_size, types, positions, work.inputs, work.code, work.list);
            words = put_block(work.code, tile, free, work.information, words);
        } else {
            Output out = {words, lanes / 8, rows, positions, work.information};
            encode_block(rows, types, work.inputs, steps, work.code, work.scratch, work.parts, &out);
            words = out.at;
        }
        for (int i = 0; i < rows && levels > 1; ++i) work.words[level * rows + i] = word_of(work.code[i]);
    }
    polar_tile_products(source->samples ? source->samples : work.samples, tile, slots, tables, work, products);
    return words;
}

// How decoded values are written: in place of what is there, added to it, or past the caches, which what is much larger
// than they are would only flush; the target of that lies at a multiple of 64 bytes.
enum { REPLACE = 0, ADD = 1, STREAM = 2 };
const int64_t STREAM_BYTES = 1 << 25;

#if defined(__AVX512F__)
template <int mode>
inline void put_values(float* out, __m512 value) {
    if (mode == ADD) value = _mm512_add_ps(_mm512_loadu_ps(out), value);
    if (mode == STREAM)
        _mm512_stream_ps(out, value);
    else
        _mm512_storeu_ps(out, value);
}
#elif defined(__AVX2__)
template <int mode>
inline void put_values(float* out, __m256 value) {
    if (mode == ADD) value = _mm256_add_ps(_mm256_loadu_ps(out), value);
    if (mode == STREAM)
        _mm256_stream_ps(out, value);
    else
        _mm256_storeu_ps(out, value);
}
#endif

inline void finish_streams() {  // other threads see what was written before they see anything later
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// out[j] (+)= a where bit j is 0, -a where it is 1.
template <int mode>
inline void write_signs(uint64_t word, float a, float* out) {
#if defined(__AVX512F__)
    const __m512 plus = _mm512_set1_ps(a), minus = _mm512_set1_ps(-a);
    for (int part = 0; part < 4; ++part)
        put_values<mode>(out + 16 * part, _mm512_mask_mov_ps(plus, (__mmask16)(word >> (16 * part)), minus));
#elif defined(__AVX2__)
    const __m256 plus = _mm256_set1_ps(a), sign = _mm256_set1_ps(-0.0f);
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int part = 0; part < 8; ++part) {
        const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32((int)(word >> (8 * part))), to_top);
        put_values<mode>(out + 8 * part, _mm256_xor_ps(plus, _mm256_and_ps(sign, _mm256_castsi256_ps(bits))));
    }
#else
    const uint32_t pattern = float_bits(a);
    for (int half = 0; half < 2; ++half) {
        const uint32_t bits = (uint32_t)(word >> (32 * half));
        float* target = out + 32 * half;
        for (int j = 0; j < 32; ++j) {  // vectorised
            const float value = bits_float(pattern ^ ((bits >> j) << 31));
            target[j] = mode == ADD ? target[j] + value : value;
        }
    }
#endif
}

// out[j] (+)= table[label j], for labels of up to five bits by vectors.
template <int mode>
inline void write_points(Bytes labels, const float* table, int levels, float* out) {
    uint8_t bytes[LANES];
    store_bytes((int8_t*)bytes, labels);
#if defined(__AVX512F__)
    if (levels <= 5) {
        const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
        for (int part = 0; part < 4; ++part) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 16 * part)));
            put_values<mode>(out + 16 * part, levels < 5 ? _mm512_permutexvar_ps(index, low)
                                                         : _mm512_permutex2var_ps(low, index, high));
        }
        return;
    }
#elif defined(__AVX2__)
    if (levels <= 5) {
        __m256 eighth[4];
        for (int k = 0; k < 4; ++k) eighth[k] = _mm256_loadu_ps(table + 8 * k);
        for (int part = 0; part < 8; ++part) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * part)));
            __m256 value = _mm256_permutevar8x32_ps(eighth[0], index);
            if (levels > 3) {
                const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                value = _mm256_blendv_ps(value, _mm256_permutevar8x32_ps(eighth[1], index), bit3);
                if (levels > 4) {
                    const __m256 upper = _mm256_blendv_ps(_mm256_permutevar8x32_ps(eighth[2], index),
                                                          _mm256_permutevar8x32_ps(eighth[3], index), bit3);
                    value = _mm256_blendv_ps(value, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
                }
            }
            put_values<mode>(out + 8 * part, value);
        }
        return;
    }
#endif
    look_up_64<mode == ADD>(bytes, table, levels > 4, out);
}

// A codeword from words of so many bytes for its information bits; returns their end. Without a branch: where there is
// none, the next one or the last is read in vain.
template <int bytes>
inline const uint8_t* read_codeword(const uint8_t* words, const uint16_t* rank, int rows, int free, uint64_t* code) {
    if (free == 0) {
        memset(code, 0, (size_t)rows * sizeof *code);
        return words;
    }
    const uint8_t* last = words + bytes * (free - 1);
    for (int i = 0; i < rows; i += 8) {
        uint64_t w[8];
        for (int k = 0; k < 8; ++k) {
            const uint64_t carries = rank[i + k] < free;
            uint64_t word = 0;
            memcpy(&word, words < last ? words : last, bytes);
            w[k] = word & (0 - carries);
            words += bytes * carries;
        }
        transform_eight(w);
        memcpy(code + i, w, sizeof w);
    }
    transform_beyond_eight(code, rows);
    return words;
}

// Values of 64 lanes of the row at a position, from the bits of all levels: code[level][rows].
template <int mode>
inline void write_row(const uint64_t* code, int rows, int levels, const float* table, float* out) {
    if (levels == 1) return write_signs<mode>(code[0], table[0], out);
    write_points<mode>(label_of(code, rows, levels), table, levels, out);
}

// Decodes one tile, at most `count` entries of it; returns the end of its words.
template <int mode>
const uint8_t* polar_decode_tile(const uint8_t* words, const PolarTile* tile, const uint8_t* slots,
                                 const float* values, uint64_t* code, int64_t count, float* out) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    for (int level = 0; level < levels; ++level) {
        uint64_t* mine = code + level * rows;
        const int free = (int)tile->free[level];
        words = lanes == LANES ? read_codeword<8>(words, rank, rows, free, mine)
                : lanes == 32  ? read_codeword<4>(words, rank, rows, free, mine)
                : lanes == 16  ? read_codeword<2>(words, rank, rows, free, mine)
                               : read_codeword<1>(words, rank, rows, free, mine);
    }
    for (int i = 0; i < rows && lanes * (int64_t)i < count; ++i) {
        if (slots[i] == PADDING_ROW) break;
        const int64_t left = min64(lanes, count - lanes * (int64_t)i);
        const float* table = values + ((int64_t)slots[i] << MAX_LEVELS);
        float* target = out + lanes * (int64_t)i;
        if (left == LANES) {
            write_row<mode>(code + positions[i], rows, levels, table, target);
        } else {
            float row[LANES];
            write_row<REPLACE>(code + positions[i], rows, levels, table, row);
            for (int64_t j = 0; j < left; ++j) target[j] = mode == ADD ? target[j] + row[j] : row[j];
        }
    }
    return words;
}

// Sums of |x| 2^-24 over every row and, if asked, every column of a matrix of n entries in rows
// of `cols`: a row's in 16 interleaved sums that then fold in halves, a column's from top to bottom.
inline void polar_sums_of(const float* x, int64_t n, int64_t cols, float* row_sums, float* column_sums) {
    if (column_sums) memset(column_sums, 0, (size_t)cols * sizeof(float));
    for (int64_t start = 0; start < n; start += cols) {
        const int64_t count = min64(cols, n - start);
        const float* row = x + start;
        float sums[16] = {0};
        int64_t j = 0;
        for (; j + 16 <= count; j += 16)
            for (int k = 0; k < 16; ++k) sums[k] += sum_term(row[j + k]);  // vectorised
        for (int k = 0; j + k < count; ++k) sums[k] += sum_term(row[j + k]);
        for (int half = 8; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
        *row_sums++ = sums[0];
        if (column_sums)
            for (j = 0; j < count; ++j) column_sums[j] += sum_term(row[j]);  // vectorised
    }
}

inline void quantize_run(const float* x, int64_t count, float scale, int8_t* samples) {
    for (int64_t i = 0; i < count; ++i) samples[i] = sample_of(x[i] * scale);  // vectorised
}

// How a matrix falls apart into classes: the entry in row i and column j has class row_class[i] +
// (class of j's run), the columns being taken in `order`.
struct PolarLayout {
    int64_t n, cols;
    int64_t row_class;  // address of uint8 per row, 0: skip the row; or null: 1 everywhere
    int64_t order;      // address of int32 per column; or null: as they lie
    int64_t runs;       // number of runs of columns
    int64_t run_end;    // address of int32 per run, in `order`
    int64_t run_class;  // address of uint8 per run, 0: skip it
    int64_t slot;       // address of int8 per class: its number among the coded ones, -1: not coded
    int64_t scale;      // address of float per slot, by which entries become samples
};

// Calls visit(slot, first column in order, count) for every coded run of a row.
template <class Visit>
inline void for_each_run(const PolarLayout* layout, int64_t row, int64_t count, const Visit& visit) {
    const uint8_t* row_class = (const uint8_t*)layout->row_class;
    const int32_t* run_end = (const int32_t*)layout->run_end;
    const uint8_t* run_class = (const uint8_t*)layout->run_class;
    const int base = row_class ? row_class[row] : 1;
    if (base == 0) return;
    int64_t first = 0;
    for (int64_t run = 0; run < layout->runs && first < count; ++run) {
        const int64_t end = min64(run_end[run], count);
        const int slot = run_class[run] ? ((const int8_t*)layout->slot)[base + run_class[run]] : -1;
        if (slot >= 0) visit(slot, first, end - first);
        first = end;
    }
}

// The same for every row of a matrix, with the run's entries; `row_buffer` has room for a row.
template <class Visit>
inline void for_each_matrix_run(const float* x, const PolarLayout* layout, float* row_buffer, const Visit& visit) {
    const int32_t* order = (const int32_t*)layout->order;
    for (int64_t row = 0, start = 0; start < layout->n; ++row, start += layout->cols) {
        const int64_t count = min64(layout->cols, layout->n - start);
        if (layout->row_class && ((const uint8_t*)layout->row_class)[row] == 0) continue;
        const float* source = x + start;
        if (order) {
            for (int64_t j = 0; j < count; ++j) row_buffer[j] = source[order[j]];
            source = row_buffer;
        }
        for_each_run(layout, row, count,
                     [&](int slot, int64_t first, int64_t length) { visit(slot, source + first, length); });
    }
}

// Places of entries of at least max(floor, (row factor slope) column factor + intercept) in magnitude: all are
// counted, the first `capacity` written. A factor that is the same everywhere is given once.
inline int64_t polar_places_beyond(const float* x, int64_t n, int64_t cols, const float* row_factors, bool by_row,
                                   const float* column_factors, bool by_column, float floor, float slope,
                                   float intercept, int64_t capacity, int64_t* places) {
    int64_t found = 0;
    for (int64_t start = 0, row = 0; start < n; start += cols, ++row) {
        const int64_t count = min64(cols, n - start);
        const float of_row = row_factors[by_row ? row : 0] * slope;
        const float common = outlier_limit(of_row, column_factors[0], intercept, floor);
        for (int64_t first = 0; first < count; first += 64) {
            const float* entries = x + start + first;
            const int64_t length = min64(64, count - first);
            uint8_t over[64];
            int32_t any = 0;
            if (by_column) {
                for (int64_t j = 0; j < length; ++j) {  // vectorised
                    const float limit = outlier_limit(of_row, column_factors[first + j], intercept, floor);
                    const int32_t reaches = __builtin_fabsf(entries[j]) >= limit;
                    over[j] = (uint8_t)reaches;
                    any |= reaches;
                }
            } else {
                for (int64_t j = 0; j < length; ++j) {  // vectorised
                    const int32_t reaches = __builtin_fabsf(entries[j]) >= common;
                    over[j] = (uint8_t)reaches;
                    any |= reaches;
                }
            }
            for (int64_t j = 0; any && j < length; ++j) {
                if (!over[j]) continue;
                if (found < capacity) places[found] = start + first + j;
                ++found;
            }
        }
    }
    return found;
}

// Per class the sum of squares of its scaled, rounded entries; slots are classes here.
inline void polar_class_energies(const float* x, const PolarLayout* layout, float* row_buffer, int64_t* totals) {
    const float* scales = (const float*)layout->scale;
    for_each_matrix_run(x, layout, row_buffer, [=](int slot, const float* entries, int64_t length) {
        const float scale = scales[slot];
        int64_t total = 0;
        for (int64_t j = 0; j < length; ++j) total += energy_of(entries[j] * scale);  // vectorised
        totals[slot] += total;
    });
}

// Samples in the order of the tiles. `cursors` holds each class's first position in `samples`.
inline void polar_gather_rows(const float* x, const PolarLayout* layout, int64_t* cursors, float* row_buffer,
                              int8_t* samples) {
    const float* scales = (const float*)layout->scale;
    for_each_matrix_run(x, layout, row_buffer, [=](int slot, const float* entries, int64_t length) {
        const float scale = scales[slot];
        int8_t* target = samples + cursors[slot];
        for (int64_t j = 0; j < length; ++j) target[j] = sample_of(entries[j] * scale);  // vectorised
        cursors[slot] += length;
    });
}

// The inverse: values in the order of the tiles back to the matrix; what is not coded is 0.
template <bool add>
void polar_scatter_rows(const float* values, const PolarLayout* layout, int64_t* cursors, float* row_buffer,
                        float* out) {
    const int32_t* order = (const int32_t*)layout->order;
    for (int64_t row = 0, start = 0; start < layout->n; ++row, start += layout->cols) {
        const int64_t count = min64(layout->cols, layout->n - start);
        float* target = out + start;
        memset(row_buffer, 0, (size_t)count * sizeof(float));
        for_each_run(layout, row, count, [=](int slot, int64_t first, int64_t length) {
            memcpy(row_buffer + first, values + cursors[slot], (size_t)length * sizeof(float));
            cursors[slot] += length;
        });
        if (order)
            for (int64_t j = 0; j < count; ++j)
                target[order[j]] = add ? target[order[j]] + row_buffer[j] : row_buffer[j];
        else
            for (int64_t j = 0; j < count; ++j) target[j] = add ? target[j] + row_buffer[j] : row_buffer[j];
    }
}

}  // namespace
#endif
