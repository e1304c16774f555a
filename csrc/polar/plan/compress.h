// Polar's plan: a tensor to all bytes of a payload (encode and encode_unbiased of gcompress/compressors/polar/coding.py).
#ifndef GCOMPRESS_POLAR_PLAN_COMPRESS_H
#define GCOMPRESS_POLAR_PLAN_COMPRESS_H

#include "../turn.h"
#include "code.h"
#include "header.h"
#include "limit_model.h"
#include "products.h"

namespace {

const int64_t SCALE_CHUNK = 256, SMALLEST_SIDE = 16;
const int LIMIT_RETRIES = 6;

// What Polar is asked for. `by_column`: a matrix whose columns have scales of their own. `share`: of outliers, below 0:
// as many as pay. `rank`: components at most, -1: as many as pay.
struct CompressOptions {
    int64_t columns, block;
    bool by_column, by_tensor, flat;
    int list_size, rank;
    double share;
};

struct Compressor {
    int threads;
    const PlanTables* tables;
    CompressOptions options;
    uint8_t *payload, *workspace;
    int64_t numel, nbytes;  // nbytes: without the product
    Room room;

    bool write(const uint8_t* start, const uint8_t* end, const uint8_t* words, int64_t word_bytes) const {
        const int64_t size = end - start;
        if (size) memmove(payload, start, (size_t)size);
        if (word_bytes) memcpy(payload + size, words, (size_t)word_bytes);
        memset(payload + size + word_bytes, 0, (size_t)(nbytes - size - word_bytes));
        return true;
    }
    bool write_flag(int flag) const {
        const uint8_t byte = (uint8_t)flag;
        return write(&byte, &byte + (flag != 0), 0, 0);
    }

    // Header, section and the words of entries.
    bool write_code(const float* x, Spending* spending, const int64_t* variances, const int64_t* rates, int flags,
                    const uint8_t* section, int64_t section_bytes) {
        float scales[CLASSES];
        sample_scales(tables, spending, variances, rates, scales);
        const uint8_t* words = encode_words(threads, tables, x, spending, scales, options.list_size, workspace, &room);
        if (!words) return false;
        uint8_t* end = pack_header(spending, flags, section, section_bytes, payload);
        return write(payload, end, words, spending->words_bytes());
    }

    // The outliers' section of `left` bytes at most, or 0; what goes apart is taken from `x`, which then is a copy.
    int64_t set_apart(const float** x, Layout* layout, double total, int64_t left, uint8_t* section) {
        const Room before = room;
        const int64_t capacity = min64(numel, 8 * left / 3 + 2);
        uint8_t* codes = room.take<uint8_t>(layout->rows() + layout->columns);
        float* rest = room.take<float>(numel);
        const Room kept_room = room;
        LimitModel model;
        if (!model.set(tables, *x, *layout, total, left, options.flat, &room)) return -1;
        const int64_t rows = layout->row_codes ? layout->rows() : 1,
                      columns = layout->column_codes ? layout->columns : 1;
        float *of_rows = room.take<float>(rows), *of_columns = room.take<float>(columns);
        Outliers found = Outliers::with_room(capacity, &room);
        if (room.full()) return -1;
        LimitOption option = model.choose(options.share, options.list_size > 1);
        for (int attempt = 0; attempt < LIMIT_RETRIES && option.there; ++attempt) {
            const Layout kept = options.flat ? *layout : without_idle_codes(*layout, option.lowest, codes);
            const LimitFactors factors(tables, kept);
            factors.expand(of_rows, of_columns);
            found.limits = option.limits;
            found.count =
                polar_all_places_beyond(shares_of(threads, numel, kept.columns), *x, kept.columns, of_rows,
                                        factors.by_row(), of_columns, factors.by_column(), option.limits.floor,
                                        option.limits.slope, option.limits.intercept(), capacity, found.places);
            if (found.count == 0) break;
            if (3 * found.count < 8 * left) {
                split_outliers(*x, factors, &found);
                const int64_t size = pack_outliers(&found, numel, section, left);
                if (size > 0) {
                    if (*x != rest) memcpy(rest, *x, (size_t)numel * sizeof(float));
                    for (int64_t k = 0; k < found.count; ++k) rest[found.places[k]] -= found.coarse(factors, k);
                    *x = rest;
                    *layout = kept;
                    room = kept_room;
                    return size;
                }
            }
            option = model.modelled(option.strength + 16);  // a sample may mislead
        }
        room = before;
        return 0;
    }

    // Logarithms of the classes' variances in 1/32 octaves; false if all entries are 0, or there is no room.
    bool find_variances(const float* x, const Layout& layout, double total, bool measured, int64_t* variances) {
        const OctaveCodes octave(tables, 32);
        memset(variances, 0, CLASSES * sizeof *variances);
        if (layout.lone() && !measured) {
            variances[2 * NO_CODE] = octave(python_square(total / (double)numel * GAUSSIAN_RMS));
            return true;
        }
        int64_t counts[CLASSES], energies[CLASSES] = {0}, largest = 0;
        double terms[CLASSES];
        float scales[CLASSES];
        int8_t slots[CLASSES];
        class_counts(layout, counts);
        for (int k = 0; k < CLASSES; ++k) terms[k] = (double)counts[k] * tables->power(16 * k), slots[k] = (int8_t)k;
        const double unit = exact_sum(terms, CLASSES);
        for (int k = 0; k < CLASSES; ++k) scales[k] = (float)(64.0 * unit / (total * tables->power(16 * k)));
        const Room before = room;
        LayoutRuns runs = runs_of(threads, layout, &room);
        if (room.full()) return false;
        runs.described.slot = (int64_t)slots;
        runs.described.scale = (int64_t)scales;
        polar_class_energies(runs.shares, x, &runs.described, runs.row_buffer, energies);
        room = before;
        bool any = false;
        for (int k = 0; k < CLASSES; ++k) {
            if (!(counts[k] > 0 && energies[k] > 0)) continue;
            const double scale = scales[k];
            variances[k] = octave((double)energies[k] / (double)counts[k] / (scale * scale));
            largest = any ? max64(largest, variances[k]) : variances[k];
            any = true;
        }
        for (int k = 0; k < CLASSES; ++k)
            if (!(counts[k] > 0 && energies[k] > 0)) variances[k] = largest - 4096;
        return any;
    }

    bool encode_surveyed(const float* x, const Survey& survey) {
        if (!(__builtin_fabs(survey.total) <= 1.7976931348623157e308)) return write_flag(NOT_FINITE);
        if (!survey.something) return write_flag(0);
        Layout layout = survey.layout;
        const int64_t left = nbytes - HEADER_BYTES - side_bytes(layout) - CLASS_BYTES - TILE_BYTES;
        uint8_t* section = room.take<uint8_t>(max64(left, 0) + 16);
        uint8_t* codes = room.take<uint8_t>(layout.rows() + layout.columns);
        if (room.full()) return false;
        int64_t apart = 0, variances[CLASSES], rates[CLASSES];
        if (options.share != 0 && left >= 32) apart = set_apart(&x, &layout, survey.total, left, section);
        if (apart < 0) return false;
        Spending spending;
        spending.layout = layout;
        spending.base = spending.class_count = spending.tile_count = 0;
        const bool spent = find_variances(x, layout, survey.total, apart > 0, variances) &&
                           spend(tables, layout, variances, nbytes, options.flat, options.block, apart,
                                 apart ? 0 : codes, &spending, rates, &room);
        if (room.full()) return false;
        if (spent) return write_code(x, &spending, variances, rates, apart ? APART : 0, section, apart);
        if (!apart) return write_flag(0);
        spending.layout = layout;
        spending.base = spending.class_count = spending.tile_count = 0;
        return write(payload, pack_header(&spending, APART, section, apart, payload), 0, 0);
    }

    Survey surveyed(const float* sums, int64_t size, uint8_t* codes) const {
        return survey_of(tables, numel, options.columns, sums,
                         options.by_column ? sums + ceil_div(numel, options.columns) : 0, options.by_tensor, size,
                         options.flat, codes);
    }

    bool encode(const float* x) {
        const int64_t rows = ceil_div(numel, options.columns), columns = options.by_column ? options.columns : 0;
        float* sums = room.take<float>(rows + columns);
        uint8_t* codes = room.take<uint8_t>(2 * (rows + columns));
        if (room.full()) return false;
        polar_sums_of(threads, x, numel, options.columns, sums, columns ? sums + rows : 0);
        const Survey survey = surveyed(sums, nbytes, codes);
        if (options.rank == 0 || !columns || !survey.something) return encode_surveyed(x, survey);

        const Room before = room;
        const int64_t whole = nbytes;
        Factors factors;
        const ErrorModel model(tables, survey.layout, options.flat);
        if (!find_factors(x, rows, columns, survey.total, whole, model, options.rank, &factors, &room)) {
            if (room.full()) return false;
            room = before;
            return encode_surveyed(x, survey);
        }
        uint8_t* section = room.take<uint8_t>(whole + 16);
        float* rest = room.take<float>(numel);
        ProductRows product;
        if (room.full()) return false;
        int64_t size = pack_factors(&factors, section, whole - SMALLEST_PAYLOAD);
        while (whole - size < SMALLEST_PAYLOAD && factors.count > 1) {
            --factors.count;
            size = pack_factors(&factors, section, whole - SMALLEST_PAYLOAD);
        }
        if (size > whole - SMALLEST_PAYLOAD) {
            room = before;
            return encode_surveyed(x, survey);
        }
        if (!product.set(&factors, &room)) return false;
        take_product(product, x, rest, sums);
        const Survey after = surveyed(sums, whole - size, codes + rows + columns);
        if (!(after.error < 0.9 * survey.error)) {
            room = before;
            return encode_surveyed(x, survey);
        }
        nbytes = whole - size;
        if (!encode_surveyed(rest, after)) return false;
        payload[0] |= PRODUCT;
        memcpy(payload + nbytes, section, (size_t)size);
        return true;
    }

    // What remains of a matrix, and its sums over rows and columns.
    static void take_product(const ProductRows& product, const float* x, float* rest, float* sums) {
        const int64_t rows = product.factors->rows, columns = product.factors->columns;
        float* column_sums = sums + rows;
        memset(column_sums, 0, (size_t)columns * sizeof(float));
        for (int64_t row = 0; row < rows; row += ProductRows::AT_ONCE) {
            const int64_t some = min64(ProductRows::AT_ONCE, rows - row);
            product.for_rows(row, some, [=](int64_t of, int64_t first, int64_t count, const float* values) {
                const int64_t place = of * columns + first;
                for (int64_t i = 0; i < count; ++i) rest[place + i] = saturated(x[place + i] - values[i]);
            });
            for (int64_t of = row; of < row + some; ++of)
                add_row_sums(rest + of * columns, columns, sums + of, column_sums);
        }
    }

    bool encode_unbiased(const float* x, uint32_t seed) {
        const int64_t columns = min64(SCALE_CHUNK, numel), rows = ceil_div(numel, columns);
        const int64_t blocks = ceil_div(numel, TURN_BLOCK);
        float* sums = room.take<float>(rows);
        float *turned = room.take<float>(numel + 16), *decoded = room.take<float>(numel + 16);
        double* lengths = room.take<double>(blocks);
        uint8_t* section = room.take<uint8_t>(4 + 4 * blocks);
        float* scales_of = room.take<float>(blocks);
        if (room.full()) return false;
        polar_sums_of(threads, x, numel, columns, sums, 0);
        double total = 0.0;
        for (int64_t i = 0; i < rows; ++i) total += (double)sums[i];
        if (total == 0) return write_flag(0);
        if (!(__builtin_fabs(total) <= 1.7976931348623157e308)) return write_flag(NOT_FINITE);
        memset(turned + numel, 0, 16 * sizeof(float));
        memset(decoded + numel, 0, 16 * sizeof(float));
        polar_turn_blocks(x, numel, seed, turned, lengths);
        int64_t variances[CLASSES] = {0}, rates[CLASSES];
        const int64_t size = 4 + 4 * blocks;
        Spending spending;
        if (!spend(tables, {numel, numel, 0, 0}, variances, nbytes, true, options.block, size, 0, &spending, rates,
                   &room))
            return false;
        float scales[CLASSES];
        sample_scales(tables, &spending, variances, rates, scales);
        const uint8_t* words =
            encode_words(threads, tables, turned, &spending, scales, options.list_size, workspace, &room);
        WordDecoder decoder;
        if (!words || !decoder.set(threads, tables, &spending, &room)) return false;
        decoder.decode(words, REPLACE, decoded);
        polar_turn_scales_of(turned, decoded, numel, lengths, scales_of);
        memcpy(section, &seed, 4);
        memcpy(section + 4, scales_of, (size_t)blocks * sizeof(float));
        uint8_t* end = pack_header(&spending, TURNED, section, size, payload);
        return write(payload, end, words, spending.words_bytes());
    }
};

// Rows and columns of a tensor by its first dimension, as coding._matrix takes it.
inline void set_matrix(int64_t numel, int64_t first, bool by_matrix, CompressOptions* options) {
    options->by_column = by_matrix && first >= SMALLEST_SIDE && numel / first >= SMALLEST_SIDE;
    options->columns = options->by_column ? numel / first : min64(SCALE_CHUNK, numel);
}

}  // namespace
#endif
