// Polar: what the successive-cancellation encoder (polar_code.cu) and the list encoder (polar_list.cu) share.
//
// A thread block takes a tile, or a part of its lanes where tiles are few, and each warp eight lanes: blocks of the code
// that lie side by side. Four threads share a lane; thread s of them owns the positions that are s modulo 4, four of them
// in a word, and all that becomes of them. So down to nodes of eight positions nothing passes between threads, neither
// values nor barriers, a lane's codeword is a string of bits in its four threads, and the polar transform is shifts of
// it. Only in nodes of four positions, in repetitions and in parity checks do the four look at each other, by shuffles.
//
// Positions of a node of n > SUBTREE lie in global memory, of smaller ones in shared memory, below 16 in registers.
#ifndef GCOMPRESS_CUDA_POLAR_CUH
#define GCOMPRESS_CUDA_POLAR_CUH

#include "../arith/polar.h"
#include "device.cuh"

namespace {

enum { LANE_GROUP = 8, ROW_SLOTS = 4, SUBTREE = 256 };

// One tile (gcompress/compressors/polar/device.py writes them). Other than PolarTile of polar/tile.h it has places in
// arrays of the device in place of addresses, and its own, since blocks take tiles in any order. `rank` counts uint16,
// `workspace` and `words` bytes.
struct DeviceTile {
    int64_t rows, lanes, levels, real, start, slot, words, rank, workspace;
    const int8_t* tables;  // of a class with 2 to 7 levels
    int64_t free[MAX_LEVELS];
};

// One class: the end of its rows, lanes included, among the tiles' entries, and the points of its labels.
struct PolarClass {
    int64_t end;
    const int16_t* points;
};

// Where entries come from: x, all of one class, or samples that were gathered before.
struct DeviceSource {
    const float* x;
    int64_t n;
    float scale;
    const int8_t* samples;
    GC_INLINE int8_t at(int64_t i, bool signs) const {
        if (samples) return samples[i];
        return i < n ? sample_of(x[i] * scale) : signs ? (int8_t)0 : ERASED;
    }
};

GC_INLINE int row_slot() { return lane() / LANE_GROUP; }
GC_INLINE int group_lane() { return lane() % LANE_GROUP; }
GC_INLINE int log_of(int64_t size) { return 31 - __clz((uint32_t)size); }
GC_INLINE uint32_t reversed(uint32_t i, int bits) { return (uint32_t)((uint64_t)__brev(i) >> (32 - bits)); }
GC_INLINE uint64_t low_ones(int count) { return ~0ull >> (64 - count); }  // from 1 to 64

// Types of all subtrees of two positions or more for `free` information bits, in shared memory: those of two always have
// a short cut, as the second one is better. All threads; begins and ends with a barrier.
GC_INLINE void find_types(const uint16_t* rank, int rows, int64_t free, uint8_t* types) {
    __syncthreads();
    for (int i = (int)threadIdx.x; i < rows / 2; i += THREADS) {
        const uint8_t left = rank[2 * i] < free ? ALL_FREE : ALL_FROZEN;
        const uint8_t right = rank[2 * i + 1] < free ? ALL_FREE : ALL_FROZEN;
        types[rows / 2 + i] = subtree_type(left, right, 2);
    }
    for (int size = 4, level = rows / 4; level > 0; level /= 2, size *= 2) {
        __syncthreads();
        for (int node = level + (int)threadIdx.x; node < 2 * level; node += THREADS)
            types[node] = subtree_type(types[2 * node], types[2 * node + 1], size);
    }
    __syncthreads();
}

struct PolarShared {
    uint32_t words[WARPS][32 * SUBTREE / 8];
};

// A warp's part of a tile. Pointers are this thread's: its words, and words of its codeword, lie 32 apart.
struct PolarWarp {
    int rows, bits, group;
    uint32_t *shared, *global;  // the inputs of a node of n positions begin at word n / 16
    uint32_t* inputs;           // of the whole code
    uint32_t *samples, *labels;
    uint64_t *code, *of_paths;
    GC_INLINE uint32_t* of(int n) const { return (n <= SUBTREE ? shared : global) + 2 * n; }
};

GC_INLINE int64_t code_words(int64_t rows) { return rows <= SUBTREE ? 1 : rows / SUBTREE; }

// Bytes of a tile's workspace per group of lanes: see `group_workspace` in gcompress/compressors/polar/device.py.
GC_INLINE PolarWarp polar_warp(const DeviceTile& tile, int group, uint8_t* workspace, uint32_t* shared, bool lists) {
    const int64_t rows = tile.rows, code_bytes = 256 * code_words(rows);
    const int64_t parts = 16 * rows + (tile.levels > 1 ? 16 * rows : 0) + code_bytes;
    const int64_t all = parts + (lists ? 8 * rows + code_bytes : 0);
    PolarWarp own;
    own.rows = (int)rows;
    own.bits = log_of(rows);
    own.group = group;
    own.shared = shared + lane();
    uint8_t* memory = workspace + tile.workspace + all * own.group;
    own.code = (uint64_t*)memory + lane();
    own.global = (uint32_t*)(memory + code_bytes) + lane();
    own.inputs = own.of((int)rows);
    own.samples = own.global + 4 * rows;
    own.labels = own.samples + 2 * rows;
    own.of_paths = (uint64_t*)(memory + parts) + lane();
    if (lists) own.inputs = (uint32_t*)(memory + parts + code_bytes) + lane();
    return own;
}

// Position 4 k + (the thread's slot) is that of this row; rows of a thread follow each other.
GC_INLINE int64_t first_row(const PolarWarp& own) {
    return (int64_t)reversed((uint32_t)row_slot(), 2) * (own.rows / 4);
}

// A thread's samples, word by word; `make` makes one from a row and its place among the tiles' entries.
template <class Make>
GC_INLINE void fill_words(const PolarWarp& own, const DeviceTile& tile, uint32_t* words, const Make& make) {
    const int64_t quarter = first_row(own), apart = own.rows / 16;
    const int64_t first = tile.start + own.group * LANE_GROUP + group_lane();
    for (int64_t v = 0; v < apart; ++v) {
        uint32_t word = 0;
        for (int b = 0; b < 4; ++b) {  // byte b is of position 4 (4 w + b) + slot
            const int64_t row = quarter + (int64_t)reversed((uint32_t)b, 2) * apart + v;
            word |= (uint32_t)(uint8_t)make(row, first + row * tile.lanes) << (8 * b);
        }
        words[32 * reversed((uint32_t)v, own.bits - 4)] = word;
    }
}

// Inputs of a level of a code of several levels, from samples and the labels' lower bits.
GC_INLINE void level_inputs(const PolarWarp& own, const DeviceTile& tile, int level) {
    const int64_t quarter = first_row(own), apart = own.rows / 16;
    const int8_t* table = tile.tables + 256 * ((1 << level) - 1);
    for (int64_t v = 0; v < apart; ++v) {
        const int64_t w = reversed((uint32_t)v, own.bits - 4);
        const uint32_t sample = own.samples[32 * w], label = own.labels[32 * w];
        uint32_t word = 0;
        for (int b = 0; b < 4; ++b) {
            int32_t input = 0;
            if (tile.levels < MAX_LEVELS)
                input = table[256 * (label >> (8 * b) & 255) + (sample >> (8 * b) & 255)];
            else if (quarter + (int64_t)reversed((uint32_t)b, 2) * apart + v < tile.real)  // padding rows are 0
                input = 1 - 2 * (int32_t)(sample >> (8 * b + level) & 1);
            word |= (uint32_t)(uint8_t)input << (8 * b);
        }
        own.inputs[32 * w] = word;
    }
}

GC_INLINE void add_label_bits(const PolarWarp& own, int level) {
    for (int w = 0; w < own.rows / 16; ++w)
        own.labels[32 * w] |= four_ones((uint32_t)(own.code[32 * (w / 16)] >> (4 * (w % 16)))) << level;
}

// The polar transform of strides from four on, in each thread.
GC_INLINE void transform_own(const PolarWarp& own) {
    const uint64_t lower[6] = {0x5555555555555555ull, 0x3333333333333333ull, 0x0f0f0f0f0f0f0f0full,
                               0x00ff00ff00ff00ffull, 0x0000ffff0000ffffull, 0x00000000ffffffffull};
    const int words = (int)code_words(own.rows);
    for (int k = 0; k < words; ++k) {
        uint64_t bits = own.code[32 * k];
        for (int j = 0; j < 6; ++j) bits ^= bits >> (1 << j) & lower[j];  // what lies beyond the code is 0
        own.code[32 * k] = bits;
    }
    for (int half = 1; half < words; half *= 2)
        for (int k = 0; k < words; ++k)
            if (!(k & half)) own.code[32 * k] ^= own.code[32 * (k + half)];
}

// A level's words: the transform's bits at the `free` best positions, a byte of eight lanes each. Spoils the code.
GC_INLINE void write_words(const PolarWarp& own, const DeviceTile& tile, const uint16_t* rank, int64_t free,
                           uint8_t* words) {
    const int64_t stride = tile.lanes / LANE_GROUP;
    transform_own(own);
    for (int64_t first = 0; first < own.rows; first += 4 * 32) {
        const int count = (int)min64(32, (own.rows - first) / 4);
        const uint64_t bits = own.code[32 * (first / SUBTREE)] >> (first % SUBTREE / 4);
        uint32_t mine = 0;
        for (int k = 0; k < count; ++k) {  // thread k gets four positions of all lanes
            const uint32_t four = __ballot_sync(ALL_LANES, bits >> k & 1);
            if (lane() == k) mine = four;
        }
        mine ^= mine >> 8 & 0x00ff00ffu;
        mine ^= mine >> 16;
        const int64_t position = first + 4 * lane();
        uint32_t chosen = 0;
        for (int j = 0; j < 4 && lane() < count; ++j) chosen |= (uint32_t)(rank[position + j] < free) << j;
        uint32_t before = (uint32_t)__popc(chosen);
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint32_t lower = __shfl_up_sync(ALL_LANES, before, distance);
            if (lane() >= distance) before += lower;
        }
        const uint32_t total = __shfl_sync(ALL_LANES, before, 31);
        uint8_t* target = words + (int64_t)(before - (uint32_t)__popc(chosen)) * stride;
        for (int j = 0; j < 4; ++j) {
            if (!(chosen >> j & 1)) continue;
            *target = (uint8_t)(mine >> (8 * j));
            target += stride;
        }
        words += (int64_t)total * stride;
    }
}

GC_INLINE void add_products(uint64_t* products, int64_t slot, int64_t dot, int64_t norm) {
    atomicAdd(products + 2 * slot, (uint64_t)dot);
    if (norm) atomicAdd(products + 2 * slot + 1, (uint64_t)norm);
}

// Adds <samples, points of their labels> and <points, points> of every class, over the samples that matter; with one
// level the sum of samples, each by the sign of its bit. To be called before the last level's code is spoilt.
GC_INLINE void label_products(const PolarWarp& own, const DeviceTile& tile, const PolarClass* classes,
                              uint64_t* products) {
    const int64_t quarter = first_row(own), end = min64(quarter + own.rows / 4, tile.real);
    int64_t slot = tile.slot, dot = 0, norm = 0;
    while (quarter < end && classes[slot].end <= tile.start + quarter * tile.lanes) ++slot;
    for (int64_t row = quarter; row < end; ++row) {
        while (classes[slot].end <= tile.start + row * tile.lanes) {  // the next class begins here
            add_products(products, slot, dot, norm);
            dot = norm = 0;
            ++slot;
        }
        const int64_t k = reversed((uint32_t)(row - quarter), own.bits - 2), w = 32 * (k / 4);
        const int byte = (int)(k & 3);
        if (tile.levels == 1) {
            const int32_t sample = byte_of(own.inputs[w], byte);
            dot += own.code[32 * (k / 64)] >> (k & 63) & 1 ? -sample : sample;
        } else {
            const int32_t sample = byte_of(own.samples[w], byte);
            const int32_t point = sample == ERASED ? 0 : classes[slot].points[own.labels[w] >> (8 * byte) & 255];
            dot += sample * point;
            norm += point * point;
        }
    }
    const int64_t common = __shfl_sync(ALL_LANES, slot, 0);
    if (__ballot_sync(ALL_LANES, quarter < end && slot != common)) {
        if (quarter < end) add_products(products, slot, dot, norm);
        return;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        dot += __shfl_xor_sync(ALL_LANES, dot, distance);
        norm += __shfl_xor_sync(ALL_LANES, norm, distance);
    }
    if (lane() == 0) add_products(products, slot, dot, norm);
}

// All of a tile, or a block's of `parts` parts of it: `encode(types, own)` makes the codeword `own.code` of the inputs
// `own.inputs`. All threads call it.
template <class Encode>
GC_INLINE void encode_tile(const DeviceTile* tiles, int64_t parts, const DeviceSource& source,
                           const PolarClass* classes, const uint16_t* ranks, bool lists, uint8_t* workspace,
                           uint32_t* shared, uint8_t* types, uint8_t* words, uint64_t* products, const Encode& encode) {
    tiles += blockIdx.x / parts;
    const DeviceTile tile = *tiles;
    const int warps = WARPS / (int)parts, group = (int)(blockIdx.x % parts) * warps + warp();
    const PolarWarp own = polar_warp(tile, group, workspace, shared, lists);
    const bool active = warp() < warps && group < tile.lanes / LANE_GROUP, signs = tile.levels == 1;
    const uint16_t* rank = ranks + tile.rank;
    words += tile.words + own.group;
    if (active) {
        fill_words(own, tile, signs ? own.inputs : own.samples,
                   [&](int64_t, int64_t place) { return source.at(place, signs); });
        for (int64_t w = 0; w < own.rows / 16 && !signs; ++w) own.labels[32 * w] = 0;
    }
    for (int level = 0; level < tile.levels; ++level) {
        const int64_t free = tiles->free[level];
        find_types(rank, own.rows, free, types);
        if (!active) continue;
        if (!signs) level_inputs(own, tile, level);
        encode(types, own);
        if (!signs) add_label_bits(own, level);
        if (level + 1 == tile.levels) label_products(own, tile, classes, products);
        write_words(own, tile, rank, free, words);
        words += free * (tile.lanes / LANE_GROUP);
    }
}

// A node of n < 16 positions is one word: its upper and lower half (duplicated over threads where it has less than four
// positions), and the codeword of both from theirs.
template <int n>
GC_INLINE void halves(uint32_t word, uint32_t* upper, uint32_t* lower) {
    if (n >= 8) {
        const uint32_t mask = n == 16 ? 0xffffu : 0xffu;
        *upper = word & mask;
        *lower = word >> (n == 16 ? 16 : 8) & mask;
        return;
    }
    const bool second = lane() & (4 * n);  // the thread has a position of the second half
    const uint32_t other = __shfl_xor_sync(ALL_LANES, word, 4 * n);
    *upper = second ? other : word;
    *lower = second ? word : other;
}
template <int n>
GC_INLINE uint32_t joined(uint32_t left, uint32_t right) {
    if (n >= 8) return (left ^ right) | right << (n / 8);
    return lane() & (4 * n) ? right : left ^ right;
}

// The inputs of a node's left half, and those of the right one where the left one is frozen; `words` of a half.
GC_INLINE void enter_left(const uint32_t* parent, uint32_t* child, int words) {
    for (int i = 0; i < words; ++i) child[32 * i] = four_check_nodes(parent[32 * i], parent[32 * (i + words)]);
}
GC_INLINE void enter_right_alone(const uint32_t* parent, uint32_t* child, int words) {  // beside a frozen half
    for (int i = 0; i < words; ++i) child[32 * i] = four_variable_nodes(parent[32 * i], parent[32 * (i + words)], 0);
}

// Over the threads of a lane whose positions are not the same in a node of n: all four, or two of two positions, or one.
GC_INLINE int32_t summed(int32_t value, int n) {
    if (n >= 2) value += __shfl_xor_sync(ALL_LANES, value, LANE_GROUP);
    if (n >= 4) value += __shfl_xor_sync(ALL_LANES, value, 2 * LANE_GROUP);
    return value;
}

// A thread's words of a node in memory, and that of a node of n <= 16: visit(word, number of its first own position,
// bytes in it) for each.
struct NodeWords {
    const uint32_t* words;
    int n;
    template <class Visit>
    GC_INLINE void each(const Visit& visit) const {
        for (int w = 0; w < n / 16; ++w) visit(words[32 * w], 4 * w, 4);
    }
};
template <int n>
struct NodeWord {
    uint32_t word;
    template <class Visit>
    GC_INLINE void each(const Visit& visit) const {
        visit(word, 0, n >= 16 ? 4 : n == 8 ? 2 : 1);
    }
};

// Hard decisions.
struct Signs {
    uint64_t bits;
    GC_INLINE void take(uint32_t word, int first, int count) {
        bits |= (uint64_t)(four_bits(word) & (uint32_t)low_ones(count)) << first;
    }
};
struct Sum {
    int32_t value;
    GC_INLINE void take(uint32_t word, int count) {
        for (int b = 0; b < count; ++b) value += byte_of(word, b);
    }
};
// Whether a position of a node of n is this thread's; then it is bit position / 4.
GC_INLINE bool is_own(int position, int n) { return (position & 3) == (row_slot() & (n - 1)); }

}  // namespace
#endif
