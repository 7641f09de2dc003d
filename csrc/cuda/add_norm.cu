// row[v, b] += delta[v, b] + write[b]; out[v, b] = norm(row[v, b]).
// Owner: one block per row; a thread keeps its elements in registers between the statistics and the result.
// Bytes per element: 8 (row read and written) + delta's + out's; write, weight and bias come from L2.
// Accumulation: fp32 per thread, then a fixed tree over the block. Result rounded to out's dtype once.
// Bitwise repeatable: no atomics, and the order of every sum depends on d_model and the alignment alone.
#include "cuda/rows.cuh"

namespace pyarith::cuda {
namespace {

template <int VECTORS>
__global__ void __launch_bounds__(most_threads) in_registers(const AddNorm op) {
    __shared__ float shared[32];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * op.d_model;
    const int64_t write_begin = (blockIdx.x % op.batch) * op.d_model;
    Packed row[VECTORS], delta[VECTORS], write[VECTORS];
    load_row(op.row, DType::f32, begin, op.d_model, row);
    if (op.delta) load_row(op.delta, op.delta_dtype, begin, op.d_model, delta);
    if (op.write) load_row(op.write, DType::f32, write_begin, op.d_model, write);
    float x[VECTORS][VECTOR] = {};
    each_vector<VECTORS>(op.d_model, [&](int j, int) { unpack(row[j], DType::f32, x[j]); });
    if (op.delta) add_row(delta, op.delta_dtype, op.d_model, x);
    if (op.write) add_row(write, DType::f32, op.d_model, x);
    if (op.delta || op.write)
        each_vector<VECTORS>(op.d_model, [&](int j, int i) { store_vector(op.row, DType::f32, begin + i, x[j]); });
    norm_row(op, row_stats(op, shared, x), x);
    each_vector<VECTORS>(op.d_model, [&](int j, int i) { store_vector(op.out, op.out_dtype, begin + i, x[j]); });
}

// Any size and alignment: one element at a time, the row read again from L1 or L2 for the result.
__global__ void __launch_bounds__(most_threads) streamed(const AddNorm op) {
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
    const RowStats stats = row_stats(op, shared, [&](auto f) {
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

}  // namespace

const char* add_norm(const AddNorm& op, uintptr_t stream_value) {
    const int64_t rows = op.variants * op.batch;
    if (rows * op.d_model == 0) return nullptr;
    if (rows > INT32_MAX) return "add_norm: more than 2^31 - 1 rows in one call";
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    const bool vectors = op.d_model % VECTOR == 0 && aligned({op.row, op.delta, op.write, op.weight, op.bias, op.out});
    const RowPlan plan = row_plan(op.d_model, vectors, VECTOR);
    const dim3 grid(static_cast<unsigned>(rows)), block(plan.threads);
    if (plan.vectors == 1) return launch(in_registers<1>, grid, block, stream, op);
    if (plan.vectors == 2) return launch(in_registers<2>, grid, block, stream, op);
    if (plan.vectors == 4) return launch(in_registers<4>, grid, block, stream, op);
    return launch(streamed, grid, block, stream, op);
}

}  // namespace pyarith::cuda
