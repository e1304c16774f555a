// Polar's plan: streams of bits, written, and read from bytes that may be anything (gcompress/packing.py).
#ifndef GCOMPRESS_POLAR_PLAN_STREAMS_H
#define GCOMPRESS_POLAR_PLAN_STREAMS_H

#include "doubles.h"

namespace {

inline int64_t packed_bytes(int64_t count, int64_t width) { return (count * width + 7) / 8; }

// Writes to memory that is large enough.
struct StreamWriter {
    uint8_t* at;
    uint64_t word = 0;
    int used = 0;
    explicit StreamWriter(uint8_t* at_) : at(at_) {}
    void put(uint64_t value, int width) {  // up to 56 bits
        word |= value << used;
        for (used += width; used >= 8; used -= 8, word >>= 8) *at++ = (uint8_t)word;
    }
    void put_unary(int64_t zeros) {
        for (; zeros > 48; zeros -= 48) put(0, 48);
        put((uint64_t)1 << zeros, (int)zeros + 1);
    }
    uint8_t* finish() {  // fills the last byte
        if (used) *at++ = (uint8_t)word;
        used = 0;
        word = 0;
        return at;
    }
};

// Reads from `at` on, and only bytes below `end`; behind it all is 0.
struct StreamReader {
    const uint8_t *at, *end;
    uint64_t word = 0;
    int there = 0;
    StreamReader(const uint8_t* at_, const uint8_t* end_) : at(at_), end(end_) {}
    uint64_t get(int width) {  // up to 32 bits
        while (there < width) {
            word |= (uint64_t)(at < end ? *at : 0) << there;
            ++at;
            there += 8;
        }
        const uint64_t value = word & (((uint64_t)1 << width) - 1);
        word >>= width;
        there -= width;
        return value;
    }
    // Zeros before the next 1, which is passed, too; -1 if there is none.
    int64_t get_unary() {
        int64_t zeros = 0;
        while (!word) {
            if (at >= end) return -1;
            zeros += there;
            there = 0;
            if (end - at >= 8) {
                memcpy(&word, at, 7);  // seven, so that a read of 32 bits may follow
                at += 7;
                there = 56;
            } else {
                word = *at++;
                there = 8;
            }
        }
        const int more = __builtin_ctzll(word);
        word >>= more;
        word >>= 1;
        there -= more + 1;
        return zeros + more;
    }
};

// Reading and writing numbers at any alignment.
template <class T>
inline uint8_t* put_number(uint8_t* at, T value) {
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

}  // namespace
#endif
