// Polar: 64 signed bytes side by side and 64 bits (vectors/vectors.h): what every step of the code works on. Sums saturate
// at -128 and 127, magnitudes at 127.
//
// A tile is N rows of 64 lanes, one block a lane: entry (row, lane) is byte 64 row + lane, so nothing is transposed. A
// row of 64 values is one `Bytes`, its 64 bits one `Signs`.
#ifndef GCOMPRESS_POLAR_LANES_H
#define GCOMPRESS_POLAR_LANES_H

#include "../arith/polar.h"
#include "../cpu/simd.h"

namespace {

// How decoded values are written: in place of what is there, added to it, taken from it, or past the caches, which what is
// much larger than they are would only flush; the target of that lies at a multiple of 64 bytes.
enum { REPLACE = 0, ADD = 1, SUBTRACT = 2, STREAM = 3 };

template <int mode>
inline float put_value(float before, float value) {
    return mode == ADD ? before + value : mode == SUBTRACT ? before - value : value;
}

const int MAX_BLOCK = 16384;
const uint8_t PADDING_ROW = 255;

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

}  // namespace
#endif
