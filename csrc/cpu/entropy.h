// Entropy: the bytes of another payload by rANS (gcompress/compressors/entropy.py).
//
// Everything that decides a byte is integer arithmetic. 32 states take turns, so that neither
// encoder nor decoder waits for its last symbol.
#ifndef GCOMPRESS_CPU_ENTROPY_H
#define GCOMPRESS_CPU_ENTROPY_H

#include "../arith/entropy.h"
#include "../gcompress.h"
#include "simd.h"
#include "topk.h"

namespace {

int64_t planes_of(const int64_t* sections, int64_t count, Plane* planes) {
    int64_t total = 0, offset = 0;
    for (int64_t s = 0; s < count; ++s) {
        const int64_t bytes = sections[2 * s], stride = sections[2 * s + 1];
        for (int64_t p = 0; p < stride && p < bytes; ++p)
            planes[total++] = Plane{offset + p, stride, (bytes - p + stride - 1) / stride};
        offset += bytes;
    }
    return total;
}

void histogram_of(const uint8_t* bytes, const Plane& plane, int64_t* histogram) {
    uint32_t part[4][256];  // four, so that equal neighbours do not wait for each other
    memset(histogram, 0, 256 * sizeof(int64_t));
    const uint8_t* source = bytes + plane.offset;
    for (int64_t first = 0; first < plane.count; first += 1 << 30) {
        memset(part, 0, sizeof part);
        const int64_t end = min64(plane.count, first + (1 << 30));
        int64_t i = first;
        if (plane.stride == 1) {
            for (; i + 4 <= end; i += 4) {
                const uint32_t four = load<uint32_t>(source + i);
                ++part[0][four & 255];
                ++part[1][four >> 8 & 255];
                ++part[2][four >> 16 & 255];
                ++part[3][four >> 24];
            }
        }
        for (; i < end; ++i) ++part[i & 3][source[i * plane.stride]];
        for (int s = 0; s < 256; ++s) histogram[s] += (int64_t)part[0][s] + part[1][s] + part[2][s] + part[3][s];
    }
}

// Elias's gamma code of every frequency plus 1.
int64_t write_table(const uint16_t* frequency, uint8_t* target) {
    BitWriter writer = {target, 0, 0};
    for (int s = 0; s < 256; ++s) {
        const uint32_t value = (uint32_t)frequency[s] + 1;
        const int low = 31 - __builtin_clz(value);
        writer.put(1ull << low, low + 1);
        writer.put(value & ((1u << low) - 1), low);
    }
    writer.finish();
    return writer.target - target;
}

// Returns the bytes read, or 0 if they are no table.
int64_t read_table(const uint8_t* source, const uint8_t* end, uint16_t* frequency) {
    BitReader reader = {source, end, 0, 0};
    int64_t sum = 0, bits = 0;
    for (int s = 0; s < 256; ++s) {
        int low = 0;
        while (low <= PROBABILITY_BITS && reader.get(1) == 0) ++low;
        if (low > PROBABILITY_BITS) return 0;
        const uint32_t value = (1u << low | (uint32_t)reader.get(low)) - 1;
        frequency[s] = (uint16_t)value;
        sum += value;
        bits += 2 * low + 1;
    }
    const int64_t bytes = bytes_of_bits(bits);
    return sum == TOTAL && bytes <= end - source ? bytes : 0;
}

// States that would leave their range give up 16 bits, the last lane's first; words grow downwards.
inline uint8_t* shrink(const int32_t* divisor, int lanes, int32_t* state, uint8_t* words) {
#if defined(__AVX512BW__)
    if (lanes == STATES) {
        for (int part = 1; part >= 0; --part) {
            const __m512i x = _mm512_loadu_si512(state + 16 * part);
            const __m512i limit = _mm512_loadu_si512(divisor + 16 * part);
            const __mmask16 full = _mm512_cmpge_epi32_mask(_mm512_srli_epi32(x, 19), limit);
            const int count = __builtin_popcount(full);
            words -= 2 * count;
            const __m256i low = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x));
            _mm256_mask_storeu_epi16(words, (__mmask16)((1u << count) - 1), low);
            _mm512_storeu_si512(state + 16 * part, _mm512_mask_srli_epi32(x, full, x, 16));
        }
        return words;
    }
#endif
    for (int j = lanes - 1; j >= 0; --j) {  // without a branch, which no one could predict
        const uint32_t x = (uint32_t)state[j];
        const uint32_t full = (int32_t)(x >> 19) >= divisor[j];
        store<uint16_t>(words - 2, (uint16_t)x);
        words -= 2 * full;
        state[j] = (int32_t)(x >> (16 * full));
    }
    return words;
}

// What coding needs of each symbol: frequency and start in one word, and the frequency's inverse.
struct Coding {
    uint32_t places[256];
    float inverse[256];
};

struct Group {
    int32_t divisor[STATES], start[STATES];
    float inverse[STATES];
};

// By gathers where there are any: single stores would hold up the vector loads that follow.
inline void look_up(const Coding& coding, const uint8_t* symbols, int lanes, Group* group) {
    int j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= lanes; j += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(symbols + j)));
        const __m512i places = _mm512_i32gather_epi32(index, coding.places, 4);
        _mm512_storeu_si512(group->divisor + j, _mm512_and_si512(places, _mm512_set1_epi32(0xffff)));
        _mm512_storeu_si512(group->start + j, _mm512_srli_epi32(places, 16));
        _mm512_storeu_ps(group->inverse + j, _mm512_i32gather_ps(index, coding.inverse, 4));
    }
#elif defined(__AVX2__)
    for (; j + 8 <= lanes; j += 8) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(symbols + j)));
        const __m256i places = _mm256_i32gather_epi32((const int*)coding.places, index, 4);
        _mm256_storeu_si256((__m256i*)(group->divisor + j), _mm256_and_si256(places, _mm256_set1_epi32(0xffff)));
        _mm256_storeu_si256((__m256i*)(group->start + j), _mm256_srli_epi32(places, 16));
        _mm256_storeu_ps(group->inverse + j, _mm256_i32gather_ps(coding.inverse, index, 4));
    }
#endif
    for (; j < lanes; ++j) {
        group->divisor[j] = (int32_t)(coding.places[symbols[j]] & 0xffff);
        group->start[j] = (int32_t)(coding.places[symbols[j]] >> 16);
        group->inverse[j] = coding.inverse[symbols[j]];
    }
}

inline void code_lanes(const Group& group, int lanes, int32_t* state) {
    for (int j = 0; j < lanes; ++j) {  // vectorised: a quotient is below 2^19, so a float is off by one at most
        const int32_t divisor = group.divisor[j];
        int32_t quotient = (int32_t)((float)state[j] * group.inverse[j]);
        int32_t rest = state[j] - quotient * divisor;
        const int32_t below = rest >> 31;
        quotient += below;
        rest += below & divisor;
        const int32_t above = (divisor - 1 - rest) >> 31;
        quotient -= above;
        rest -= above & divisor;
        state[j] = (quotient << PROBABILITY_BITS) + rest + group.start[j];
    }
}

// The words of one plane, written backwards from `words`, not beyond `limit`; NULL if they do not fit.
uint8_t* encode_plane(const uint8_t* bytes, const Plane& plane, const uint16_t* frequency, int32_t* state,
                      uint8_t* words, const uint8_t* limit) {
    Coding coding;
    for (uint32_t symbol = 0, start = 0; symbol < 256; start += frequency[symbol++]) {
        coding.places[symbol] = frequency[symbol] | start << 16;
        coding.inverse[symbol] = 1.0f / (float)(frequency[symbol] ? frequency[symbol] : 1);
    }
    Group group;
    uint8_t strided[STATES];
    for (int64_t first = (plane.count - 1) / STATES * STATES; first >= 0; first -= STATES) {
        if (words - limit < 2 * STATES) return 0;
        const int lanes = (int)min64(STATES, plane.count - first);
        const uint8_t* symbols = bytes + plane.offset + first * plane.stride;
        if (plane.stride > 1) {
            for (int j = 0; j < lanes; ++j) strided[j] = symbols[j * plane.stride];
            symbols = strided;
        }
        look_up(coding, symbols, lanes, &group);
        words = shrink(group.divisor, lanes, state, words);
        if (lanes == STATES)
            code_lanes(group, STATES, state);  // a constant number of them vectorises
        else
            code_lanes(group, lanes, state);
    }
    return words;
}

// Everything raw: what is sent when coding does not pay.
int64_t encode_raw(const uint8_t* bytes, const Plane* planes, int64_t count, uint8_t* payload) {
    uint8_t* target = payload + 4 + count;
    for (int64_t p = 0; p < count; ++p) {
        payload[4 + p] = 0;
        for (int64_t i = 0; i < planes[p].count; ++i) *target++ = bytes[planes[p].offset + i * planes[p].stride];
    }
    store<uint32_t>(payload, (uint32_t)(target - payload));
    return target - payload;
}

// `sections` holds pairs of bytes and stride; `workspace` as many bytes as they have together, and 64.
int64_t entropy_encode(const uint8_t* bytes, const int64_t* sections, int64_t section_count, uint8_t* workspace,
                       uint8_t* payload) {
    Plane planes[MAX_PLANES];
    uint16_t frequency[MAX_PLANES][256];
    int64_t histogram[256], size = 0, gain = 0;
    const int64_t count = planes_of(sections, section_count, planes);
    uint8_t* const modes = payload + 4;
    for (int64_t p = 0; p < count; ++p) {
        const Plane& plane = planes[p];
        size += plane.count;
        modes[p] = 0;
        if (plane.count < SMALLEST_CODED) continue;
        histogram_of(bytes, plane, histogram);
        frequencies_of(histogram, plane.count, frequency[p]);
        const int64_t saved = bytes_saved(histogram, frequency[p], plane.count);
        if (saved <= 0) continue;
        modes[p] = 1;
        gain += saved;
    }
    if (gain <= STATE_BYTES) return encode_raw(bytes, planes, count, payload);

    int32_t state[STATES];
    for (int j = 0; j < STATES; ++j) state[j] = (int32_t)LOWEST_STATE;
    uint8_t* const words_end = workspace + size + 2 * STATES;
    uint8_t* words = words_end;
    for (int64_t p = count - 1; p >= 0 && words; --p)
        if (modes[p]) words = encode_plane(bytes, planes[p], frequency[p], state, words, workspace);
    if (!words) return encode_raw(bytes, planes, count, payload);

    int64_t raw = 0, tables = 0;
    for (int64_t p = 0; p < count; ++p) {
        if (modes[p])
            tables += table_bytes(frequency[p]);
        else
            raw += planes[p].count;
    }
    const int64_t total = 4 + count + tables + raw + STATE_BYTES + (words_end - words);
    if (total >= 4 + count + size) return encode_raw(bytes, planes, count, payload);
    uint8_t* target = modes + count;
    for (int64_t p = 0; p < count; ++p)
        if (modes[p]) target += write_table(frequency[p], target);
    for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; !modes[p] && i < planes[p].count; ++i)
            *target++ = bytes[planes[p].offset + i * planes[p].stride];
    memcpy(target, state, sizeof state);
    memcpy(target + STATE_BYTES, words, (size_t)(words_end - words));
    store<uint32_t>(payload, (uint32_t)total);
    return total;
}

// A symbol, the frequency less 1 and the place within it, for each of the 4096 slots.
void decoding_table(const uint16_t* frequency, uint32_t* table) {
    for (int s = 0, slot = 0; s < 256; ++s)
        for (int i = 0; i < frequency[s]; ++i) table[slot++] = slot_of(s, frequency[s], (uint32_t)i);
}

// 32 symbols, of stride 1 to `symbols`; at least 64 bytes of words must be there.
inline const uint8_t* decode_32(const uint32_t* table, uint32_t* state, const uint8_t* words, uint8_t* symbols) {
#if defined(__AVX512BW__)
    for (int part = 0; part < 2; ++part) {
        __m512i x = _mm512_loadu_si512(state + 16 * part);
        const __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(x, _mm512_set1_epi32(4095)), table, 4);
        _mm_storeu_si128((__m128i*)(symbols + 16 * part), _mm512_cvtepi32_epi8(entry));
        __m512i factor = _mm512_and_si512(_mm512_srli_epi32(entry, 8), _mm512_set1_epi32(4095));
        factor = _mm512_add_epi32(factor, _mm512_set1_epi32(1));
        x = _mm512_mullo_epi32(factor, _mm512_srli_epi32(x, PROBABILITY_BITS));
        x = _mm512_add_epi32(x, _mm512_srli_epi32(entry, 20));
        const __mmask16 low = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32((int)LOWEST_STATE));
        const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)words));
        const __m512i filled = _mm512_or_si512(_mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(low, word));
        _mm512_storeu_si512(state + 16 * part, _mm512_mask_mov_epi32(x, low, filled));
        words += 2 * __builtin_popcount(low);
    }
#else
    for (int j = 0; j < STATES; ++j) {
        const uint32_t entry = table[state[j] & 4095];
        const uint32_t x = next_state(state[j], entry);
        const uint32_t low = x < LOWEST_STATE;
        symbols[j] = (uint8_t)entry;
        state[j] = x << (16 * low) | (load<uint16_t>(words) & (0 - low));  // no branch: it could not be predicted
        words += 2 * low;
    }
#endif
    return words;
}

// Returns where the words of the next plane begin, or NULL if there are too few.
const uint8_t* decode_plane(const Plane& plane, const uint32_t* table, uint32_t* state, const uint8_t* words,
                            const uint8_t* end, uint8_t* bytes) {
    uint8_t symbols[STATES];
    for (int64_t first = 0; first < plane.count; first += STATES) {
        uint8_t* target = bytes + plane.offset + first * plane.stride;
        const int lanes = (int)min64(STATES, plane.count - first);
        if (lanes == STATES && end - words >= 2 * STATES) {
            words = decode_32(table, state, words, plane.stride == 1 ? target : symbols);
            if (plane.stride > 1)
                for (int j = 0; j < STATES; ++j) target[j * plane.stride] = symbols[j];
            continue;
        }
        for (int j = 0; j < lanes; ++j) {
            const uint32_t entry = table[state[j] & 4095];
            target[j * plane.stride] = (uint8_t)entry;
            state[j] = next_state(state[j], entry);
            if (state[j] >= LOWEST_STATE) continue;
            if (end - words < 2) return 0;
            state[j] = state[j] << 16 | load<uint16_t>(words);
            words += 2;
        }
    }
    return words;
}

int entropy_decode(const uint8_t* payload, int64_t size, const int64_t* sections, int64_t section_count,
                   uint8_t* bytes) {
    Plane planes[MAX_PLANES];
    uint16_t frequency[MAX_PLANES][256];
    const int64_t count = planes_of(sections, section_count, planes);
    const uint8_t* const end = payload + size;
    const uint8_t* modes = payload + 4;
    const uint8_t* source = modes + count;
    if (source > end) return GC_BAD_COUNT;
    bool coded = false;
    for (int64_t p = 0; p < count; ++p) {
        if (modes[p] > 1) return GC_BAD_INDEX;
        if (!modes[p]) continue;
        const int64_t used = read_table(source, end, frequency[p]);
        if (used == 0) return GC_BAD_INDEX;
        source += used;
        coded = true;
    }
    for (int64_t p = 0; p < count; ++p) {
        if (modes[p]) continue;
        if (end - source < planes[p].count) return GC_BAD_COUNT;
        for (int64_t i = 0; i < planes[p].count; ++i) bytes[planes[p].offset + i * planes[p].stride] = *source++;
    }
    if (!coded) return source == end ? GC_OK : GC_BAD_COUNT;
    if (end - source < STATE_BYTES) return GC_BAD_COUNT;
    uint32_t state[STATES], table[TOTAL];
    memcpy(state, source, sizeof state);
    for (int j = 0; j < STATES; ++j)
        if (state[j] < LOWEST_STATE || state[j] >> 31) return GC_BAD_INDEX;
    const uint8_t* words = source + STATE_BYTES;
    for (int64_t p = 0; p < count; ++p) {
        if (!modes[p]) continue;
        decoding_table(frequency[p], table);
        words = decode_plane(planes[p], table, state, words, end, bytes);
        if (!words) return GC_BAD_COUNT;
    }
    for (int j = 0; j < STATES; ++j)
        if (state[j] != LOWEST_STATE) return GC_BAD_INDEX;
    return words == end ? GC_OK : GC_BAD_COUNT;
}

}  // namespace
#endif
