// Statistics of one row, shared by add_norm and answer_logits.
#pragma once

#include "cpu/simd.h"
#include "pyarith/ops.h"

namespace pyarith::cpu::PYARITH_LEVEL {

struct RowStats {
    float mean;   // 0 for the RMS norms
    float scale;  // 1 / sqrt(mean square (or variance) + eps)
};

// `first`: the sum over the row of x (layer) or of x^2 (RMS), gathered while the row was written. The variance of a
// LayerNorm takes a second pass over the row, which is in L1 by then: E[x^2] - E[x]^2 cancels.
PYARITH_INLINE RowStats row_stats(const float* row, int64_t d_model, float first, float eps, bool layer) {
    const float size = (float)d_model;
    if (!layer) return {0.0f, 1.0f / __builtin_sqrtf(first / size + eps)};
    const float mean = first / size;
    F squares[4] = {};
    each(d_model, [&](int64_t i, auto lanes, int chain) {
        F centred = live(load(row + i, lanes) - mean, lanes);
        squares[chain] = fma(centred, centred, squares[chain]);
    });
    const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / size;
    return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

PYARITH_INLINE F normed(F x, RowStats stats, F weight, F bias) {
    return fma((x - stats.mean) * stats.scale, weight, bias);
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
