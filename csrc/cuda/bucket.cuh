// Encoders and decoders of methods that give each bucket a scale and each entry a code of a few bits.
//
// Encoding a block takes a tile of 4096 entries to shared memory once, so for buckets up to 4096 entries (several to a
// tile) x is read once: 4 bytes read and bits / 8 written an entry, scales besides. A larger bucket is reduced
// tile by tile, its partial results are merged in order, and x is read again for the codes: 8 bytes an entry.
// Decoding reads bits / 8 bytes and writes 4 an entry, or reads 4 besides to add.
//
// A Method has a Scale, `stages`, what each `uses`, `add` (an entry to a thread's Partial), `finish` (a bucket's Partial to its Scale), `header`,
// `width`, `packed`, `code` and `value`. Sixteen lanes reduce a bucket: the lanes of an ordered sum.
#ifndef GCOMPRESS_CUDA_BUCKET_CUH
#define GCOMPRESS_CUDA_BUCKET_CUH

#include "device.cuh"

namespace {

enum { SMALLEST_BUCKET = 8, MOST_BUCKETS = TILE / SMALLEST_BUCKET };
// What a launch does: everything for buckets within a tile; or one of the three steps for larger ones.
enum { STEP_ALL = 0, STEP_REDUCE = 1, STEP_CODE = 2 };

struct Partial {
    double sum[2];
    int64_t count;
    int32_t low, high;
};

GC_INLINE Partial no_partial() {
    const Partial none = {{0.0, 0.0}, 0, 0, 0};
    return none;
}

GC_INLINE void merge(Partial* all, const Partial& other) {
    all->sum[0] += other.sum[0];
    all->sum[1] += other.sum[1];
    all->count += other.count;
    all->low = other.low < all->low ? other.low : all->low;
    all->high = other.high > all->high ? other.high : all->high;
}

// What a method's reduction uses of a Partial: the rest need not be passed on.
enum { USES_SUMS = 1, USES_COUNT = 2, USES_RANGE = 4 };

// Of the sixteen lanes of a half warp, in the order of an ordered sum; the first lane has the result.
GC_INLINE Partial folded(Partial partial, int uses) {
    for (int half = HALF_WARP / 2; half > 0; half /= 2) {
        Partial other = no_partial();
        if (uses & USES_SUMS) {
            other.sum[0] = __shfl_down_sync(ALL_LANES, partial.sum[0], half, HALF_WARP);
            other.sum[1] = __shfl_down_sync(ALL_LANES, partial.sum[1], half, HALF_WARP);
        }
        if (uses & USES_COUNT) other.count = __shfl_down_sync(ALL_LANES, partial.count, half, HALF_WARP);
        if (uses & USES_RANGE) {
            other.low = __shfl_down_sync(ALL_LANES, partial.low, half, HALF_WARP);
            other.high = __shfl_down_sync(ALL_LANES, partial.high, half, HALF_WARP);
        }
        merge(&partial, other);
    }
    return partial;
}

// The entries of a thread block: whole buckets, or a part of one.
struct BucketTile {
    int64_t first, bucket;  // bucket: number of the first one
    int count, buckets;     // count: 0 behind the end of a last bucket that is short
};

GC_INLINE int64_t chunks_of(int64_t bucket) { return (bucket + TILE - 1) / TILE; }

GC_INLINE BucketTile bucket_tile(int64_t n, int64_t bucket) {
    BucketTile tile;
    if (bucket <= TILE) {
        const int64_t per = TILE / bucket;
        tile.bucket = (int64_t)blockIdx.x * per;
        tile.first = tile.bucket * bucket;
        tile.count = (int)min64(per * bucket, n - tile.first);
        tile.buckets = (int)((tile.count + bucket - 1) / bucket);
        return tile;
    }
    const int64_t chunks = chunks_of(bucket);
    tile.bucket = quotient(blockIdx.x, chunks);
    const int64_t offset = ((int64_t)blockIdx.x - tile.bucket * chunks) * TILE;
    tile.first = tile.bucket * bucket + offset;
    const int64_t count = min64(min64(TILE, bucket - offset), n - tile.first);
    tile.count = (int)(count > 0 ? count : 0);
    tile.buckets = 1;
    return tile;
}

template <class Scale>
struct BucketShared {
    float tile[TILE];
    Scale scales[MOST_BUCKETS];
    uint32_t bytes[TILE / 2 + 1];  // codes of up to 16 bits, and the word that store_bytes reads besides
};

// One lane's share of a bucket's reduction. A chunk of an ordered sum begins with a bucket or 4096 entries behind one.
template <class Method>
GC_INLINE Partial reduced(const Method& method, int stage, const float* x, int count,
                          const typename Method::Scale& scale) {
    Partial partial = no_partial();
    for (int i = (int)threadIdx.x & (HALF_WARP - 1); i < count; i += HALF_WARP)
        method.add(stage, x[i], scale, &partial);
    return folded(partial, method.uses(stage));
}

// A scale of words, from the first lane of each half warp.
template <class Scale>
GC_INLINE Scale from_first_lane(Scale scale) {
    union {
        Scale scale;
        uint32_t words[sizeof(Scale) / 4];
    } both = {scale};
    for (int word = 0; word < (int)(sizeof(Scale) / 4); ++word)
        both.words[word] = __shfl_sync(ALL_LANES, both.words[word], 0, HALF_WARP);
    return both.scale;
}

template <class Method>
GC_INLINE void scale_buckets(const Method& method, const BucketTile& tile, int64_t bucket,
                             BucketShared<typename Method::Scale>* shared, typename Method::Scale* scales) {
    // A warp takes two buckets at a time; lanes without one go along, since they all meet in the shuffles.
    for (int pair = 2 * warp(); pair < tile.buckets; pair += 2 * WARPS) {
        const int mine = pair + lane() / HALF_WARP;
        const int start = (int)(mine * bucket);
        const int count = mine < tile.buckets ? (int)min64(bucket, tile.count - start) : 0;
        typename Method::Scale scale = typename Method::Scale();
        for (int stage = 0; stage < method.stages(); ++stage) {
            const Partial all = reduced(method, stage, shared->tile + start, count, scale);
            scale = method.finish(stage, all, count, scale);
            scale = from_first_lane(scale);
        }
        if (mine < tile.buckets && lane() % HALF_WARP == 0) {
            shared->scales[mine] = scale;
            if (method.width() == 0) scales[tile.bucket + mine] = scale;  // the codes are another kernel's
            method.header(tile.bucket + mine, scale);
        }
    }
}

// Eight entries a thread at a time, since eight codes fill whole bytes.
template <class Method>
GC_INLINE void code_tile(const Method& method, const BucketTile& tile, int64_t bucket,
                         BucketShared<typename Method::Scale>* shared, const Feedback& feedback) {
    const int width = method.width();
    uint8_t* bytes = (uint8_t*)shared->bytes;
    for (int i = 8 * (int)threadIdx.x; i < tile.count; i += 8 * THREADS) {
        const typename Method::Scale& scale = shared->scales[bucket > TILE ? 0 : (uint32_t)i / (uint32_t)bucket];
        uint64_t words[2] = {0, 0};
        for (int j = 0; j < 8; ++j) {
            if (i + j >= tile.count) break;
            const float value = shared->tile[i + j];
            const uint32_t code = method.code(value, tile.first + i + j, scale);
            if (width == 16)
                words[j / 4] |= (uint64_t)code << (16 * (j & 3));
            else
                words[0] |= (uint64_t)code << (width * j);
            if (feedback.fresh) feedback.keep(tile.first + i + j, value, method.value(code, scale));
        }
        for (int byte = 0; byte < width; ++byte)
            bytes[i / 8 * width + byte] = (uint8_t)(words[byte / 8] >> (8 * (byte & 7)));
    }
}

template <class Method>
GC_INLINE void encode_buckets(const Method& method, int64_t n, int64_t bucket, const Source& source,
                              const Feedback& feedback, int64_t step, int64_t stage, Partial* partials,
                              typename Method::Scale* scales) {
    typedef typename Method::Scale Scale;
    GC_SHARED(BucketShared<Scale>, shared);
    const BucketTile tile = bucket_tile(n, bucket);
    load_tile(source, tile.first, tile.count, shared.tile);
    __syncthreads();
    if (step == STEP_REDUCE) {
        if (warp() != 0) return;  // sixteen lanes add up; other blocks of the processor load meanwhile
        const Scale scale = stage > 0 ? scales[tile.bucket] : Scale();
        const Partial all = reduced(method, (int)stage, shared.tile, lane() < HALF_WARP ? tile.count : 0, scale);
        if (threadIdx.x == 0) partials[blockIdx.x] = all;
        return;
    }
    if (step == STEP_ALL)
        scale_buckets(method, tile, bucket, &shared, scales);
    else if (threadIdx.x == 0)
        shared.scales[0] = scales[tile.bucket];
    if (method.width() == 0) return;
    __syncthreads();
    code_tile(method, tile, bucket, &shared, feedback);
    __syncthreads();
    const int64_t bytes = ((int64_t)tile.count * method.width() + 7) / 8;
    store_bytes(shared.bytes, bytes, method.packed() + tile.first / 8 * method.width());
}

// The scale of one large bucket a block, from its partial results in order.
template <class Method>
GC_INLINE void finish_buckets(const Method& method, int64_t n, int64_t bucket, int64_t stage, const Partial* partials,
                              typename Method::Scale* scales) {
    struct Some {
        Partial partials[THREADS];
    };
    GC_SHARED(Some, some);
    const int64_t number = blockIdx.x, chunks = chunks_of(bucket), count = min64(bucket, n - number * bucket);
    Partial all = no_partial();
    for (int64_t chunk = 0; chunk < chunks; chunk += THREADS) {
        const int here = (int)min64(THREADS, chunks - chunk);
        __syncthreads();  // the last ones are merged
        if ((int)threadIdx.x < here) some.partials[threadIdx.x] = partials[number * chunks + chunk + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < here && threadIdx.x == 0; ++i) merge(&all, some.partials[i]);
    }
    if (threadIdx.x != 0) return;
    const typename Method::Scale before = stage > 0 ? scales[number] : typename Method::Scale();
    scales[number] = method.finish((int)stage, all, count, before);
    if (stage + 1 == method.stages()) method.header(number, scales[number]);
}

// Four entries a thread, all of one bucket, since a bucket is a multiple of eight.
template <class Method>
GC_INLINE void decode_buckets(const Method& method, int64_t n, int64_t bucket, int64_t add, float* out) {
    const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (i >= n) return;
    const int size = (int)min64(4, n - i), width = method.width();
    const typename Method::Header header = method.header_of(quotient(i, bucket));
    const uint64_t codes = load_bits(method.packed(), i * width, size * width);
    const bool aligned = size == 4 && is_aligned(out + i, 16);
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (add && size == 4) load_four(out + i, aligned, values);
    for (int j = 0; j < 4; ++j) {  // a constant number of them stays in registers
        if (j >= size) continue;
        const float value = method.decoded((uint32_t)(codes >> (width * j)) & ((1u << width) - 1), header);
        if (add && size < 4) values[j] = out[i + j];
        values[j] = add ? values[j] + value : value;
        if (size < 4) out[i + j] = values[j];
    }
    if (size == 4) store_four(out + i, aligned, values);
}

}  // namespace

// The parameters that all encoders have, and the objects behind them.
#define GC_BUCKET_PARAMETERS                                                                                          \
    const float *x, const float *residual, float *fresh, uint32_t *poisoned, int64_t n, int64_t bucket, int64_t step, \
        int64_t stage, Partial *partials, void *scales, uint8_t *payload
#define GC_ENCODE_BUCKETS(Method, method)        \
    const Source source = {x, residual};         \
    const Feedback feedback = {fresh, poisoned}; \
    encode_buckets(method, n, bucket, source, feedback, step, stage, partials, (Method::Scale*)scales)
#define GC_FINISH_BUCKETS(Method, method)                             \
    (void)x, (void)residual, (void)fresh, (void)poisoned, (void)step; \
    finish_buckets(method, n, bucket, stage, partials, (Method::Scale*)scales)

#endif
