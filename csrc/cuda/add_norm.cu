// row[v, b] += delta[v, b] + write[b]; out[v, b] = norm(row[v, b]).
// Owner: one block per row; a thread keeps its elements in registers between the statistics and the result.
// Bytes per element: 8 (row read and written) + delta's + out's; write and weight come from L2.
// Accumulation: fp32 per thread, then a fixed tree over the block. Result rounded to out's dtype once.
// Bitwise repeatable: no atomics, and the order of every sum depends on d_model alone.
#include "cuda/common.cuh"
#include "cuda/plan.h"

namespace pyarith::cuda {
namespace {

// Sum of x and, for LayerNorm, then of (x - mean)^2 over the row. `fold(f)` adds up f(x) over this thread's elements.
template <class Fold>
__device__ float2 mean_and_scale(const AddNorm& op, float* shared, const Fold& fold) {
    const float size = static_cast<float>(op.d_model);
    float mean = 0.0f;
    if (op.kind == Norm::layer) mean = block_sum(fold([](float x) { return x; }), shared) / size;
    const float square = block_sum(fold([mean](float x) { return (x - mean) * (x - mean); }), shared) / size;
    return make_float2(mean, 1.0f / sqrtf(square + op.eps));
}

__device__ inline float normed(float x, float2 stats, float weight, float bias, Norm kind) {
    if (kind == Norm::rms1p) weight += 1.0f;
    return fmaf((x - stats.x) * stats.y, weight, bias);
}

template <int VECTORS>
__global__ void in_registers(const AddNorm op) {
    __shared__ float shared[32];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * op.d_model;
    const int64_t write_begin = (blockIdx.x % op.batch) * op.d_model;
    float x[VECTORS][VECTOR];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        const int64_t i = (static_cast<int64_t>(j) * blockDim.x + threadIdx.x) * VECTOR;
        if (i >= op.d_model) continue;
        load_vector(op.row, DType::f32, begin + i, x[j]);
        float addend[VECTOR];
        if (op.delta) {
            load_vector(op.delta, op.delta_dtype, begin + i, addend);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) x[j][e] += addend[e];
        }
        if (op.write) {
            load_vector(op.write, DType::f32, write_begin + i, addend);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) x[j][e] += addend[e];
        }
        if (op.delta || op.write) store_vector(op.row, DType::f32, begin + i, x[j]);
    }
    const float2 stats = mean_and_scale(op, shared, [&](auto f) {
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) {
            if ((static_cast<int64_t>(j) * blockDim.x + threadIdx.x) * VECTOR >= op.d_model) continue;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) total += f(x[j][e]);
        }
        return total;
    });
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        const int64_t i = (static_cast<int64_t>(j) * blockDim.x + threadIdx.x) * VECTOR;
        if (i >= op.d_model) continue;
        float weight[VECTOR], bias[VECTOR] = {};
        load_vector(op.weight, op.weight_dtype, i, weight);
        if (op.bias) load_vector(op.bias, op.bias_dtype, i, bias);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) x[j][e] = normed(x[j][e], stats, weight[e], bias[e], op.kind);
        store_vector(op.out, op.out_dtype, begin + i, x[j]);
    }
}

// Any size and alignment: one element at a time, the row read again from L1 or L2 for the result.
__global__ void streamed(const AddNorm op) {
    __shared__ float shared[32];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * op.d_model;
    const int64_t write_begin = (blockIdx.x % op.batch) * op.d_model;
    float* row = op.row + begin;
    for (int64_t i = threadIdx.x; i < op.d_model; i += blockDim.x) {
        float x = row[i];
        if (op.delta) x += load_one(op.delta, op.delta_dtype, begin + i);
        if (op.write) x += op.write[write_begin + i];
        row[i] = x;
    }
    // A thread reads back only what it wrote itself, so no barrier is needed before the sums.
    const float2 stats = mean_and_scale(op, shared, [&](auto f) {
        float total = 0.0f;
        for (int64_t i = threadIdx.x; i < op.d_model; i += blockDim.x) total += f(row[i]);
        return total;
    });
    for (int64_t i = threadIdx.x; i < op.d_model; i += blockDim.x) {
        const float bias = op.bias ? load_one(op.bias, op.bias_dtype, i) : 0.0f;
        const float weight = load_one(op.weight, op.weight_dtype, i);
        store_one(op.out, op.out_dtype, begin + i, normed(row[i], stats, weight, bias, op.kind));
    }
}

bool aligned(const AddNorm& op) {
    uintptr_t bits = 0;
    const void* pointers[] = {op.row, op.delta, op.write, op.weight, op.bias, op.out};
    for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
    return bits % 16 == 0 && op.d_model % VECTOR == 0;
}

}  // namespace

const char* add_norm(const AddNorm& op, uintptr_t stream_value) {
    const int64_t rows = op.variants * op.batch;
    if (rows * op.d_model == 0) return nullptr;
    if (rows > INT32_MAX) return "add_norm: more than 2^31 - 1 rows in one call";
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    const RowPlan plan = row_plan(op.d_model, aligned(op), VECTOR);
    const dim3 grid(static_cast<unsigned>(rows)), block(plan.threads);
    if (plan.vectors == 1) return launch(in_registers<1>, grid, block, stream, op);
    if (plan.vectors == 2) return launch(in_registers<2>, grid, block, stream, op);
    if (plan.vectors == 4) return launch(in_registers<4>, grid, block, stream, op);
    return launch(streamed, grid, block, stream, op);
}

}  // namespace pyarith::cuda
