// Polar: the transform that makes a codeword of information bits, 64 blocks side by side; it is its own inverse.
#ifndef GCOMPRESS_POLAR_TRANSFORM_H
#define GCOMPRESS_POLAR_TRANSFORM_H

#include "../cpu/simd.h"

namespace {

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

}  // namespace
#endif
