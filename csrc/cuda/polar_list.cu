// Polar: the successive-cancellation list encoder. Of the eight lanes of a warp L neighbours become the paths of one
// block, so that a warp goes L times over 8 / L of its blocks, and a path that takes another's place is a shuffle. Moves
// L times what polar_code.cu moves of workspace, and does L times its work and some for the paths.
#include "polar.cuh"

#if defined(GC_EMULATED)
#define GC_APART static
#else
#define GC_APART static __device__ __noinline__
#endif

namespace {

// This thread's path of a block: its metric, in which they all agree until the first split.
struct Paths {
    int size;
    int32_t metric;
    bool differ;
    GC_INLINE int own() const { return lane() & (size - 1); }
    // The value of path `map` of the same block.
    template <class Value>
    GC_INLINE Value moved(Value value, int map) const {
        return __shfl_sync(ALL_LANES, value, (lane() & ~(size - 1)) | map);
    }
    GC_INLINE void penalize(int32_t penalty) {
        const int32_t sum = metric + penalty;
        int32_t least = sum;
        for (int distance = 1; distance < size; distance *= 2) {
            const int32_t other = __shfl_xor_sync(ALL_LANES, least, distance);
            least = other < least ? other : least;
        }
        metric = sum - least < WORST ? sum - least : WORST;
    }
};

// Bitonic sorting over the paths of a block: of two values that lie `distance` apart the lesser goes where `first`.
GC_INLINE int32_t exchanged(int32_t key, int distance, bool rising) {
    const int32_t other = __shfl_xor_sync(ALL_LANES, key, distance);
    return (other < key) == (((lane() & distance) == 0) == rising) ? other : key;
}
GC_INLINE int32_t sorted(int32_t key, int size, bool rising) {
    for (int run = 2; run <= size; run *= 2)
        for (int distance = run / 2; distance > 0; distance /= 2)
            key = exchanged(key, distance, (run == size || (lane() & run) == 0) == rising);
    return key;
}

// Splits every path into one that goes on as it is and one that pays `price` >= 0, and keeps the best, best first, of
// equals those that do not pay and then those that came first. Returns whether this path paid; it was path *map.
GC_APART bool split(Paths* paths, int32_t price, int* map) {
    const int32_t dear = paths->metric + (price < WORST ? price : WORST), most = dear < WORST ? dear : WORST;
    const int32_t stay = sorted(paths->metric << 4 | paths->own(), paths->size, true);
    const int32_t pay = sorted(most << 4 | paths->own() | 8, paths->size, false);
    int32_t key = stay < pay ? stay : pay;
    for (int distance = paths->size / 2; distance > 0; distance /= 2) key = exchanged(key, distance, true);
    paths->metric = key >> 4;
    paths->differ = true;
    *map = key & (paths->size - 1);
    return key >> 3 & 1;
}

// What decisions for zeros cost.
GC_INLINE int32_t shortfall(uint32_t word, int count) {
    const uint32_t wrong = four_magnitudes(word) & four_masks(four_signs(word));
    int32_t sum = 0;
    for (int b = 0; b < count; ++b) sum += byte_of(wrong, b);
    return sum;
}

// The positions of least magnitude, as magnitude * 128 + position: the least and the next.
struct TwoWeakest {
    int32_t first, second;
    GC_INLINE void take(int32_t key) {
        const int32_t more = key < first ? first : key;
        first = key < first ? key : first;
        second = more < second ? more : second;
    }
    GC_INLINE void take(uint32_t word, int start, int count, int n) {
        const uint32_t magnitudes = four_magnitudes(word);
        for (int b = 0; b < count; ++b) take(byte_of(magnitudes, b) << 7 | ((4 * (start + b) + row_slot()) & (n - 1)));
    }
    GC_INLINE void meet(int n) {
        for (int distance = LANE_GROUP; distance < 32 && distance < LANE_GROUP * n; distance *= 2) {
            const int32_t one = __shfl_xor_sync(ALL_LANES, first, distance);
            const int32_t other = __shfl_xor_sync(ALL_LANES, second, distance);
            take(one);
            second = other < second ? other : second;
        }
    }
};

GC_INLINE uint64_t bit_at(int position, int n, bool where) {
    return where && is_own(position, n) ? 1ull << (position >> 2) : 0;
}

// The codewords of a node of n <= 128 positions that is none of two halves.
template <class Words>
GC_INLINE uint64_t list_leaf(int type, int n, const Words& words, Paths* paths, int* map) {
    *map = paths->own();
    int32_t against = 0;
    if (type == ALL_FROZEN) {
        words.each([&](uint32_t word, int, int count) { against += shortfall(word, count); });
        paths->penalize(summed(against, n));
        return 0;
    }
    if (type == REPETITION) {
        Sum sum = {0};
        words.each([&](uint32_t word, int, int count) {
            against += shortfall(word, count);
            sum.take(word, count);
        });
        const int32_t total = summed(sum.value, n);
        paths->penalize(summed(against, n) + (total < 0 ? total : 0));  // of the better sign
        const bool paid = split(paths, total < 0 ? -total : total, map);
        return (paths->moved((int32_t)(total < 0), *map) != 0) != paid ? low_ones(n >= 4 ? n / 4 : 1) : 0;
    }
    Signs signs = {0};
    TwoWeakest weakest = {1 << 20, 1 << 20};
    words.each([&](uint32_t word, int start, int count) {
        signs.take(word, start, count);
        weakest.take(word, start, count, n);
    });
    weakest.meet(n);
    if (type == ALL_FREE) {  // hard decisions, or those with the first of the least reliable ones changed
        const bool paid = split(paths, weakest.first >> 7, map);
        const int place = paths->moved(weakest.first, *map) & 127;
        return paths->moved(signs.bits, *map) ^ bit_at(place, n, paid);
    }
    // Wagner's rule, or that with the two least reliable bits both changed: parity stays even.
    const bool odd = summed(__popcll(signs.bits), 4) & 1;
    const int32_t first = weakest.first >> 7, second = weakest.second >> 7;
    paths->penalize(odd ? first : 0);
    const bool paid = split(paths, odd ? second - first : second + first, map);
    const bool repaired = (paths->moved((int32_t)odd, *map) != 0) != paid;
    const int one = paths->moved(weakest.first, *map) & 127, other = paths->moved(weakest.second, *map) & 127;
    return paths->moved(signs.bits, *map) ^ bit_at(one, n, repaired) ^ bit_at(other, n, paid);
}

// The same for any node of n <= 16 positions, a bit for each byte of the word.
template <int n>
GC_APART uint32_t list_word(const uint8_t* types, int node, uint32_t word, Paths* paths, int* map) {
    if (n == 2 || types[node] != GENERAL) return (uint32_t)list_leaf(types[node], n, NodeWord<n>{word}, paths, map);
    if constexpr (n > 2) {
        uint32_t upper, lower;
        int left_map, right_map;
        halves<n>(word, &upper, &lower);
        const uint32_t left = list_word<n / 2>(types, 2 * node, four_check_nodes(upper, lower), paths, &left_map);
        upper = paths->moved(upper, left_map);
        lower = paths->moved(lower, left_map);
        const uint32_t inputs = four_variable_nodes(upper, lower, four_ones(left));
        const uint32_t right = list_word<n / 2>(types, 2 * node + 1, inputs, paths, &right_map);
        *map = paths->moved(left_map, right_map);
        return joined<n>(paths->moved(left, right_map), right);
    }
    return 0;
}

// What a frozen node of any size costs, in runs of 128 positions.
GC_INLINE void list_frozen(const uint32_t* words, int n, Paths* paths) {
    for (int start = 0; start < n && paths->differ; start += MAX_REPETITION) {
        const int count = n - start < MAX_REPETITION ? n - start : MAX_REPETITION;
        int map;
        list_leaf(ALL_FROZEN, count, NodeWords{words + 2 * start, count}, paths, &map);
    }
}

// A thread's bits of positions from `at` on, of its own, at most 64 within one word.
GC_INLINE uint64_t bits_at(const uint64_t* code, int at, int count) {
    return code[32 * (at / 64)] >> (at & 63) & low_ones(count);
}
GC_INLINE void put_bits(uint64_t* code, int at, int count, uint64_t bits) {
    uint64_t* word = code + 32 * (at / 64);
    *word = (*word & ~(low_ones(count) << (at & 63))) | bits << (at & 63);
}

// The codewords of all paths for a code of 16 positions or more, in own.of_paths.
GC_INLINE void list_block(const uint8_t* types, const PolarWarp& own, Paths* paths) {
    uint64_t* code = own.of_paths;
    uint64_t left_maps = 0;  // of a left half of n positions that is done, at four times log2 n
    int node = 1, n = own.rows, at = 0;
    *code = 0;  // of a short code the rest of the word stays so
    for (;;) {
        const int type = types[node];
        int map = paths->own();
        if (n > 16 && (type == GENERAL || (type == ALL_FREE && n > MAX_REPETITION))) {
            const uint32_t* l = own.of(n);
            uint32_t* child = own.of(n / 2);
            const bool skip = types[2 * node] == ALL_FROZEN;
            if (!skip || paths->differ) enter_left(l, child, n / 32);
            n /= 2;
            if (skip) {
                list_frozen(child, n, paths);
                enter_right_alone(l, child, n / 16);
                for (int i = 0; i < n / 4; i += 64) put_bits(code, at + i, n / 4 < 64 ? n / 4 : 64, 0);
                left_maps = (left_maps & ~(15ull << 4 * log_of(n))) | (uint64_t)map << 4 * log_of(n);
                at += n / 4;
            }
            node = 2 * node + skip;
            continue;
        }
        if (type == ALL_FROZEN && n > 16) {
            list_frozen(own.of(n), n, paths);
            for (int i = 0; i < n / 4; i += 64) put_bits(code, at + i, n / 4 < 64 ? n / 4 : 64, 0);
        } else if (n == 16) {
            put_bits(code, at, 4, list_word<16>(types, node, *own.of(16), paths, &map));
        } else {
            put_bits(code, at, n / 4, list_leaf(type, n, NodeWords{own.of(n), n}, paths, &map));
        }
        while (node != 1 && (node & 1)) {
            const int count = n / 4 < 64 ? n / 4 : 64;
            at -= n / 4;
            for (int i = 0; i < n / 4; i += 64) {
                const uint64_t left = paths->moved(bits_at(code, at + i, count), map);
                put_bits(code, at + i, count, left ^ bits_at(code, at + n / 4 + i, count));
            }
            map = paths->moved((int)(left_maps >> 4 * log_of(n) & 15), map);
            node /= 2;
            n *= 2;
        }
        if (node == 1) return;
        left_maps = (left_maps & ~(15ull << 4 * log_of(n))) | (uint64_t)map << 4 * log_of(n);
        for (int i = 0; i < n / 16; ++i) {
            const uint32_t upper = paths->moved(own.of(2 * n)[32 * i], map);
            const uint32_t lower = paths->moved(own.of(2 * n)[32 * (i + n / 16)], map);
            own.of(n)[32 * i] = four_variable_nodes(upper, lower, four_ones((uint32_t)bits_at(code, at + 4 * i, 4)));
        }
        ++node;
        at += n / 4;
    }
}

struct ListCancellation {
    int size;
    GC_INLINE void operator()(const uint8_t* types, const PolarWarp& own) const {
        const int blocks = LANE_GROUP / size, slot = lane() & ~(LANE_GROUP - 1);
        for (int first = 0; first < LANE_GROUP; first += blocks) {
            uint32_t* root = own.of(own.rows);
            for (int w = 0; w < own.rows / 16; ++w)
                root[32 * w] = __shfl_sync(ALL_LANES, own.inputs[32 * w], slot | (first + group_lane() / size));
            Paths paths = {size, 0, false};
            paths.metric = paths.own() ? WORST : 0;
            list_block(types, own, &paths);
            int32_t best = paths.metric * LANE_GROUP + paths.own();
            for (int distance = 1; distance < size; distance *= 2) {
                const int32_t other = __shfl_xor_sync(ALL_LANES, best, distance);
                best = other < best ? other : best;
            }
            const int number = group_lane() - first;  // of the block that this thread's lane is
            const bool mine = number >= 0 && number < blocks;
            const int head = slot | (mine ? number * size : 0);
            const int from = head + __shfl_sync(ALL_LANES, best, head) % LANE_GROUP;
            for (int k = 0; k < code_words(own.rows); ++k) {
                const uint64_t bits = __shfl_sync(ALL_LANES, own.of_paths[32 * k], from);
                if (mine) own.code[32 * k] = bits;
            }
        }
    }
};

}  // namespace

// As polar_encode, for tiles of less than 8 levels.
GC_KERNEL(polar_encode_list)(const float* x, int64_t n, double scale, const int8_t* samples, const DeviceTile* tiles,
                             const PolarClass* classes, const uint16_t* ranks, uint8_t* workspace, uint8_t* words,
                             uint64_t* products, int64_t parts, int64_t list_size) {
    GC_DYNAMIC_SHARED(uint8_t, types);
    GC_SHARED(PolarShared, shared);
    const DeviceSource source = {x, n, (float)scale, samples};
    const ListCancellation encode = {(int)list_size};
    encode_tile(tiles, parts, source, classes, ranks, true, workspace, shared.words[warp()], types, words, products,
                encode);
}
GC_REGISTER(polar_encode_list)
