// What one build of the kernels (base, AVX2 or AVX-512) offers to launch.cpp.
#pragma once

#include "pyarith/ops.h"

namespace pyarith::cpu {

// The norm's weight and bias as fp32 (1 + weight for rms1p): read once per row, so converted once per call.
struct NormWeights {
    const float* weight;
    const float* bias;  // null = none
};

#define PYARITH_DECLARE_KERNELS(LEVEL)                                                            \
    namespace LEVEL {                                                                             \
    void add_norm(const AddNorm& op, NormWeights norm, int threads);                              \
    void gated_act(const GatedAct& op, int threads);                                              \
    /* scratch: [threads, d_model] */                                                             \
    void answer_logits(const AnswerLogits& op, NormWeights norm, float* scratch, int threads);    \
    void masked_adamw(const MaskedAdamw& op, int threads);                                        \
    }

PYARITH_DECLARE_KERNELS(base)
PYARITH_DECLARE_KERNELS(avx2)
PYARITH_DECLARE_KERNELS(avx512)

}  // namespace pyarith::cpu
