// Polar: what the encoder of a level starts from, its log-likelihoods, by the samples and the bits of the levels below.
#ifndef GCOMPRESS_POLAR_LEVELS_H
#define GCOMPRESS_POLAR_LEVELS_H

#include "lanes.h"

namespace {

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

}  // namespace
#endif
