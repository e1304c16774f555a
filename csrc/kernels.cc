// The table of kernels, compiled once per instruction set (GC_ISA); see simd.h for what that
// forbids. The arithmetic that decides bytes is single-precision add, multiply and divide in a
// fixed order, or integer: -ffp-contract=off keeps it so.
#include "gcompress.h"
#include "cast.h"
#include "eden.h"
#include "mask.h"
#include "natural.h"
#include "qsgd.h"
#include "quantize.h"
#include "sign.h"
#include "ternary.h"
#include "topk.h"

namespace {

// From run-time to compile-time parameters.
#define GC_FOR_BITS(bits, call)            \
    switch (bits) {                        \
        case 1: { enum { B = 1 }; call; } break; \
        case 2: { enum { B = 2 }; call; } break; \
        case 3: { enum { B = 3 }; call; } break; \
        case 4: { enum { B = 4 }; call; } break; \
        case 5: { enum { B = 5 }; call; } break; \
        case 6: { enum { B = 6 }; call; } break; \
        case 7: { enum { B = 7 }; call; } break; \
        default: { enum { B = 8 }; call; } break; \
    }

void quantize_encode(const float* x, int64_t n, int bits, int64_t bucket, int stochastic, uint32_t seed,
                     uint8_t* payload) {
    GC_FOR_BITS(bits, (quantize_encode_bits<B>(x, n, bucket, stochastic != 0, seed, payload)))
}

void quantize_decode(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (quantize_decode_bits<B, true>(payload, n, bucket, out)))
    else
        GC_FOR_BITS(bits, (quantize_decode_bits<B, false>(payload, n, bucket, out)))
}

void mask_encode(const float* x, int64_t n, int64_t k, int bits, int is_signed, int lloyd, uint32_t* workspace,
                 int64_t capacity, uint8_t* payload) {
    if (is_signed && lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, true>(x, n, k, workspace, capacity, payload)))
    else if (is_signed)
        GC_FOR_BITS(bits, (mask_encode_form<B, true, false>(x, n, k, workspace, capacity, payload)))
    else if (lloyd)
        GC_FOR_BITS(bits, (mask_encode_form<B, false, true>(x, n, k, workspace, capacity, payload)))
    else
        GC_FOR_BITS(bits, (mask_encode_form<B, false, false>(x, n, k, workspace, capacity, payload)))
}

int mask_decode(const uint8_t* payload, int64_t n, int64_t k, int bits, int is_signed, int add, float* out) {
    int result = GC_OK;
    if (is_signed && add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, true>(payload, n, k, out)))
    else if (is_signed)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, true, false>(payload, n, k, out)))
    else if (add)
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, true>(payload, n, k, out)))
    else
        GC_FOR_BITS(bits, (result = mask_decode_form<B, false, false>(payload, n, k, out)))
    return result;
}

int topk_decode(const uint8_t* payload, int64_t n, int64_t k, int form, int width, int add, float* out) {
    return add ? topk_decode_form<true>(payload, n, k, form, width, out)
               : topk_decode_form<false>(payload, n, k, form, width, out);
}

void eden_encode(const float* x, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail, int unbiased,
                 uint32_t seed, const float* levels, uint8_t* payload) {
    GC_FOR_BITS(bits, (eden_encode_bits<B>(x, n, block, sent, sent_tail, unbiased != 0, seed, levels, payload)))
}

void eden_decode(const uint8_t* payload, int64_t n, int bits, int64_t block, int64_t sent, int64_t sent_tail,
                 const float* levels, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (eden_decode_bits<B, true>(payload, n, block, sent, sent_tail, levels, out)))
    else
        GC_FOR_BITS(bits, (eden_decode_bits<B, false>(payload, n, block, sent, sent_tail, levels, out)))
}

void qsgd_encode(const float* x, int64_t n, int bits, int64_t bucket, int largest_norm, uint32_t seed,
                 uint8_t* payload) {
    GC_FOR_BITS(bits, (qsgd_encode_bits<B>(x, n, bucket, largest_norm != 0, seed, payload)))
}

void qsgd_decode(const uint8_t* payload, int64_t n, int bits, int64_t bucket, int add, float* out) {
    if (add)
        GC_FOR_BITS(bits, (qsgd_decode_bits<B, true>(payload, n, bucket, out)))
    else
        GC_FOR_BITS(bits, (qsgd_decode_bits<B, false>(payload, n, bucket, out)))
}

}  // namespace

#define GC_JOIN_(a, b) a##b
#define GC_JOIN(a, b) GC_JOIN_(a, b)

extern "C" {
extern const gc_kernels GC_JOIN(gc_kernels_, GC_ISA);
const gc_kernels GC_JOIN(gc_kernels_, GC_ISA) = {quantize_encode, quantize_decode, mask_encode,
                                                  mask_decode,     topk_encode,     topk_decode,
                                                  sign_encode,     sign_decode,     cast_encode,
                                                  cast_decode,     bf16_encode,     bf16_decode,
                                                  eden_encode,     eden_decode,     qsgd_encode,
                                                  qsgd_decode,     ternary_encode,  ternary_decode,
                                                  natural_encode,  natural_decode};
}
