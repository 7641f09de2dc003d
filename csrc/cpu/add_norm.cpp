// row[v, b] += delta[v, b] + write[b]; out[v, b] = norm(row[v, b]).
// Owner: each row belongs to one thread, which reads it from memory once and again from L1.
// Bytes per element: 8 (row read and written) + delta's + out's; write and weight stay in cache.
// Accumulation: fp32, four chains of W lanes. Result rounded to out's dtype once.
// Bitwise repeatable, whatever the number of threads; the sum's order differs between instruction sets.
#include "cpu/kernels.h"
#include "cpu/norm.h"

namespace pyarith::cpu::PYARITH_LEVEL {
namespace {

template <bool layer, class Delta, class Out>
void rows(const AddNorm& op, NormWeights norm, [[maybe_unused]] int threads) {
    const int64_t d = op.d_model, count = op.variants * op.batch;
    const Delta* deltas = static_cast<const Delta*>(op.delta);
    Out* outs = static_cast<Out*>(op.out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < count; ++r) {
        float* row = op.row + r * d;
        const Delta* delta = deltas ? deltas + r * d : nullptr;
        const float* write = op.write ? op.write + (r % op.batch) * d : nullptr;
        F sums[4] = {};
        each(d, [&](int64_t i, auto lanes, int chain) {
            F x = load(row + i, lanes);
            if (delta) x += load(delta + i, lanes);
            if (write) x += load(write + i, lanes);
            if (delta || write) store(row + i, x, lanes);
            sums[chain] = layer ? sums[chain] + x : fma(x, x, sums[chain]);
        });
        const float first = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        const RowStats stats = row_stats(row, d, first, op.eps, layer);
        Out* out = outs + r * d;
        each(d, [&](int64_t i, auto lanes, int) {
            F bias = norm.bias ? load(norm.bias + i, lanes) : F{};
            store(out + i, normed(load(row + i, lanes), stats, load(norm.weight + i, lanes), bias), lanes);
        });
    }
}

template <bool layer, class Delta>
void by_out(const AddNorm& op, NormWeights norm, int threads) {
    if (op.out_dtype == DType::bf16)
        rows<layer, Delta, bf16>(op, norm, threads);
    else
        rows<layer, Delta, float>(op, norm, threads);
}

template <bool layer>
void by_delta(const AddNorm& op, NormWeights norm, int threads) {
    if (op.delta_dtype == DType::bf16)
        by_out<layer, bf16>(op, norm, threads);
    else
        by_out<layer, float>(op, norm, threads);
}

}  // namespace

void add_norm(const AddNorm& op, NormWeights norm, int threads) {
    if (op.kind == Norm::layer)
        by_delta<true>(op, norm, threads);
    else
        by_delta<false>(op, norm, threads);
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
