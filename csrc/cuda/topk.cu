// TopK and Threshold: values and one of four indices, and back. Encoding, behind select.cu, moves what is sent and
// twice its index (words are put together in a workspace), Threshold 4 bytes read an entry besides. Decoding writes
// 4 bytes of zeros an entry (not when it adds) and moves what was sent, places of 4 bytes, and 8 k.
#include "select.cuh"

namespace {

enum { INDEX_BITMAP = 0, INDEX_FIXED = 1, INDEX_GAPS = 2, INDEX_PLACES = 3 };
const uint32_t NOWHERE = 0xffffffffu;  // no index: there are fewer entries

// A number of `width` bits into a bit stream of words that begin as zeros.
GC_INLINE void put_bits(uint32_t* words, int64_t first, int width, uint32_t value) {
    const int shift = (int)(first & 31);
    const uint64_t shifted = (uint64_t)value << shift;
    if (width == 0) return;
    atomicOr(words + (first >> 5), (uint32_t)shifted);
    if (shift + width > 32) atomicOr(words + (first >> 5) + 1, (uint32_t)(shifted >> 32));
}

struct KeyAt {
    Source source;
    Candidates candidates;
    GC_INLINE uint32_t operator()(int place) const { return key_of<true>(source.at(candidates.entry(place))); }
};

// Where a payload goes. `low`, `high`: words of the index, zeros at first; `bitmap`: the index itself where it is one.
struct Target {
    int64_t form, width;
    uint8_t *values, *bitmap;
    uint32_t *low, *high;
    // An entry that is the `rank`-th of those kept. `tile`: 4096 bits that begin with entry `first`.
    GC_INLINE void send(int64_t rank, int64_t entry, float value, int64_t first, uint32_t* tile) const {
        store_float(values + 4 * rank, value);
        if (form == INDEX_BITMAP) {
            const int bit = (int)(entry - first);
            atomicOr(tile + (bit >> 5), 1u << (bit & 31));
            return;
        }
        const uint32_t mask = (uint32_t)((1ull << width) - 1);
        put_bits(low, rank * width, (int)width, (uint32_t)entry & mask);
        if (form == INDEX_GAPS) put_bits(high, (entry >> width) + rank, 1, 1);
    }
    // What of a bitmap begins with entry `first`.
    GC_INLINE void send_bitmap(int64_t first, int64_t entries, const uint32_t* tile) const {
        if (form != INDEX_BITMAP) return;
        __syncthreads();
        store_bytes(tile, (entries + 7) / 8, bitmap + first / 8);
    }
};

struct OutputShared {
    KeptShared kept;
    uint32_t bitmap[TILE_WORDS + 1];
};

GC_INLINE void clear_bitmap(OutputShared* shared) {
    if (threadIdx.x <= TILE_WORDS) shared->bitmap[threadIdx.x] = 0;
}

struct StretchKeys {
    Source source;
    int64_t first;
    GC_INLINE uint32_t operator()(int place) const { return key_of<true>(source.at(first + place)); }
};

}  // namespace

GC_KERNEL(topk_output)(const float* x, const float* residual, float* fresh, int64_t n, int64_t form, int64_t width,
                       const Selection* selection, const uint16_t* list, const uint32_t* counts, const uint32_t* above,
                       const uint32_t* equal, uint8_t* values, uint8_t* bitmap, uint32_t* low, uint32_t* high) {
    GC_SHARED(OutputShared, shared);
    const Target target = {form, width, values, bitmap, low, high};
    const KeyAt key_at = {{x, residual}, {list, counts, n}};
    const Candidates& candidates = key_at.candidates;
    clear_bitmap(&shared);
    const uint32_t equal_before = equal ? equal[blockIdx.x] : 0;
    keep_places(key_at, candidates.count(), *selection, equal_before, &shared.kept);
    const int64_t before = kept_before(*selection, above[blockIdx.x], equal_before);
    for (int place = (int)threadIdx.x; place < candidates.count(); place += THREADS) {
        if (!shared.kept.kept.has(place)) continue;
        const int64_t rank = before + shared.kept.kept.rank(place), entry = candidates.entry(place);
        const float value = key_at.source.at(entry);
        if (fresh) fresh[entry] = value - value;
        target.send(rank, entry, value, candidates.first(), shared.bitmap);
    }
    target.send_bitmap(candidates.first(), min64(TILE, n - candidates.first()), shared.bitmap);
}
GC_REGISTER(topk_output)

// A block for each chunk, of which it keeps `kept`; of the last one what is left of k.
GC_KERNEL(chunk_output)(const float* x, const float* residual, float* fresh, uint32_t* poisoned, int64_t n, int64_t k,
                        int64_t chunk, int64_t kept, int64_t form, int64_t width, uint8_t* values, uint8_t* bitmap,
                        uint32_t* low, uint32_t* high) {
    struct Shared {
        SelectShared select;
        OutputShared output;
    };
    GC_SHARED(Shared, shared);
    const Target target = {form, width, values, bitmap, low, high};
    const Source source = {x, residual};
    const Feedback feedback = {fresh, poisoned};
    const int64_t first = blockIdx.x * chunk, end = min64(n, first + chunk);
    int64_t before = blockIdx.x * kept;
    uint32_t equal_before = 0;
    select_in_block(StretchKeys{source, first}, (int)(end - first), end < n ? kept : k - before, &shared.select);
    KeptShared& bits = shared.output.kept;
    for (int64_t tile = first; tile < end; tile += TILE) {
        const int count = (int)min64(TILE, end - tile);
        clear_bitmap(&shared.output);
        const uint32_t found =
            keep_places(StretchKeys{source, tile}, count, shared.select.selection, equal_before, &bits);
        for (int place = (int)threadIdx.x; place < count; place += THREADS) {
            const int64_t entry = tile + place;
            const float value = source.at(entry);
            const bool sent = bits.kept.has(place);
            if (fresh) feedback.keep(entry, value, sent ? value : 0.0f);
            if (sent) target.send(before + bits.kept.rank(place), entry, value, tile, shared.output.bitmap);
        }
        before += found;
        equal_before += bits.equal.before[TILE_WORDS - 1] + (uint32_t)__popc(bits.equal.words[TILE_WORDS - 1]);
        target.send_bitmap(tile, count, shared.output.bitmap);
        __syncthreads();
    }
}
GC_REGISTER(chunk_output)

// The bits set in each tile of 4096 of a bitmap of `bytes` bytes.
GC_KERNEL(bitmap_count)(const uint8_t* bitmap, int64_t bytes, uint32_t* counts) {
    GC_SHARED(ScanShared, scan);
    const int64_t first = (int64_t)blockIdx.x * (TILE / 8) + 2 * threadIdx.x;
    uint32_t own = 0, total;
    for (int64_t i = first; i < min64(bytes, first + 2); ++i) own += (uint32_t)__popc(bitmap[i]);
    scanned(own, &scan, &total);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}
GC_REGISTER(bitmap_count)

// The places that the first k bits of a bitmap stand for; `gaps`: with low bits, as Elias and Fano have it.
GC_KERNEL(bitmap_places)(const uint8_t* bitmap, int64_t bytes, const uint32_t* before, const uint8_t* low,
                         int64_t width, int64_t gaps, int64_t k, uint32_t* places) {
    struct Shared {
        TileBits bits;
        ScanShared scan;
    };
    GC_SHARED(Shared, shared);
    const int64_t first = (int64_t)blockIdx.x * (TILE / 8);
    if (threadIdx.x < TILE_WORDS) {
        uint32_t word = 0;
        for (int byte = 0; byte < 4; ++byte) {
            const int64_t i = first + 4 * threadIdx.x + byte;
            if (i < bytes) word |= (uint32_t)bitmap[i] << (8 * byte);
        }
        shared.bits.words[threadIdx.x] = word;
    }
    rank_bits(&shared.bits, &shared.scan);
    for (int round = 0; round < ROUNDS; ++round) {
        const int bit = round * THREADS + (int)threadIdx.x;
        if (!shared.bits.has(bit)) continue;
        const int64_t rank = (int64_t)before[blockIdx.x] + shared.bits.rank(bit);
        if (rank >= k) continue;
        uint64_t place = (uint64_t)(8 * first + bit);
        if (gaps) place = (place - (uint64_t)rank) << width | load_bits(low, rank * width, (int)width);
        places[rank] = place < NOWHERE ? (uint32_t)place : NOWHERE;
    }
}
GC_REGISTER(bitmap_places)

// `kept`: of each chunk, in which the places are; 0 if they are those of the tensor.
GC_KERNEL(fixed_places)(const uint8_t* index, int64_t k, int64_t width, int64_t kept, uint32_t* places) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= k) return;
    const uint64_t chunk = kept ? (uint64_t)quotient(i, kept) << width : 0;
    const uint64_t place = chunk + load_bits(index, i * width, (int)width);
    places[i] = place < NOWHERE ? (uint32_t)place : NOWHERE;
}
GC_REGISTER(fixed_places)

// Values to their places, which must be k (`selection` null: they are), below n and in order.
GC_KERNEL(topk_place)(const uint8_t* values, const uint32_t* places, int64_t n, int64_t k, const Selection* selection,
                      int64_t add, uint32_t* wrong, float* out) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t count = selection ? selection->total : k;
    if (i == 0 && count != k) atomicOr(wrong, 1u);
    if (i >= min64(count, k)) return;
    const uint32_t place = places[i];
    if (place >= n || (i > 0 && places[i - 1] >= place)) {
        atomicOr(wrong, 1u);
        return;
    }
    const float value = load_float(values + 4 * i);
    out[place] = add ? out[place] + value : value;
}
GC_REGISTER(topk_place)

// Hybrid: what is left beside the outliers, in their place; and both together. 12 bytes an entry.
GC_KERNEL(hybrid_split)(const float* x, int64_t n, float* outliers) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) outliers[i] = outliers[i] == 0.0f ? x[i] : 0.0f;
}
GC_REGISTER(hybrid_split)

GC_KERNEL(hybrid_merge)(const float* outliers, int64_t n, float* rest) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) rest[i] = outliers[i] == 0.0f ? rest[i] : outliers[i];
}
GC_REGISTER(hybrid_merge)
