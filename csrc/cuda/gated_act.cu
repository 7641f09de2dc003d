// out = act(gate) * up, or act(gate).
// Owner: a thread owns two vectors of 8 elements, a block's length apart; out may be gate or up, since a thread reads
// its elements before it writes them.
// Bytes per element: three times the dtype's size (two without up).
// Accumulation: none; 16-bit types are computed in fp32 and rounded once.
// Bitwise repeatable: every element depends on its own inputs alone.
#include "cuda/common.cuh"

namespace pyarith::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int EACH = 2;  // vectors per thread: their loads are in flight together

template <Act act>
__global__ void __launch_bounds__(THREADS) by_vectors(const GatedAct op) {
    const int64_t per_row = op.d_mlp / VECTOR, count = op.rows * per_row;
    Packed gate[EACH], up[EACH];
    int64_t out_at[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int64_t unit = static_cast<int64_t>(blockIdx.x) * (EACH * THREADS) + j * THREADS + threadIdx.x;
        out_at[j] = -1;
        if (unit >= count) continue;
        const int64_t r = quotient(unit, per_row), i = (unit - r * per_row) * VECTOR;
        gate[j] = load_packed(op.gate, op.dtype, r * op.gate_stride + i);
        if (op.up) up[j] = load_packed(op.up, op.dtype, r * op.up_stride + i);
        out_at[j] = r * op.out_stride + i;
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        if (out_at[j] < 0) continue;
        float x[VECTOR], factor[VECTOR];
        unpack(gate[j], op.dtype, x);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) x[e] = activated<act>(x[e]);
        if (op.up) {
            unpack(up[j], op.dtype, factor);
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) x[e] *= factor[e];
        }
        store_vector(op.out, op.dtype, out_at[j], x);
    }
}

// Any size and alignment: a thread owns one element.
template <Act act>
__global__ void __launch_bounds__(THREADS) by_elements(const GatedAct op) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (unit >= op.rows * op.d_mlp) return;
    const int64_t r = quotient(unit, op.d_mlp), i = unit - r * op.d_mlp;
    float x = activated<act>(load_one(op.gate, op.dtype, r * op.gate_stride + i));
    if (op.up) x *= load_one(op.up, op.dtype, r * op.up_stride + i);
    store_one(op.out, op.dtype, r * op.out_stride + i, x);
}

template <Act act>
const char* run(const GatedAct& op, bool vectors, cudaStream_t stream) {
    const int64_t per_block = vectors ? int64_t{VECTOR} * EACH * THREADS : THREADS;
    const int64_t blocks = (op.rows * op.d_mlp + per_block - 1) / per_block;
    if (blocks > INT32_MAX) return "gated_act: more than 2^31 - 1 blocks in one call";
    const auto kernel = vectors ? by_vectors<act> : by_elements<act>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), stream, op);
}

}  // namespace

const char* gated_act(const GatedAct& given, uintptr_t stream_value) {
    GatedAct op = given;
    if (op.rows * op.d_mlp == 0) return nullptr;
    // Without gaps between the rows all is one row: an odd d_mlp then costs no alignment.
    if (op.gate_stride == op.d_mlp && op.out_stride == op.d_mlp && (!op.up || op.up_stride == op.d_mlp)) {
        op.d_mlp *= op.rows;
        op.rows = 1;
    }
    const int64_t strides = op.rows == 1 ? 0 : op.gate_stride | op.out_stride | op.up_stride;
    const bool vectors = (op.d_mlp | strides) % VECTOR == 0 && aligned({op.gate, op.up, op.out});
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    switch (op.act) {
        case Act::silu: return run<Act::silu>(op, vectors, stream);
        case Act::gelu: return run<Act::gelu>(op, vectors, stream);
        case Act::gelu_tanh: return run<Act::gelu_tanh>(op, vectors, stream);
        case Act::relu: return run<Act::relu>(op, vectors, stream);
    }
    return "gated_act: an activation that no kernel knows";
}

}  // namespace pyarith::cuda
