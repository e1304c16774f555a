// Polar's plan: a payload, which may be any bytes, to entries (decode_into of gcompress/compressors/polar/coding.py).
#ifndef GCOMPRESS_POLAR_PLAN_DECOMPRESS_H
#define GCOMPRESS_POLAR_PLAN_DECOMPRESS_H

#include "../turn.h"
#include "code.h"
#include "factors.h"
#include "header.h"

namespace {

// Everything about a payload but its product, made ready before anything is written.
struct RestDecoder {
    int threads;
    const PlanTables* tables;
    Header header;
    WordDecoder words;
    float *before, *turned, *scales;
    int64_t numel;

    bool set(int threads_, const PlanTables* tables_, const uint8_t* payload, int64_t nbytes, int64_t numel_,
             int64_t block, Room* room) {
        threads = threads_;
        tables = tables_;
        numel = numel_;
        if (!read_header(tables, payload, nbytes, numel, block, &header, room)) return false;
        before = header.apart ? room->take<float>(header.outliers.count) : 0;
        turned = header.turned ? room->take<float>(numel + 16) : 0;
        scales = header.turned ? room->take<float>(ceil_div(numel, TURN_BLOCK)) : 0;
        return header.spending.class_count == 0 ? !room->full() : words.set(threads, tables, &header.spending, room);
    }

    void decode(bool add, float* out) {
        if (header.turned) {
            memcpy(scales, header.scales, (size_t)ceil_div(numel, TURN_BLOCK) * sizeof(float));
            words.decode(header.words, false, turned);
            if (add)
                polar_turn_blocks_back<true>(turned, numel, header.seed, scales, out);
            else
                polar_turn_blocks_back<false>(turned, numel, header.seed, scales, out);
            return;
        }
        const Outliers& apart = header.outliers;
        for (int64_t k = 0; header.apart && add && k < apart.count;
             ++k) {  // its two parts are added to each other first
            before[k] = out[apart.places[k]];
            out[apart.places[k]] = 0.0f;
        }
        if (header.spending.class_count)
            words.decode(header.words, add, out);
        else if (add)
            for (int64_t i = 0; i < numel; ++i) out[i] += header.constant;
        else
            for (int64_t i = 0; i < numel; ++i) out[i] = header.constant;
        if (!header.apart) return;
        const LimitFactors factors(tables, header.spending.layout);
        for (int64_t k = 0; k < apart.count; ++k) {
            float* target = out + apart.places[k];
            const float whole = saturated(*target + apart.coarse(factors, k));
            *target = add ? before[k] + whole : whole;
        }
    }
};

// GC_OK, or GC_BAD_INDEX, with nothing written, where the payload contradicts itself or the workspace is too small.
inline int polar_decompress_into(int threads, const PlanTables* tables, const uint8_t* payload, int64_t nbytes,
                                 int64_t numel, int64_t block, bool add, uint8_t* workspace, int64_t workspace_bytes,
                                 float* out) {
    Room room = room_of(workspace, workspace_bytes);
    RestDecoder rest;
    if (nbytes < SMALLEST_PAYLOAD) return GC_BAD_INDEX;
    if (!(payload[0] & PRODUCT)) {
        if (!rest.set(threads, tables, payload, nbytes, numel, block, &room)) return GC_BAD_INDEX;
        rest.decode(add, out);
        return GC_OK;
    }
    Factors factors;
    ProductRows product;
    const int64_t size = unpack_factors(payload, nbytes, numel, &factors, &room);
    if (size == 0 || !product.set(&factors, &room)) return GC_BAD_INDEX;
    if (!rest.set(threads, tables, payload, nbytes - size, numel, block, &room)) return GC_BAD_INDEX;
    float* whole = add ? room.take<float>(numel) : out;
    if (room.full()) return GC_BAD_INDEX;
    rest.decode(false, whole);
    add_product(product, whole);
    for (int64_t i = 0; add && i < numel; ++i) out[i] += whole[i];
    return GC_OK;
}

}  // namespace
#endif
