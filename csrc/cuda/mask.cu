// MaskSparse: the mask is the index. Behind select.cu (8 bytes an entry) the codes read 4 and write bits / 8; with
// Lloyd-Max levels a histogram reads 4 more. Decoding reads bits / 8 twice (kept entries are counted first), and writes
// 4 an entry, or reads 4 more to add.
#include "../arith/mask.h"
#include "select.cuh"

namespace {

const int FEW_CLASSES = 7;  // as many are added up in registers, more in shared memory

struct TileKeys {
    const float* tile;
    bool is_signed;
    GC_INLINE uint32_t operator()(int place) const { return key_of(tile[place], is_signed); }
};

struct MaskShared {
    float tile[TILE];
    KeptShared kept;
    uint32_t bytes[TILE / 4 + 1];
    uint64_t sums[256];
    uint32_t counts[256];
};

// The entries of a block's tile in shared memory, and which are kept; returns the rank of the first kept one.
template <class Shared>
GC_INLINE int64_t keep_tile(const Source& source, int64_t first, int count, bool is_signed, const Selection& selection,
                            const uint32_t* above, const uint32_t* equal, Shared* shared) {
    load_tile(source, first, count, shared->tile);
    __syncthreads();
    const TileKeys key_at = {shared->tile, is_signed};
    keep_places(key_at, count, selection, equal[blockIdx.x], &shared->kept);
    return kept_before(selection, above[blockIdx.x], equal[blockIdx.x]);
}

// Sums over the threads of a warp, added to one place by its first lane.
GC_INLINE void add_warp(uint32_t sum, uint32_t members, uint64_t* all, uint32_t* counts) {
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        members += __shfl_xor_sync(ALL_LANES, members, distance);
    }
    if (lane() == 0 && members > 0) {
        atomicAdd(all, (uint64_t)sum);
        atomicAdd(counts, members);
    }
}

}  // namespace

// The fixed magnitudes of dropped entries, 16 of them a bin.
GC_KERNEL(mask_histogram)(const float* x, const float* residual, int64_t n, int64_t is_signed,
                          const Selection* selection, const uint32_t* above, const uint32_t* equal,
                          uint32_t* histogram) {
    struct Shared {
        float tile[TILE];
        KeptShared kept;
        uint32_t bins[BINS];
    };
    GC_SHARED(Shared, shared);
    const Source source = {x, residual};
    const int64_t first = (int64_t)blockIdx.x * TILE;
    const int count = (int)min64(TILE, n - first);
    const MaskScale scale = mask_scale(selection->key);
    for (int bin = (int)threadIdx.x; bin < BINS; bin += THREADS) shared.bins[bin] = 0;
    keep_tile(source, first, count, is_signed != 0, *selection, above, equal, &shared);
    for (int place = (int)threadIdx.x; place < count; place += THREADS) {
        if (shared.kept.kept.has(place)) continue;
        atomicAdd(shared.bins + (fixed_magnitude(key_of(shared.tile[place], is_signed != 0), scale) >> 4), 1u);
    }
    __syncthreads();
    for (int bin = (int)threadIdx.x; bin < BINS; bin += THREADS)
        if (shared.bins[bin]) atomicAdd(histogram + bin, shared.bins[bin]);
}
GC_REGISTER(mask_histogram)

// Lloyd's iteration, a class a thread; writes the class of every bin. One block. `members`, `sums`: workspaces of
// BINS + 1 numbers, those below each bin.
GC_KERNEL(mask_lloyd)(const uint32_t* histogram, int64_t bits, int64_t is_signed, int64_t* members, int64_t* sums,
                      uint8_t* class_of_bin) {
    struct Shared {
        double level[256];
        int edge[257];
        uint32_t changed;
    };
    GC_SHARED(Shared, shared);
    const MaskShape shape = mask_shape((int)bits, is_signed != 0);
    const int m = (int)threadIdx.x;
    if (m == 0) {
        members[0] = sums[0] = 0;
        for (int bin = 0; bin < BINS; ++bin) {
            members[bin + 1] = members[bin] + histogram[bin];
            sums[bin + 1] = sums[bin] + (int64_t)histogram[bin] * (16 * bin + 8);
        }
    }
    if (m <= shape.half) {
        shared.level[m] = lloyd_start(m, shape.steps);
        shared.edge[m] = 0;
    }
    if (m == 0) {
        shared.edge[shape.half + 1] = BINS;
        shared.changed = 0;
    }
    __syncthreads();
    for (int round = 0; round < LLOYD_ROUNDS; ++round) {
        if (m >= 1 && m <= shape.half) {
            const int border = lloyd_border(shared.level[m - 1], shared.level[m]);
            if (border != shared.edge[m]) atomicOr(&shared.changed, 1u);
            shared.edge[m] = border;
        }
        __syncthreads();
        if (!shared.changed) break;
        __syncthreads();
        if (m == 0) shared.changed = 0;
        if (m >= (is_signed ? 1 : 0) && m <= shape.half) {
            const int64_t inside = members[shared.edge[m + 1]] - members[shared.edge[m]];
            if (inside > 0) shared.level[m] = lloyd_level(sums[shared.edge[m + 1]] - sums[shared.edge[m]], inside);
        }
        __syncthreads();
    }
    if (m > shape.half) return;
    for (int bin = shared.edge[m]; bin < shared.edge[m + 1]; ++bin) class_of_bin[bin] = (uint8_t)m;
}
GC_REGISTER(mask_lloyd)

// Codes and kept values, and the sums behind the levels. A null `class_of_bin`: classes are linear.
GC_KERNEL(mask_codes)(const float* x, const float* residual, int64_t n, int64_t k, int64_t bits, int64_t is_signed,
                      const Selection* selection, const uint32_t* above, const uint32_t* equal,
                      const uint8_t* class_of_bin, uint64_t* sums, uint64_t* counts, uint8_t* payload) {
    GC_SHARED(MaskShared, shared);
    const Source source = {x, residual};
    const MaskShape shape = mask_shape((int)bits, is_signed != 0);
    const MaskScale scale = mask_scale(selection->key);
    const int64_t first = (int64_t)blockIdx.x * TILE;
    const int count = (int)min64(TILE, n - first);
    uint8_t* values = payload + 4 * shape.sent;
    shared.sums[threadIdx.x] = shared.counts[threadIdx.x] = 0;
    const int64_t before = keep_tile(source, first, count, is_signed != 0, *selection, above, equal, &shared);

    uint32_t own_sums[FEW_CLASSES + 1] = {0};  // of at most sixteen entries
    uint32_t own_counts[FEW_CLASSES + 1] = {0};
    const bool few = shape.sent <= FEW_CLASSES;
    uint8_t* bytes = (uint8_t*)shared.bytes;
    for (int start = 8 * (int)threadIdx.x; start < count; start += 8 * THREADS) {
        uint64_t word = 0;
        for (int j = 0; j < 8 && start + j < count; ++j) {
            const int place = start + j;
            const float value = shared.tile[place];
            if (shared.kept.kept.has(place)) {
                store_float(values + 4 * (before + shared.kept.kept.rank(place)), value);
                word |= (uint64_t)shape.codes << (bits * j);
                continue;
            }
            const int32_t fixed = fixed_magnitude(key_of(value, is_signed != 0), scale);
            const int32_t m = class_of_bin ? class_of_bin[fixed >> 4] : linear_class(fixed, shape.steps, shape.half);
            const int32_t minus = is_signed ? (int32_t)float_bits(value) >> 31 : 0;
            word |= (uint64_t)(shape.centre + ((m ^ minus) - minus)) << (bits * j);
            if (!few) {
                atomicAdd(shared.sums + m, (uint64_t)fixed);
                atomicAdd(shared.counts + m, 1u);
            }
            for (int s = 0; few && s <= FEW_CLASSES; ++s) {  // so that they stay in registers
                if (s > shape.half) break;
                own_sums[s] += s == m ? (uint32_t)fixed : 0;
                own_counts[s] += s == m;
            }
        }
        for (int byte = 0; byte < bits; ++byte) bytes[start / 8 * bits + byte] = (uint8_t)(word >> (8 * byte));
    }
    for (int m = 0; few && m <= FEW_CLASSES; ++m) {
        if (m > shape.half) break;
        add_warp(own_sums[m], own_counts[m], shared.sums + m, shared.counts + m);
    }
    __syncthreads();
    store_bytes(shared.bytes, ((int64_t)count * bits + 7) / 8, values + 4 * k + first / 8 * bits);
    if (!shared.counts[threadIdx.x]) return;
    atomicAdd(sums + threadIdx.x, shared.sums[threadIdx.x]);
    atomicAdd(counts + threadIdx.x, (uint64_t)shared.counts[threadIdx.x]);
}
GC_REGISTER(mask_codes)

GC_KERNEL(mask_levels)(const uint64_t* sums, const uint64_t* counts, int64_t bits, int64_t is_signed,
                       const Selection* selection, uint8_t* payload) {
    const MaskShape shape = mask_shape((int)bits, is_signed != 0);
    const int s = (int)threadIdx.x, m = is_signed ? s + 1 : s;
    if (s >= shape.sent) return;
    store_float(payload + 4 * s,
                mask_level((int64_t)sums[m], (int64_t)counts[m], mask_scale(selection->key).threshold));
}
GC_REGISTER(mask_levels)

// The kept entries of each tile, by their codes.
GC_KERNEL(mask_count)(const uint8_t* packed, int64_t n, int64_t bits, uint32_t* counts) {
    GC_SHARED(ScanShared, scan);
    const int64_t first = (int64_t)blockIdx.x * TILE;
    uint32_t own = 0, total;
    for (int64_t i = first + 4 * threadIdx.x; i < min64(n, first + TILE); i += 4 * THREADS) {
        const int size = (int)min64(4, n - i);
        const uint64_t codes = load_bits(packed, i * bits, (int)(size * bits));
        const uint64_t mask = (1u << bits) - 1;
        for (int j = 0; j < size; ++j) own += (codes >> (bits * j) & mask) == mask;
    }
    scanned(own, &scan, &total);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}
GC_REGISTER(mask_count)

GC_KERNEL(mask_decode)(const uint8_t* payload, int64_t n, int64_t k, int64_t bits, int64_t is_signed,
                       const uint32_t* before, const Selection* selection, int64_t add, uint32_t* wrong, float* out) {
    struct Shared {
        TileBits kept;
        ScanShared scan;
        float table[256];
    };
    GC_SHARED(Shared, shared);
    const MaskShape shape = mask_shape((int)bits, is_signed != 0);
    const uint8_t* values = payload + 4 * shape.sent;
    const uint8_t* packed = values + 4 * k;
    const int64_t first = (int64_t)blockIdx.x * TILE;
    const int count = (int)min64(TILE, n - first), code = (int)threadIdx.x;
    float level = 0.0f;
    if (code > shape.centre && code < shape.codes) level = load_float(payload + 4 * (code - shape.centre - 1));
    if (is_signed && code < shape.centre) level = -load_float(payload + 4 * (shape.centre - 1 - code));
    if (!is_signed && code < shape.sent) level = load_float(payload + 4 * code);
    shared.table[code] = level;
    for (int round = 0; round < ROUNDS; ++round) {
        const int place = round * THREADS + (int)threadIdx.x;
        bool kept = false;
        if (place < count) kept = load_bits(packed, (first + place) * bits, (int)bits) == (uint64_t)shape.codes;
        const uint32_t ballot = __ballot_sync(ALL_LANES, kept);
        if (lane() == 0) shared.kept.words[place >> 5] = ballot;
    }
    rank_bits(&shared.kept, &shared.scan);
    if (blockIdx.x == 0 && threadIdx.x == 0 && selection->total != k) atomicOr(wrong, 1u);
    for (int place = (int)threadIdx.x; place < count; place += THREADS) {
        float value;
        if (shared.kept.has(place)) {
            const int64_t rank = (int64_t)before[blockIdx.x] + shared.kept.rank(place);
            value = rank < k ? load_float(values + 4 * rank) : 0.0f;
        } else {
            value = shared.table[load_bits(packed, (first + place) * bits, (int)bits)];
        }
        out[first + place] = add ? out[first + place] + value : value;
    }
}
GC_REGISTER(mask_decode)
