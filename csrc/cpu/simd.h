// What takes 64 entries at a time, in vectors of whatever width there is (vectors/vectors.h).
#ifndef GCOMPRESS_CPU_SIMD_H
#define GCOMPRESS_CPU_SIMD_H

#include "../vectors/vectors.h"

namespace {

// Bit j of the result: keys[j] >= bound, for 64 keys below 2^31 and a bound of at least 1.
GC_HOT uint64_t at_least_64(const uint32_t* keys, uint32_t bound) {
    const Ints below = every_int((int32_t)bound - 1);
    return word_where([&](int j) { return above(load_ints(keys + j), below); });
}

// Bit j of the result: codes[j] == code, for 64 codes.
GC_HOT uint64_t equal_64(const uint8_t* codes, uint8_t code) {
    return word_of(equal(load_bytes((const int8_t*)codes), every_byte((int8_t)code)));
}

// Bit j of the result: x[j] carries a minus sign, for 64 entries.
GC_HOT uint64_t signs_64(const float* x) {
    return word_where([&](int j) { return top_bits(load_ints(x + j)); });
}

// out[j] = bit j of signs ? minus : plus (or +=) for 64 entries.
template <bool add>
GC_HOT void choose_64(uint64_t signs, float plus, float minus, float* out) {
    const Floats ones = every_float(minus), zeros = every_float(plus);
    for (int j = 0; j < 64; j += WIDE) {
        const Floats value = choose_by_bits(signs >> j, ones, zeros);
        store_floats(out + j, add ? load_floats(out + j) + value : value);
    }
}

// Eight bytes of `bits` significant bits each, packed into the low 8 * bits bits; and back:
// in three steps of twice the width, the upper half of every pair moves beside the lower one.
template <int bits>
GC_HOT uint64_t squeeze_8(uint64_t x) {
    const uint64_t low16 = 0x0001000100010001ull * ((1u << bits) - 1);
    const uint64_t low32 = 0x0000000100000001ull * ((1ull << 2 * bits) - 1);
    const uint64_t low64 = (1ull << 4 * bits) - 1;
    x = (x & low16) | (x & ~low16) >> (8 - bits);
    x = (x & low32) | (x & ~low32) >> 2 * (8 - bits);
    return (x & low64) | (x & ~low64) >> 4 * (8 - bits);
}
template <int bits>
GC_HOT uint64_t spread_8(uint64_t x) {
    const uint64_t low16 = 0x0001000100010001ull * ((1u << bits) - 1);
    const uint64_t low32 = 0x0000000100000001ull * ((1ull << 2 * bits) - 1);
    const uint64_t low64 = (1ull << 4 * bits) - 1;
    x = (x & low64) | (x & ~low64) << 4 * (8 - bits);
    x = (x & low32) | (x & ~low32) << 2 * (8 - bits);
    return (x & low16) | (x & ~low16) << (8 - bits);
}

// 64 codes, one a byte, to 8 * bits bytes and back. Whole words are moved and overlap, so
// both touch up to 8 - bits bytes behind the packed ones.
template <int bits>
GC_HOT void pack_words(const uint8_t* codes, uint8_t* packed) {
    for (int group = 0; group < 8; ++group)
        store<uint64_t>(packed + bits * group, squeeze_8<bits>(load<uint64_t>(codes + 8 * group)));
}
template <int bits>
GC_HOT void pack_64(Bytes codes, uint8_t* packed) {
    if (bits == 1) return store<uint64_t>(packed, word_of(has_bit(codes, 0)));
    if (bits == 2) return pack_twos(codes, packed);
    if (bits == 4) return pack_fours(codes, packed);
    uint8_t each[64];
    store_bytes((int8_t*)each, codes);
    pack_words<bits>(each, packed);
}
template <int bits>
GC_HOT void pack_64(const uint8_t* codes, uint8_t* packed) {
    if (bits == 1 || bits == 2 || bits == 4) return pack_64<bits>(load_bytes((const int8_t*)codes), packed);
    pack_words<bits>(codes, packed);
}
template <int bits>
GC_HOT void unpack_64(const uint8_t* packed, uint8_t* codes) {
    if (bits == 1) return store_bytes((int8_t*)codes, doubled_plus(zero_bytes(), signs_of(load<uint64_t>(packed))));
    if (bits == 2) return unpack_twos(packed, codes);
    if (bits == 4) return unpack_fours(packed, codes);
    const uint64_t low = bits == 8 ? ~0ull : (1ull << ((8 * bits) & 63)) - 1;
    for (int group = 0; group < 8; ++group)
        store<uint64_t>(codes + 8 * group, spread_8<bits>(load<uint64_t>(packed + bits * group) & low));
}

// The same for `count` < = 64 codes at the end of a buffer, through a block of its own.
template <int bits>
GC_COLD void pack_tail(const uint8_t* codes, int64_t count, uint8_t* packed) {
    uint8_t padded[64] = {0}, bytes[64 + 8];
    memcpy(padded, codes, (size_t)count);
    pack_64<bits>(padded, bytes);
    memcpy(packed, bytes, (size_t)((count * bits + 7) / 8));
}
template <int bits>
GC_COLD void unpack_tail(const uint8_t* packed, int64_t count, uint8_t* codes) {
    uint8_t bytes[64 + 8] = {0};
    memcpy(bytes, packed, (size_t)((count * bits + 7) / 8));
    unpack_64<bits>(bytes, codes);
}

// out[i] = table[codes[i]] (or +=) for 64 codes; the table has 16 or 256 entries.
template <bool add>
GC_HOT void look_up_64(const uint8_t* codes, const float* table, bool wide, float* out) {
    if (!wide) {
        const Table16 entries = load_table(table);
        for (int j = 0; j < 64; j += WIDE) {
            const Floats value = looked_up(entries, codes + j);
            store_floats(out + j, add ? load_floats(out + j) + value : value);
        }
        return;
    }
    for (int j = 0; j < 64; ++j) out[j] = add ? out[j] + table[codes[j]] : table[codes[j]];
}

}  // namespace
#endif
