// Polar's plan: scales that make samples of entries, amplitudes and values that samples stand for
// (gcompress/compressors/polar/samples.py).
#ifndef GCOMPRESS_POLAR_PLAN_SAMPLES_H
#define GCOMPRESS_POLAR_PLAN_SAMPLES_H

#include "spending.h"

namespace {

const double SAMPLE_STEPS = 24.0, SIGN_STEPS = 16.0;

inline void sample_scales(const PlanTables* tables, const Spending* spending, const int64_t* variances,
                          const int64_t* rates, float* scales) {
    double found[CLASSES], power = 0.0;
    int64_t members = 0;
    for (int64_t k = 0; k < spending->class_count; ++k) {
        const CodedClass& c = spending->classes[k];
        const double deviation = tables->power(variances[c.of_class]);
        found[k] = SAMPLE_STEPS / deviation;
        if (c.levels > 1) continue;
        const int64_t rate = rates[c.of_class];
        found[k] = square_root(most_of(tables->power(2 * rate) - 1.0, 0.0)) / tables->power(rate);
        power += (double)c.count * python_square(found[k] * deviation);
        members += c.count;
    }
    const double gain = members ? SIGN_STEPS / square_root(power / (double)members) : 1.0;
    for (int64_t k = 0; k < spending->class_count; ++k)
        scales[k] = (float)(spending->classes[k].levels == 1 ? found[k] * gain : found[k]);
}

// The factors of least error, from <sample, reproduction> and |reproduction|^2 in integers.
inline void set_amplitudes(Spending* spending, const float* scales, const int64_t* products) {
    for (int64_t k = 0; k < spending->class_count; ++k) {
        CodedClass* c = spending->classes + k;
        const double norm = c->levels == 1 ? (double)c->count : (double)products[2 * k + 1] / POINT_ONE;
        const double amplitude = norm != 0.0 ? (double)products[2 * k] / ((double)scales[k] * norm) : 0.0;
        const double relative = ldexp(amplitude, -(int)spending->base);
        c->amplitude = double_of_half(half_of(least_of(most_of(relative, 0.0), 6e4)));
    }
}

// What the labels of every coded class decode to: [classes][2^MAX_LEVELS].
inline void value_tables(const PlanTables* tables, const Spending* spending, float* values) {
    for (int64_t k = 0; k < spending->class_count; ++k, values += 1 << MAX_LEVELS) {
        const CodedClass& c = spending->classes[k];
        const int16_t* points = (const int16_t*)tables->design(c.design).points;
        memset(values, 0, sizeof(float) << MAX_LEVELS);
        for (int label = 0; label < 1 << c.levels; ++label) {
            double value = ldexp(points[label] * c.amplitude, (int)spending->base) / (c.levels == 1 ? 1 : POINT_ONE);
            value = value > PLAN_LARGEST ? PLAN_LARGEST : value < -PLAN_LARGEST ? -PLAN_LARGEST : value;
            values[label] = (float)value;
        }
    }
}

}  // namespace
#endif
