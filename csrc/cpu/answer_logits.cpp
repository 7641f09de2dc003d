// h = norm(row[v, b] + write[b]); out[v, b, k] = cap(scale * (h . target[b, k]) + target_bias[b, k]).
// Owner: each row belongs to one thread, which keeps h in its own scratch row (L1).
// Bytes per element of row: 4, plus target's k rows per prompt (in cache over the variants).
// Accumulation: fp32, four chains of W lanes; h is not rounded.
// Bitwise repeatable, whatever the number of threads.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"
#include "cpu/norm.h"

namespace pyarith::cpu::PYARITH_LEVEL {
namespace {

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class Target>
float dot(const float* hidden, const Target* target, int64_t n) {
    F sums[4] = {};
    each(n, [&](int64_t i, auto lanes, int chain) {
        sums[chain] = fma(load(hidden + i, lanes), load(target + i, lanes), sums[chain]);
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Target>
void rows(const AnswerLogits& op, NormWeights norm, float* scratch, [[maybe_unused]] int threads) {
    const int64_t d = op.d_model, count = op.variants * op.batch;
    const bool layer = op.kind == Norm::layer;
    const Target* targets = static_cast<const Target*>(op.target);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < count; ++r) {
        const int64_t b = r % op.batch;
        const float* row = op.row + r * d;
        const float* write = op.write ? op.write + b * d : nullptr;
        float* hidden = scratch + thread_number() * d;
        F sums[4] = {};
        each(d, [&](int64_t i, auto lanes, int chain) {
            F x = load(row + i, lanes);
            if (write) x += load(write + i, lanes);
            store(hidden + i, x, lanes);
            sums[chain] = layer ? sums[chain] + x : fma(x, x, sums[chain]);
        });
        const float first = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        const RowStats stats = row_stats(hidden, d, first, op.eps, layer);
        each(d, [&](int64_t i, auto lanes, int) {
            F bias = norm.bias ? load(norm.bias + i, lanes) : F{};
            store(hidden + i, normed(load(hidden + i, lanes), stats, load(norm.weight + i, lanes), bias), lanes);
        });
        for (int64_t k = 0; k < op.k; ++k) {
            float logit = op.scale * dot(hidden, targets + (b * op.k + k) * d, d);
            if (op.target_bias) logit += op.target_bias[b * op.k + k];
            if (op.softcap > 0.0f) logit = op.softcap * __builtin_tanhf(logit / op.softcap);
            op.out[r * op.k + k] = logit;
        }
    }
}

}  // namespace

void answer_logits(const AnswerLogits& op, NormWeights norm, float* scratch, int threads) {
    if (op.target_dtype == DType::bf16)
        rows<bf16>(op, norm, scratch, threads);
    else
        rows<float>(op, norm, scratch, threads);
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
