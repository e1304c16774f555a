// Polar: the successive-cancellation encoder and the decoder of a polar source code, 64
// blocks side by side (gcompress/compressors/polar.py, docs/polar.md).
//
// A tile is N rows of 64 lanes, one block a lane: entry (row, lane) is byte 64 row + lane, so
// nothing is transposed. A row of 64 values is one `Bytes`, its 64 bits one `Signs`.
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
inline Bytes with_bit(Bytes labels, Signs a, int level) {
    return _mm512_or_si512(labels, _mm512_maskz_set1_epi8(a, (char)(1 << level)));
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
inline Bytes with_bit(Bytes labels, Signs a, int level) {
    const __m256i bit = _mm256_set1_epi8((char)(1 << level));
    GC_PAIR(labels.low | (a.low & bit), labels.high | (a.high & bit));
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
inline Bytes with_bit(Bytes labels, Signs a, int level) {
    GC_PARTS(labels.part[k] | (a.part[k] & (int8_t)(1 << level)));
}
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

// The sign of the sum of n <= 128 rows, summed in 16 bits.
inline Signs sum_signs(const Bytes* l, int n) {
#if defined(__AVX512BW__)
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int i = 0; i < n; ++i) {
        low = _mm512_add_epi16(low, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(l[i])));
        high = _mm512_add_epi16(high, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(l[i], 1)));
    }
    return (uint64_t)_mm512_movepi16_mask(low) | (uint64_t)_mm512_movepi16_mask(high) << 32;
#else
    int16_t sums[LANES] = {0};
    int8_t signs[LANES];
    for (int i = 0; i < n; ++i) {
        const int8_t* row = (const int8_t*)(l + i);
        for (int j = 0; j < LANES; ++j) sums[j] = (int16_t)(sums[j] + row[j]);  // vectorised
    }
    for (int j = 0; j < LANES; ++j) signs[j] = (int8_t)(sums[j] >> 15);
    return load_bytes(signs);
#endif
}

// Wagner's rule: hard decisions, and where their parity is odd the first least reliable one flips.
inline void single_parity(const Bytes* l, int n, Signs* code) {
    Signs odd = no_signs();
    Bytes weakest = magnitude(l[0]);
    for (int i = 0; i < n; ++i) {
        code[i] = negative(l[i]);
        odd = exclusive_or(odd, code[i]);
        weakest = least(weakest, magnitude(l[i]));
    }
    for (int i = 0; i < n; ++i) {
        const Signs flip = both(odd, equal(magnitude(l[i]), weakest));
        code[i] = exclusive_or(code[i], flip);
        odd = without(odd, flip);
    }
}

// Successive cancellation with min-sum in saturated bytes: the codeword nearest to n rows of
// log-likelihoods, as this node of the code sees them. `scratch` has room for n rows.
template <int n>
struct Node {
    static void encode(const uint8_t* types, int node, const Bytes* l, Signs* code, Bytes* scratch) {
        const int half = n / 2;
        switch (types[node]) {
            case ALL_FROZEN:
                for (int i = 0; i < n; ++i) code[i] = no_signs();
                return;
            case ALL_FREE:
                for (int i = 0; i < n; ++i) code[i] = negative(l[i]);
                return;
            case REPETITION: {
                const Signs sign = sum_signs(l, n);
                for (int i = 0; i < n; ++i) code[i] = sign;
                return;
            }
            case SINGLE_PARITY:
                single_parity(l, n, code);
                return;
            default:
                break;
        }
        if (types[2 * node] == ALL_FROZEN) {
            for (int i = 0; i < half; ++i) scratch[i] = add_saturated(l[i + half], l[i]);
            Node<half>::encode(types, 2 * node + 1, scratch, code + half, scratch + half);
            for (int i = 0; i < half; ++i) code[i] = code[i + half];
            return;
        }
        for (int i = 0; i < half; ++i) scratch[i] = check_node(l[i], l[i + half]);
        Node<half>::encode(types, 2 * node, scratch, code, scratch + half);
        if (types[2 * node + 1] == ALL_FREE) {
            for (int i = 0; i < half; ++i) {
                const Signs right = negative(variable_node(l[i], l[i + half], code[i]));
                code[i + half] = right;
                code[i] = exclusive_or(code[i], right);
            }
            return;
        }
        for (int i = 0; i < half; ++i) scratch[i] = variable_node(l[i], l[i + half], code[i]);
        Node<half>::encode(types, 2 * node + 1, scratch, code + half, scratch + half);
        for (int i = 0; i < half; ++i) code[i] = exclusive_or(code[i], code[i + half]);
    }
};
template <>
struct Node<1> {
    static void encode(const uint8_t* types, int node, const Bytes* l, Signs* code, Bytes*) {
        code[0] = types[node] == ALL_FROZEN ? no_signs() : negative(l[0]);
    }
};

inline void encode_block(int rows, const uint8_t* types, const Bytes* l, Signs* code, Bytes* scratch) {
    switch (rows) {
        case 16: return Node<16>::encode(types, 1, l, code, scratch);
        case 32: return Node<32>::encode(types, 1, l, code, scratch);
        case 64: return Node<64>::encode(types, 1, l, code, scratch);
        case 128: return Node<128>::encode(types, 1, l, code, scratch);
        case 256: return Node<256>::encode(types, 1, l, code, scratch);
        case 512: return Node<512>::encode(types, 1, l, code, scratch);
        case 1024: return Node<1024>::encode(types, 1, l, code, scratch);
        case 2048: return Node<2048>::encode(types, 1, l, code, scratch);
        case 4096: return Node<4096>::encode(types, 1, l, code, scratch);
        case 8192: return Node<8192>::encode(types, 1, l, code, scratch);
        default: return Node<16384>::encode(types, 1, l, code, scratch);
    }
}

// Eight words at once; the compiler makes of it what registers there are.
typedef uint64_t EightWords __attribute__((vector_size(64)));
inline void load_eight(EightWords* value, const uint64_t* words) { memcpy(value, words, sizeof *value); }
inline void store_eight(uint64_t* words, const EightWords* value) { memcpy(words, value, sizeof *value); }

// The polar transform of N >= 16 words, in place; it is its own inverse. Strides 1, 2, 4, then two at a time.
inline void transform(uint64_t* words, int rows) {
    for (int i = 0; i < rows; i += 8) {
        uint64_t w[8];
        memcpy(w, words + i, sizeof w);
        w[0] ^= w[1], w[2] ^= w[3], w[4] ^= w[5], w[6] ^= w[7];
        w[0] ^= w[2], w[1] ^= w[3], w[4] ^= w[6], w[5] ^= w[7];
        w[0] ^= w[4], w[1] ^= w[5], w[2] ^= w[6], w[3] ^= w[7];
        memcpy(words + i, w, sizeof w);
    }
    int half = 8;
    for (; 2 * half < rows; half *= 4) {
        for (int i = 0; i < rows; i += 4 * half) {
            for (int j = i; j < i + half; j += 8) {
                EightWords a, b, c, d;
                load_eight(&a, words + j);
                load_eight(&b, words + j + half);
                load_eight(&c, words + j + 2 * half);
                load_eight(&d, words + j + 3 * half);
                const EightWords cd = c ^ d, bd = b ^ d, all = a ^ b ^ cd;
                store_eight(words + j, &all);
                store_eight(words + j + half, &bd);
                store_eight(words + j + 2 * half, &cd);
            }
        }
    }
    if (half < rows) {
        for (int j = 0; j < half; j += 8) {
            EightWords a, b;
            load_eight(&a, words + j);
            load_eight(&b, words + j + half);
            a ^= b;
            store_eight(words + j, &a);
        }
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

// Log-likelihoods of a level from its table of [2^level prefixes][256 sample values].
#if defined(__AVX512BW__)
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) inline __m512i look_up_sample(const int8_t* table, __m512i x) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), x, _mm512_loadu_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), x, _mm512_loadu_si512(table + 192));
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(x), high);
}
template <int level>
struct Prefix {
    __attribute__((target("avx512f,avx512bw,avx512vbmi"))) static inline __m512i look_up(const int8_t* table,
                                                                                        __m512i x,
                                                                                        const Signs* prefix) {
        const __m512i zero = Prefix<level - 1>::look_up(table, x, prefix);
        const __m512i one = Prefix<level - 1>::look_up(table + (256 << (level - 1)), x, prefix);
        return _mm512_mask_mov_epi8(zero, prefix[level - 1], one);
    }
};
template <>
struct Prefix<0> {
    __attribute__((target("avx512f,avx512bw,avx512vbmi"))) static inline __m512i look_up(const int8_t* table,
                                                                                        __m512i x, const Signs*) {
        return look_up_sample(table, x);
    }
};
template <int level>
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void level_inputs_vbmi(const int8_t* samples, int rows, int lanes,
                                                                            const uint8_t* slots,
                                                                            const int8_t* const* tables,
                                                                            const uint16_t* positions,
                                                                            const int8_t* labels, Bytes* l) {
    for (int i = 0; i < rows; ++i) {
        if (slots[i] == PADDING_ROW) {
            l[positions[i]] = zero_bytes();
            continue;
        }
        const __m512i label = load_lanes(labels + lanes * i, lanes);
        Signs prefix[MAX_LEVELS];
        for (int k = 0; k < level; ++k) prefix[k] = _mm512_test_epi8_mask(label, _mm512_set1_epi8((char)(1 << k)));
        const int8_t* table = tables[slots[i]] + 256 * ((1 << level) - 1);
        l[positions[i]] = Prefix<level>::look_up(table, load_lanes(samples + lanes * i, lanes), prefix);
    }
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

inline void level_inputs(const int8_t* samples, int rows, int lanes, int level, const uint8_t* slots,
                         const int8_t* const* tables, const uint16_t* positions, const int8_t* labels, Bytes* l) {
    const bool plain = tables[slots[0]] == 0;
#if defined(__AVX512BW__)
    if (!plain && __builtin_cpu_supports("avx512vbmi")) {
        switch (level) {
            case 0: return level_inputs_vbmi<0>(samples, rows, lanes, slots, tables, positions, labels, l);
            case 1: return level_inputs_vbmi<1>(samples, rows, lanes, slots, tables, positions, labels, l);
            case 2: return level_inputs_vbmi<2>(samples, rows, lanes, slots, tables, positions, labels, l);
            case 3: return level_inputs_vbmi<3>(samples, rows, lanes, slots, tables, positions, labels, l);
            case 4: return level_inputs_vbmi<4>(samples, rows, lanes, slots, tables, positions, labels, l);
            default: break;  // by then as many tables as entries in a row
        }
    }
#endif
    for (int i = 0; i < rows; ++i) {
        int8_t inputs[LANES] = {0};
        if (slots[i] != PADDING_ROW && plain) {
            for (int j = 0; j < lanes; ++j) inputs[j] = (int8_t)(1 - 2 * (samples[lanes * i + j] >> level & 1));
#if defined(__AVX2__)
        } else if (slots[i] != PADDING_ROW && lanes == LANES) {
            look_up_samples(tables[slots[i]] + 256 * ((1 << level) - 1), samples + LANES * i, labels + LANES * i, inputs);
#endif
        } else if (slots[i] != PADDING_ROW) {
            const int8_t* table = tables[slots[i]] + 256 * ((1 << level) - 1);
            for (int j = 0; j < lanes; ++j)
                inputs[j] = table[256 * (int)labels[lanes * i + j] + (uint8_t)samples[lanes * i + j]];
        }
        l[positions[i]] = load_bytes(inputs);
    }
}

// One tile's part of the plan that Python makes (gcompress/polar/plan.py).
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
    Bytes *inputs, *scratch, *list;
    Signs* code;
    int8_t *labels, *samples;
    uint64_t* words;
    uint8_t* types;  // [MAX_LEVELS][2 MAX_BLOCK]
    uint16_t* counts;
    PolarTyped* typed;  // [MAX_LEVELS]
};

inline PolarWorkspace polar_workspace(uint8_t* memory) {
    memory = (uint8_t*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    PolarWorkspace work;
    work.inputs = (Bytes*)memory;
    work.scratch = (Bytes*)(memory + LANES * MAX_BLOCK);
    work.code = (Signs*)(memory + 2 * LANES * MAX_BLOCK);
    work.labels = (int8_t*)(memory + 3 * LANES * MAX_BLOCK);
    work.words = (uint64_t*)(memory + 4 * LANES * MAX_BLOCK);
    work.counts = (uint16_t*)(memory + (4 * LANES + 8) * MAX_BLOCK);
    work.list = (Bytes*)(memory + (4 * LANES + 12) * MAX_BLOCK);
    work.samples = (int8_t*)(memory + (7 * LANES + 12) * MAX_BLOCK);
    work.types = memory + (8 * LANES + 12) * MAX_BLOCK;
    work.typed = (PolarTyped*)(memory + (8 * LANES + 12 + 2 * MAX_LEVELS) * MAX_BLOCK);
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
    int16_t padded[128] = {0};
    memcpy(padded, points, sizeof(int16_t) << (levels < 8 ? levels : 7));
    const __m512i table[4] = {_mm512_loadu_si512(padded), _mm512_loadu_si512(padded + 32),
                              _mm512_loadu_si512(padded + 64), _mm512_loadu_si512(padded + 96)};
    __m512i norms = _mm512_setzero_si512();
    int j = 0;
    while (levels < 8 && j + 32 <= count) {
        __m512i dots = _mm512_setzero_si512();
        for (int part = 0; part < 256 && j + 32 <= count; ++part, j += 32) {  // so many products fit 32 bits
            const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(labels + j)));
            __m512i point = _mm512_permutex2var_epi16(table[0], index, table[1]);
            if (levels > 6)
                point = _mm512_mask_mov_epi16(point, _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                              _mm512_permutex2var_epi16(table[2], index, table[3]));
            const __m512i sample = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(samples + j)));
            point = _mm512_maskz_mov_epi16(_mm512_cmpneq_epi16_mask(sample, _mm512_set1_epi16(ERASED)), point);
            dots = _mm512_add_epi32(dots, _mm512_madd_epi16(sample, point));
            const __m512i squares = _mm512_madd_epi16(point, point);
            norms = _mm512_add_epi64(norms, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(squares)));
            norms = _mm512_add_epi64(norms, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(squares, 1)));
        }
        dot += _mm512_reduce_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(dots)));
        dot += _mm512_reduce_add_epi64(_mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(dots, 1)));
    }
    norm = _mm512_reduce_add_epi64(norms);
#elif defined(__AVX2__)
    // Points of up to 32 labels by byte shuffles, their lower and upper bytes apart.
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
    int j = 0;
    while (levels <= 5 && j + 32 <= count) {
        __m256i dots = zero, norms = zero;
        for (int part = 0; part < 128 && j + 32 <= count; ++part, j += 32) {  // so many products fit 32 bits
            const __m256i label = _mm256_loadu_si256((const __m256i*)(labels + j));
            const __m256i sample = _mm256_loadu_si256((const __m256i*)(samples + j));
            const __m256i upper = _mm256_slli_epi16(label, 3);  // bit 4 to the top of its byte
            __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(low_bytes[0], label),
                                             _mm256_shuffle_epi8(low_bytes[1], label), upper);
            __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(high_bytes[0], label),
                                              _mm256_shuffle_epi8(high_bytes[1], label), upper);
            const __m256i absent = _mm256_cmpeq_epi8(sample, erased);
            low = _mm256_andnot_si256(absent, low);
            high = _mm256_andnot_si256(absent, high);
            const __m256i minus = _mm256_cmpgt_epi8(zero, sample);
            for (int side = 0; side < 2; ++side) {
                const __m256i point = side ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
                const __m256i value = side ? _mm256_unpackhi_epi8(sample, minus) : _mm256_unpacklo_epi8(sample, minus);
                dots = _mm256_add_epi32(dots, _mm256_madd_epi16(point, value));
                const __m256i squares = _mm256_madd_epi16(point, point);
                norms = _mm256_add_epi64(norms, _mm256_and_si256(squares, _mm256_set1_epi64x(0xffffffff)));
                norms = _mm256_add_epi64(norms, _mm256_srli_epi64(squares, 32));
            }
        }
        int32_t dot_parts[8];
        int64_t norm_parts[4];
        memcpy(dot_parts, &dots, sizeof dots);
        memcpy(norm_parts, &norms, sizeof norms);
        for (int k = 0; k < 8; ++k) dot += dot_parts[k];
        for (int k = 0; k < 4; ++k) norm += norm_parts[k];
    }
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
inline void sign_products(const int8_t* samples, int rows, int lanes, const uint16_t* positions, const Signs* code,
                          int64_t* products) {
    ByteSum sum = no_sum();
    for (int i = 0; i < rows; ++i)
        sum = with_bytes(sum, negate_where(load_lanes(samples + lanes * i, lanes), code[positions[i]]));
    products[0] += folded(sum, rows);
}

struct PolarTables {
    const int8_t* levels[PADDING_ROW];  // by slot
    const int16_t* points[PADDING_ROW];
};

// polar_list.h
inline void list_encode_block(int rows, int lanes, int list_size, const uint8_t* types, const Bytes* l, Signs* code,
                              Bytes* memory);

// Writes a tile's words and returns their end. Without `samples` the tile has one level and one class and its inputs
// are in place. `slots` gives every row's class, and `products`
// per class: <samples, codeword> and <codeword, codeword>, for the amplitude of least error.
inline uint8_t* polar_encode_tile(const int8_t* samples, const PolarTile* tile, const uint8_t* slots,
                                  const PolarTables* tables, int list_size, PolarWorkspace work, uint8_t* words,
                                  int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    if (levels > 1) memset(work.labels, 0, (size_t)(lanes * rows));
    for (int level = 0; level < levels; ++level) {
        const int free = (int)tile->free[level];
        if (levels > 1)
            level_inputs(samples, rows, lanes, level, slots, tables->levels, positions, work.labels, work.inputs);
        else if (samples)
            for (int i = 0; i < rows; ++i) work.inputs[positions[i]] = load_lanes(samples + lanes * i, lanes);
        uint8_t* types = types_of(rank, rows, level, free, work);
        if (list_size > 1 && levels < MAX_LEVELS)
            list_encode_block(rows, lanes, list_size, types, work.inputs, work.code, work.list);
        else
            encode_block(rows, types, work.inputs, work.code, work.scratch);
        for (int i = 0; levels > 1 && i < rows; ++i) {
            int8_t* labels = work.labels + lanes * i;
            store_lanes(labels, with_bit(load_lanes(labels, lanes), work.code[positions[i]], level), lanes);
        }
        for (int i = 0; i < rows; ++i) work.words[i] = word_of(work.code[i]);
        transform(work.words, rows);
        for (int i = 0; i < rows; ++i) {  // without a branch: up to 8 bytes more are written
            store(words, work.words[i]);
            words += rank[i] < free ? lanes / 8 : 0;
        }
    }
    if (!samples) {  // absent rows are 0
        ByteSum sum = no_sum();
        for (int i = 0; i < rows; ++i) sum = with_bytes(sum, negate_where(work.inputs[i], work.code[i]));
        products[2 * slots[0]] += folded(sum, rows);
        return words;
    }
    for (int i = 0, end; i < rows && slots[i] != PADDING_ROW; i = end) {
        end = i + 1;
        while (end < rows && slots[end] == slots[i]) ++end;
        const int8_t* first = samples + lanes * i;
        int64_t* mine = products + 2 * slots[i];
        if (levels > 1)
            label_products(first, work.labels + lanes * i, lanes * (end - i), tables->points[slots[i]], levels, mine);
        else
            sign_products(first, end - i, lanes, positions + i, work.code, mine);
    }
    return words;
}

// The same for the next `count` entries of a vector whose entries are all of one class, which become samples here.
inline uint8_t* polar_encode_entries(const float* x, int64_t count, float scale, const PolarTile* tile,
                                     const uint8_t* slots, const PolarTables* tables, int list_size,
                                     PolarWorkspace work, uint8_t* words, int64_t* products) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes;
    const uint16_t* positions = (const uint16_t*)tile->positions;
    const bool signs = tile->levels == 1;
    float last[LANES];
    for (int i = 0; i < rows; ++i) {
        const int64_t start = (int64_t)lanes * i, left = count - start < lanes ? count - start : lanes;
        Bytes row = zero_bytes();
        if (left == LANES) {
            row = samples_of(x + start, scale);
        } else if (left > 0) {
            memset(last, 0, sizeof last);
            memcpy(last, x + start, (size_t)left * sizeof(float));
            row = samples_of(last, scale);
        }
        if (signs) {
            work.inputs[positions[i]] = row;
        } else {
            store_lanes(work.samples + start, row, lanes);
            for (int64_t j = left > 0 ? left : 0; j < lanes; ++j) work.samples[start + j] = ERASED;
        }
    }
    return polar_encode_tile(signs ? 0 : work.samples, tile, slots, tables, list_size, work, words, products);
}

// Signs from a word, the inverse of word_of.
inline Signs signs_of(uint64_t word) {
#if defined(__AVX512BW__)
    return word;
#elif defined(__AVX2__)
    const __m256i bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i low = _mm256_shuffle_epi8(_mm256_set1_epi32((int)word), spread);
    const __m256i high = _mm256_shuffle_epi8(_mm256_set1_epi32((int)(word >> 32)), spread);
    Signs result = {_mm256_cmpeq_epi8(low & bits, bits), _mm256_cmpeq_epi8(high & bits, bits)};
    return result;
#else
    int8_t bytes[LANES];
    for (int j = 0; j < LANES; ++j) bytes[j] = (int8_t)-(int)(word >> j & 1);
    return load_bytes(bytes);
#endif
}

// out[j] (+)= a where bit j is 0, -a where it is 1.
template <bool add>
inline void write_signs(uint64_t word, float a, float* out) {
#if defined(__AVX512F__)
    const __m512 plus = _mm512_set1_ps(a), minus = _mm512_set1_ps(-a);
    for (int part = 0; part < 4; ++part) {
        __m512 value = _mm512_mask_mov_ps(plus, (__mmask16)(word >> (16 * part)), minus);
        if (add) value = _mm512_add_ps(_mm512_loadu_ps(out + 16 * part), value);
        _mm512_storeu_ps(out + 16 * part, value);
    }
#elif defined(__AVX2__)
    const __m256 plus = _mm256_set1_ps(a), sign = _mm256_set1_ps(-0.0f);
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int part = 0; part < 8; ++part) {
        const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32((int)(word >> (8 * part))), to_top);
        __m256 value = _mm256_xor_ps(plus, _mm256_and_ps(sign, _mm256_castsi256_ps(bits)));
        if (add) value = _mm256_add_ps(_mm256_loadu_ps(out + 8 * part), value);
        _mm256_storeu_ps(out + 8 * part, value);
    }
#else
    const uint32_t pattern = float_bits(a);
    for (int half = 0; half < 2; ++half) {
        const uint32_t bits = (uint32_t)(word >> (32 * half));
        float* target = out + 32 * half;
        for (int j = 0; j < 32; ++j) {  // vectorised
            const float value = bits_float(pattern ^ ((bits >> j) << 31));
            target[j] = add ? target[j] + value : value;
        }
    }
#endif
}

template <bool add>
inline void write_points(const uint8_t* labels, const float* table, int levels, float* out) {
#if defined(__AVX512F__)
    if (levels == 5) {
        const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
        for (int part = 0; part < 4; ++part) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(labels + 16 * part)));
            __m512 value = _mm512_permutex2var_ps(low, index, high);
            if (add) value = _mm512_add_ps(_mm512_loadu_ps(out + 16 * part), value);
            _mm512_storeu_ps(out + 16 * part, value);
        }
        return;
    }
#endif
    look_up_64<add>(labels, table, levels > 4, out);
}

// Words of so many bytes at their positions; returns their end.
template <int bytes>
inline const uint8_t* read_words(const uint8_t* words, const uint16_t* rank, int rows, int free, uint64_t* bits) {
    for (int i = 0; i < rows; ++i) {
        bits[i] = 0;
        if (rank[i] < free) {
            memcpy(bits + i, words, bytes);
            words += bytes;
        }
    }
    return words;
}

// Decodes one tile, at most `count` entries of it; returns the end of its words.
template <bool add>
const uint8_t* polar_decode_tile(const uint8_t* words, const PolarTile* tile, const uint8_t* slots,
                                 const float* values, uint64_t* code, int64_t count, float* out) {
    const int rows = (int)tile->rows, lanes = (int)tile->lanes, levels = (int)tile->levels;
    const uint16_t *rank = (const uint16_t*)tile->rank, *positions = (const uint16_t*)tile->positions;
    for (int level = 0; level < levels; ++level) {
        uint64_t* bits = code + level * rows;
        const int free = (int)tile->free[level];
        words = lanes == LANES ? read_words<8>(words, rank, rows, free, bits)
                : lanes == 32  ? read_words<4>(words, rank, rows, free, bits)
                : lanes == 16  ? read_words<2>(words, rank, rows, free, bits)
                               : read_words<1>(words, rank, rows, free, bits);
        if (free > 0) transform(bits, rows);
    }
    float tail[LANES] = {0};
    for (int i = 0; i < rows && lanes * (int64_t)i < count; ++i) {
        if (slots[i] == PADDING_ROW) break;
        const int64_t left = min64(lanes, count - lanes * (int64_t)i);
        const float* table = values + ((int64_t)slots[i] << MAX_LEVELS);
        float* target = out + lanes * (int64_t)i;
        if (left < LANES) {
            if (add) memcpy(tail, target, (size_t)left * sizeof(float));
            target = tail;
        }
        if (levels == 1) {
            write_signs<add>(code[positions[i]], table[0], target);
        } else {
            Bytes labels = zero_bytes();
            int8_t bytes[LANES];
            for (int level = 0; level < levels; ++level)
                labels = with_bit(labels, signs_of(code[level * rows + positions[i]]), level);
            store_bytes(bytes, labels);
            write_points<add>((const uint8_t*)bytes, table, levels, target);
        }
        if (left < LANES) memcpy(out + lanes * (int64_t)i, tail, (size_t)left * sizeof(float));
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
