// What add_norm and answer_logits share: a residual row over the threads of one block, and its statistics.
// `Op` is either of their structs: the fields read here have the same names in both.
#pragma once

#include "cuda/common.cuh"
#include "cuda/plan.h"

namespace pyarith::cuda {

// body(j, i) for each of this thread's vectors: the j-th holds the row's elements i .. i + 7.
template <int VECTORS, class Body>
__device__ inline void each_vector(int64_t d_model, const Body& body) {
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        const int i = static_cast<int>(j * blockDim.x + threadIdx.x) * VECTOR;
        if (i < d_model) body(j, i);
    }
}

// Issues the loads of a vector (begin + i ...) for each of this thread's vectors, and waits for none.
template <int VECTORS>
__device__ inline void load_row(const void* data, DType dtype, int64_t begin, int64_t d_model,
                                Packed (&packed)[VECTORS]) {
    each_vector<VECTORS>(d_model, [&](int j, int i) { packed[j] = load_packed(data, dtype, begin + i); });
}

template <int VECTORS>
__device__ inline void add_row(const Packed (&packed)[VECTORS], DType dtype, int64_t d_model,
                               float (&x)[VECTORS][VECTOR]) {
    each_vector<VECTORS>(d_model, [&](int j, int) {
        float addend[VECTOR];
        unpack(packed[j], dtype, addend);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) x[j][e] += addend[e];
    });
}

// x becomes the norm of itself: weight and bias come from L1 or L2.
template <int VECTORS, class Op>
__device__ inline void norm_row(const Op& op, RowStats stats, float (&x)[VECTORS][VECTOR]) {
    Packed weights[VECTORS];
    load_row(op.weight, op.weight_dtype, 0, op.d_model, weights);
    each_vector<VECTORS>(op.d_model, [&](int j, int i) {
        float weight[VECTOR], bias[VECTOR] = {};
        unpack(weights[j], op.weight_dtype, weight);
        if (op.bias) unpack(load_packed(op.bias, op.bias_dtype, i), op.bias_dtype, bias);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) x[j][e] = normed(x[j][e], stats, weight[e], bias[e], op.kind);
    });
}

// Mean square of the row or, for LayerNorm, its mean and then its variance (E[x^2] - E[x]^2 cancels).
// `fold(f)` adds up f(x) over this thread's elements.
template <class Op, class Fold>
__device__ inline RowStats row_stats(const Op& op, float* shared, const Fold& fold) {
    const float size = static_cast<float>(op.d_model);
    float mean = 0.0f;
    if (op.kind == Norm::layer) mean = block_sum(fold([](float x) { return x; }), shared) / size;
    const float square = block_sum(fold([mean](float x) { return (x - mean) * (x - mean); }), shared) / size;
    return {mean, 1.0f / sqrtf(square + op.eps)};
}

template <int VECTORS, class Op>
__device__ inline RowStats row_stats(const Op& op, float* shared, const float (&x)[VECTORS][VECTOR]) {
    return row_stats(op, shared, [&](auto f) {
        float total = 0.0f;
        each_vector<VECTORS>(op.d_model, [&](int j, int) {
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) total += f(x[j][e]);
        });
        return total;
    });
}

}  // namespace pyarith::cuda
