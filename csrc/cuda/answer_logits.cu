// h = norm(row[v, b] + write[b]); out[v, b, k] = cap(scale * (h . target[b, k]) + target_bias[b, k]).
// Owner: one block per row (v, b), for all of its k; h stays in registers.
// Bytes per element of row: 4; write, weight, bias and the k target rows of a prompt come from L2 over the variants.
// Accumulation: fp32 per thread, then a fixed tree over the block; h is not rounded.
// Bitwise repeatable: no atomics, and the order of every sum depends on d_model and the alignment alone.
#include "cuda/rows.cuh"

namespace pyarith::cuda {
namespace {

__device__ inline void store_logit(const AnswerLogits& op, int64_t prompt, int64_t k, float dot) {
    if (threadIdx.x != 0) return;
    float logit = op.scale * dot;
    if (op.target_bias) logit += op.target_bias[prompt * op.k + k];
    op.out[blockIdx.x * op.k + k] = softcapped(logit, op.softcap);
}

template <int VECTORS>
__global__ void __launch_bounds__(most_threads) in_registers(const AnswerLogits op) {
    __shared__ float shared[32];
    const int64_t prompt = blockIdx.x % op.batch;
    Packed row[VECTORS], write[VECTORS];
    load_row(op.row, DType::f32, blockIdx.x * op.d_model, op.d_model, row);
    if (op.write) load_row(op.write, DType::f32, prompt * op.d_model, op.d_model, write);
    float h[VECTORS][VECTOR] = {};
    each_vector<VECTORS>(op.d_model, [&](int j, int) { unpack(row[j], DType::f32, h[j]); });
    if (op.write) add_row(write, DType::f32, op.d_model, h);
    norm_row(op, row_stats(op, shared, h), h);
    for (int64_t k = 0; k < op.k; ++k) {
        Packed target[VECTORS];
        load_row(op.target, op.target_dtype, (prompt * op.k + k) * op.d_model, op.d_model, target);
        float dot = 0.0f;
        each_vector<VECTORS>(op.d_model, [&](int j, int) {
            float factor[VECTOR];
            unpack(target[j], op.target_dtype, factor);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) dot = fmaf(h[j][e], factor[e], dot);
        });
        store_logit(op, prompt, k, block_sum(dot, shared));
    }
}

// Any size and alignment: one element at a time, h computed again from L1 or L2 for each target.
__global__ void __launch_bounds__(most_threads) streamed(const AnswerLogits op) {
    __shared__ float shared[32];
    const int64_t prompt = blockIdx.x % op.batch;
    const float* row = op.row + blockIdx.x * op.d_model;
    const auto summed = [&](int64_t i) { return op.write ? row[i] + op.write[prompt * op.d_model + i] : row[i]; };
    const RowStats stats = row_stats(op, shared, [&](auto f) {
        float total = 0.0f;
        for (int64_t i = threadIdx.x; i < op.d_model; i += blockDim.x) total += f(summed(i));
        return total;
    });
    for (int64_t k = 0; k < op.k; ++k) {
        float dot = 0.0f;
        for (int64_t i = threadIdx.x; i < op.d_model; i += blockDim.x) {
            const float bias = op.bias ? load_one(op.bias, op.bias_dtype, i) : 0.0f;
            const float h = normed(summed(i), stats, load_one(op.weight, op.weight_dtype, i), bias, op.kind);
            dot = fmaf(h, load_one(op.target, op.target_dtype, (prompt * op.k + k) * op.d_model + i), dot);
        }
        store_logit(op, prompt, k, block_sum(dot, shared));
    }
}

}  // namespace

const char* answer_logits(const AnswerLogits& op, uintptr_t stream_value) {
    const int64_t rows = op.variants * op.batch;
    if (rows * op.k == 0) return nullptr;
    if (rows > INT32_MAX) return "answer_logits: more than 2^31 - 1 rows in one call";
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    const bool vectors = op.d_model % VECTOR == 0 && aligned({op.row, op.write, op.weight, op.bias, op.target});
    const RowPlan plan = row_plan(op.d_model, vectors, VECTOR);
    const dim3 grid(static_cast<unsigned>(rows)), block(plan.threads);
    if (plan.vectors == 1) return launch(in_registers<1>, grid, block, stream, op);
    if (plan.vectors == 2) return launch(in_registers<2>, grid, block, stream, op);
    if (plan.vectors == 4) return launch(in_registers<4>, grid, block, stream, op);
    return launch(streamed, grid, block, stream, op);
}

}  // namespace pyarith::cuda
