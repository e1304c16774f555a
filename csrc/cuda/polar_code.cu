// Polar: the successive-cancellation encoder, and the decoder. Encoding reads 4 bytes an entry (1 where samples were
// gathered), writes rate / 8, and moves about 2 of workspace, 4 more for each level of a code of several; work, not
// memory, bounds it: some ten to thirty operations on four entries in each stage of the code that has no short cut.
// Decoding reads rate / 8 and writes 4, or reads 4 more to add.
#include "polar.cuh"

namespace {

// Wagner's rule: the first position of least magnitude changes where the parity is odd.
struct Parity {
    int32_t key;
    uint32_t odd;
    GC_INLINE void take(uint32_t word, int first, int count) {
        const uint32_t magnitudes = four_magnitudes(word);
        odd ^= (uint32_t)__popc(four_bits(word) & (uint32_t)low_ones(count));
        for (int b = 0; b < count; ++b) {
            const int32_t other = byte_of(magnitudes, b) << 6 | (4 * (first + b) + row_slot());
            key = other < key ? other : key;
        }
    }
    // What is to change of this thread's bits.
    GC_INLINE uint64_t repair() {
        for (int distance = LANE_GROUP; distance < 32; distance *= 2) {
            const int32_t other = __shfl_xor_sync(ALL_LANES, key, distance);
            odd ^= __shfl_xor_sync(ALL_LANES, odd, distance);
            key = other < key ? other : key;
        }
        return (odd & 1) && is_own(key, 4) ? 1ull << ((key & 63) >> 2) : 0;
    }
};

// The codeword of a node of n positions that is none of two halves: a bit for each of the thread's.
template <class Words>
GC_INLINE uint64_t encode_leaf(int type, int n, const Words& words) {
    if (type == ALL_FROZEN) return 0;
    if (type == REPETITION) {
        Sum sum = {0};
        words.each([&](uint32_t word, int, int count) { sum.take(word, count); });
        return summed(sum.value, n) < 0 ? low_ones(n >= 4 ? n / 4 : 1) : 0;
    }
    Signs signs = {0};
    words.each([&](uint32_t word, int first, int count) { signs.take(word, first, count); });
    if (type == ALL_FREE) return signs.bits;
    Parity parity = {1 << 20, 0};
    words.each([&](uint32_t word, int first, int count) { parity.take(word, first, count); });
    return signs.bits ^ parity.repair();
}

// The same for any node of n <= 16 positions, a bit for each byte of the word.
template <int n>
GC_INLINE uint32_t encode_word(const uint8_t* types, int node, uint32_t word) {
    const int type = types[node];
    if (n == 2 || type != GENERAL) return (uint32_t)encode_leaf(type, n, NodeWord<n>{word});
    if constexpr (n > 2) {
        uint32_t upper, lower;
        halves<n>(word, &upper, &lower);
        const uint32_t left = encode_word<n / 2>(types, 2 * node, four_check_nodes(upper, lower));
        const uint32_t inputs = four_variable_nodes(upper, lower, four_ones(left));
        return joined<n>(left, encode_word<n / 2>(types, 2 * node + 1, inputs));
    }
    return 0;
}

// At most SUBTREE positions, of which the left ones' bits are in one word.
GC_INLINE void enter_right(const uint32_t* parent, uint32_t* child, int words, uint64_t left) {
    for (int i = 0; i < words; ++i) {
        const uint32_t bits = four_ones((uint32_t)(left >> (4 * i)));
        child[32 * i] = four_variable_nodes(parent[32 * i], parent[32 * (i + words)], bits);
    }
}

// The codeword of a subtree of 16 to SUBTREE positions, whose inputs lie in shared memory: a bit an own position.
GC_INLINE uint64_t encode_subtree(const uint8_t* types, int root, int size, const PolarWarp& own) {
    uint64_t code = 0;
    int node = root, n = size, at = 0;
    for (;;) {
        if (n > 16 && types[node] == GENERAL) {
            const bool skip = types[2 * node] == ALL_FROZEN;
            if (skip)
                enter_right_alone(own.of(n), own.of(n / 2), n / 32);
            else
                enter_left(own.of(n), own.of(n / 2), n / 32);
            n /= 2;
            at += skip ? n / 4 : 0;
            node = 2 * node + skip;
            continue;
        }
        const uint64_t found =
            n == 16 ? encode_word<16>(types, node, *own.of(n)) : encode_leaf(types[node], n, NodeWords{own.of(n), n});
        code |= found << at;
        while (node != root && (node & 1)) {
            const uint64_t right = code >> at & low_ones(n / 4);
            at -= n / 4;
            code ^= right << at;
            node /= 2;
            n *= 2;
        }
        if (node == root) return code;
        enter_right(own.of(2 * n), own.of(n), n / 16, code >> at);
        ++node;
        at += n / 4;
    }
}

struct Cancellation {
    GC_INLINE void operator()(const uint8_t* types, const PolarWarp& own) const {
        int node = 1, n = own.rows, at = 0;  // at: in words of the code
        for (;;) {
            const int words = n / SUBTREE, type = types[node];
            uint64_t* code = own.code + 32 * at;
            if (n > SUBTREE && type == GENERAL) {
                const bool skip = types[2 * node] == ALL_FROZEN;
                for (int k = 0; k < words / 2 && skip; ++k) code[32 * k] = 0;
                if (skip)
                    enter_right_alone(own.of(n), own.of(n / 2), n / 32);
                else
                    enter_left(own.of(n), own.of(n / 2), n / 32);
                n /= 2;
                at += skip ? words / 2 : 0;
                node = 2 * node + skip;
                continue;
            }
            if (n <= SUBTREE) *code = encode_subtree(types, node, n, own);
            for (int k = 0; k < words && n > SUBTREE; ++k)  // all frozen or all free
                code[32 * k] = encode_leaf(type, SUBTREE, NodeWords{own.of(n) + 32 * 16 * k, SUBTREE});
            while (node != 1 && (node & 1)) {
                at -= n / SUBTREE;
                for (int k = 0; k < n / SUBTREE; ++k) own.code[32 * (at + k)] ^= own.code[32 * (at + k + n / SUBTREE)];
                node /= 2;
                n *= 2;
            }
            if (node == 1) return;
            for (int k = 0; k < n / SUBTREE; ++k) {
                const uint32_t* parent = own.of(2 * n) + 32 * 16 * k;
                uint32_t* child = own.of(n) + 32 * 16 * k;
                const uint64_t left = own.code[32 * (at + k)];
                for (int i = 0; i < 16; ++i)
                    child[32 * i] = four_variable_nodes(parent[32 * i], parent[32 * (i + n / 16)],
                                                        four_ones((uint32_t)(left >> (4 * i))));
            }
            ++node;
            at += n / SUBTREE;
        }
    }
};

}  // namespace

// A block a tile, or a part of one. Dynamic shared memory: the types of its subtrees, as many bytes as rows.
GC_KERNEL(polar_encode)(const float* x, int64_t n, double scale, const int8_t* samples, const DeviceTile* tiles,
                        const PolarClass* classes, const uint16_t* ranks, uint8_t* workspace, uint8_t* words,
                        uint64_t* products, int64_t parts) {
    GC_DYNAMIC_SHARED(uint8_t, types);
    GC_SHARED(PolarShared, shared);
    const DeviceSource source = {x, n, (float)scale, samples};
    const Cancellation encode = {};
    encode_tile(tiles, parts, source, classes, ranks, false, workspace, shared.words[warp()], types, words, products,
                encode);
}
GC_REGISTER(polar_encode)

namespace {

struct DecodeShared {
    ScanShared scan;
};

// A level's words to their positions and through the transform; a byte holds eight lanes. All threads; ends with a
// barrier.
GC_INLINE void spread_words(const uint8_t* words, int64_t stride, const uint16_t* rank, int rows, int64_t free,
                            uint8_t* code, ScanShared* scan) {
    const int own = rows > THREADS ? rows / THREADS : 1, first = own * (int)threadIdx.x;
    uint32_t count = 0, total;
    for (int i = first; i < first + own && i < rows; ++i) count += rank[i] < free;
    const uint8_t* next = words + (int64_t)scanned(count, scan, &total) * stride;
    for (int i = first; i < first + own && i < rows; ++i) {
        code[i] = 0;
        if (rank[i] >= free) continue;
        code[i] = *next;
        next += stride;
    }
    __syncthreads();
    uint32_t* four = (uint32_t*)code;
    for (int i = (int)threadIdx.x; i < rows / 4; i += THREADS) {
        uint32_t word = four[i];
        word ^= word >> 8 & 0x00ff00ffu;
        four[i] = word ^ word >> 16;
    }
    for (int half = 1; half < rows / 4; half *= 2) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < rows / 8; i += THREADS) {
            const int low = (i & ~(half - 1)) * 2 + (i & (half - 1));
            four[low] ^= four[low + half];
        }
    }
    __syncthreads();
}

}  // namespace

// A block eight lanes of a tile. The levels' bits lie in dynamic shared memory, or in `workspace` where they are many.
GC_KERNEL(polar_decode)(const uint8_t* words, const DeviceTile* tiles, const PolarClass* classes, const uint16_t* ranks,
                        const float* values, int64_t stride, uint8_t* workspace, int64_t n, int64_t add, float* out) {
    GC_DYNAMIC_SHARED(uint8_t, bytes);
    GC_SHARED(DecodeShared, shared);
    const DeviceTile tile = tiles[blockIdx.x / LANE_GROUP];
    const int64_t* free = tiles[blockIdx.x / LANE_GROUP].free;
    const int group = (int)blockIdx.x % LANE_GROUP, rows = (int)tile.rows, bits = log_of(rows);
    const int64_t bytes_apart = tile.lanes / LANE_GROUP;
    if (group >= bytes_apart) return;
    uint8_t* code = workspace ? workspace + tile.workspace + group * tile.levels * rows : bytes;
    words += tile.words + group;
    for (int level = 0; level < tile.levels; ++level) {
        spread_words(words, bytes_apart, ranks + tile.rank, rows, free[level], code + level * rows, &shared.scan);
        words += free[level] * bytes_apart;
    }
    int64_t slot = tile.slot;
    for (int64_t row = threadIdx.x / LANE_GROUP; row < tile.real; row += THREADS / LANE_GROUP) {
        const int64_t place = tile.start + row * tile.lanes + group * LANE_GROUP + group_lane();
        if (place >= n) break;
        while (classes[slot].end <= tile.start + row * tile.lanes) ++slot;
        const uint32_t position = reversed((uint32_t)row, bits);
        uint32_t label = 0;
        for (int level = 0; level < tile.levels; ++level)
            label |= (uint32_t)(code[level * rows + position] >> group_lane() & 1) << level;
        const float value = values[slot * stride + label];
        out[place] = add ? out[place] + value : value;
    }
}
GC_REGISTER(polar_decode)
