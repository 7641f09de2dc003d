// out[v, b, p, h] = ablate[v, h] ? baseline[b, p, h] : z[v, b, p, h]; without a baseline 0.
// Owner: one block per (v, b, p), for all heads. In place, what is not ablated is not touched.
// Bytes per element: twice the dtype's size (read and written); in place only for ablated heads. What the variants
// share (baseline, and z where its variant stride is 0) comes from L2 as far as that holds it.
// Accumulation: none, bytes are moved as they are.
// Bitwise repeatable: every element depends on its own inputs alone.
#include "cuda/common.cuh"

namespace pyarith::cuda {
namespace {

constexpr int most = 256;  // threads
constexpr int EACH = 2;    // units per thread and step: their loads are in flight together

// `Unit`: what moves at a time, 16 bytes or one element. Strides of `op` count units here.
template <class Unit>
__global__ void __launch_bounds__(most) by_units(const AblateHeads op, const bool in_place) {
    const int64_t v = quotient(blockIdx.x, op.batch * op.pos), prompt_pos = blockIdx.x - v * op.batch * op.pos;
    const int64_t b = quotient(prompt_pos, op.pos), p = prompt_pos - b * op.pos;
    const int64_t per_row = op.heads * op.d_head;
    const unsigned char* ablate = op.ablate + v * op.heads;
    const Unit* z = static_cast<const Unit*>(op.z) + v * op.z_variant + b * op.z_batch + p * op.z_pos;
    const Unit* baseline = static_cast<const Unit*>(op.baseline) + b * op.baseline_batch + p * op.baseline_pos;
    Unit* out = static_cast<Unit*>(op.out) + blockIdx.x * per_row;
    for (int64_t begin = threadIdx.x; begin < per_row; begin += EACH * blockDim.x) {
        Unit moved[EACH];
        bool wanted[EACH];
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int64_t i = begin + j * blockDim.x;
            moved[j] = Unit{};
            wanted[j] = i < per_row;
            if (!wanted[j]) continue;
            if (ablate[quotient(i, op.d_head)]) {
                if (op.baseline) moved[j] = baseline[i];
            } else if (in_place) {
                wanted[j] = false;
            } else {
                moved[j] = z[i];
            }
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            if (wanted[j]) out[begin + j * blockDim.x] = moved[j];
    }
}

template <class Unit>
const char* run(AblateHeads op, cudaStream_t stream) {
    const int64_t rows = op.variants * op.batch * op.pos;
    if (rows > INT32_MAX) return "ablate_heads: more than 2^31 - 1 positions in one call";
    const int elements = static_cast<int>(sizeof(Unit)) / op.element_bytes;
    for (int64_t* size : {&op.d_head, &op.z_variant, &op.z_batch, &op.z_pos, &op.baseline_batch, &op.baseline_pos})
        *size /= elements;
    const int64_t warps = (op.heads * op.d_head + 32 * EACH - 1) / (32 * EACH);
    const dim3 block(warps * 32 < most ? static_cast<unsigned>(warps * 32) : most);
    return launch(by_units<Unit>, dim3(static_cast<unsigned>(rows)), block, stream, op, op.z == op.out);
}

}  // namespace

const char* ablate_heads(const AblateHeads& op, uintptr_t stream_value) {
    if (op.variants * op.batch * op.pos * op.heads * op.d_head == 0) return nullptr;
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    const int64_t steps = op.d_head | op.z_variant | op.z_batch | op.z_pos | op.baseline_batch | op.baseline_pos;
    if (steps * op.element_bytes % 16 == 0 && aligned({op.z, op.baseline, op.out})) return run<uint4>(op, stream);
    if (op.element_bytes == 4) return run<uint32_t>(op, stream);
    return run<uint16_t>(op, stream);
}

}  // namespace pyarith::cuda
