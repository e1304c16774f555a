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

    void decode(int mode, float* out) {
        if (mode == ADD) return decode_by<ADD>(out);
        return mode == SUBTRACT ? decode_by<SUBTRACT>(out) : decode_by<REPLACE>(out);
    }
    template <int mode>
    void decode_by(float* out) {
        if (header.turned) {
            memcpy(scales, header.scales, (size_t)ceil_div(numel, TURN_BLOCK) * sizeof(float));
            words.decode(header.words, REPLACE, turned);
            return polar_turn_blocks_back<mode>(turned, numel, header.seed, scales, out);
        }
        const Outliers& apart = header.outliers;
        for (int64_t k = 0; header.apart && mode != REPLACE && k < apart.count; ++k) {
            before[k] = out[apart.places[k]];  // its two parts are added to each other first
            out[apart.places[k]] = 0.0f;
        }
        if (header.spending.class_count)
            words.decode(header.words, mode, out);
        else
            for (int64_t i = 0; i < numel; ++i) out[i] = put_value<mode>(out[i], header.constant);
        if (!header.apart) return;
        const LimitFactors factors(tables, header.spending.layout);
        for (int64_t k = 0; k < apart.count; ++k) {
            float* target = out + apart.places[k];
            const float fine = mode == SUBTRACT ? -*target : *target;
            *target = put_value<mode>(mode == REPLACE ? 0.0f : before[k], saturated(fine + apart.coarse(factors, k)));
        }
    }
};

// What a matrix is, given what it is without its product.
template <int mode>
void put_with_product(const ProductRows& product, const float* rest, float* out) {
    const int64_t rows = product.factors->rows, columns = product.factors->columns;
    for (int64_t row = 0; row < rows; row += ProductRows::AT_ONCE)
        product.for_rows(row, min64(ProductRows::AT_ONCE, rows - row),
                         [=](int64_t of, int64_t first, int64_t count, const float* values) {
                             const float* before = rest + of * columns + first;
                             float* target = out + of * columns + first;
                             for (int64_t i = 0; i < count; ++i)
                                 target[i] = put_value<mode>(target[i], saturated(before[i] + values[i]));
                         });
}

// GC_OK, or GC_BAD_INDEX, with nothing written, where the payload contradicts itself or the workspace is too small.
inline int polar_decompress_into(int threads, const PlanTables* tables, const uint8_t* payload, int64_t nbytes,
                                 int64_t numel, int64_t block, int mode, Room room, float* out) {
    RestDecoder rest;
    if (nbytes < SMALLEST_PAYLOAD) return GC_BAD_INDEX;
    if (!(payload[0] & PRODUCT)) {
        if (!rest.set(threads, tables, payload, nbytes, numel, block, &room)) return GC_BAD_INDEX;
        rest.decode(mode, out);
        return GC_OK;
    }
    Factors factors;
    ProductRows product;
    const int64_t size = unpack_factors(payload, nbytes, numel, &factors, &room);
    if (size == 0 || !product.set(&factors, &room)) return GC_BAD_INDEX;
    if (!rest.set(threads, tables, payload, nbytes - size, numel, block, &room)) return GC_BAD_INDEX;
    float* whole = mode == REPLACE ? out : room.take<float>(numel);
    if (room.full()) return GC_BAD_INDEX;
    rest.decode(REPLACE, whole);
    if (mode == ADD)
        put_with_product<ADD>(product, whole, out);
    else if (mode == SUBTRACT)
        put_with_product<SUBTRACT>(product, whole, out);
    else
        put_with_product<REPLACE>(product, whole, out);
    return GC_OK;
}

}  // namespace
#endif
