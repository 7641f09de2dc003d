// One sound kernel, and kernels with one error each, for the test that the checks find them (test_cuda_on_cpu.py).
// Every function takes the same arguments: `blocks` blocks of 64 threads; in and out hold 64 floats for each of them.
#include "cuda/common.cuh"

namespace pyarith::cuda {
namespace {

constexpr int SIZE = 64;

__device__ inline int at() { return static_cast<int>(blockIdx.x * SIZE + threadIdx.x); }

__global__ void sound(const float* in, float* out) {
    __shared__ float tile[SIZE], sums[32];
    const float total = block_sum(in[at()], sums);
    tile[threadIdx.x] = in[at()];
    __syncthreads();
    out[at()] = tile[SIZE - 1 - threadIdx.x] + total;
}

__global__ void barrier_missing(const float* in, float* out) {
    __shared__ float tile[SIZE];
    tile[threadIdx.x] = in[at()];
    out[at()] = tile[SIZE - 1 - threadIdx.x];
}

__global__ void barrier_missing_before_reuse(const float* in, float* out) {
    __shared__ float tile[SIZE];
    tile[threadIdx.x] = in[at()];
    __syncthreads();
    const float other = tile[SIZE - 1 - threadIdx.x];
    tile[threadIdx.x] = 2.0f * other;
    __syncthreads();
    out[at()] = tile[threadIdx.x];
}

__global__ void barrier_in_a_branch(const float* in, float* out) {
    if (threadIdx.x < 32) __syncthreads();
    out[at()] = in[at()];
}

__global__ void barriers_of_two_branches(const float* in, float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[at()] = in[at()];
}

__global__ void shuffle_in_a_branch(const float* in, float* out) {
    float x = in[at()];
    if (threadIdx.x % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);
    out[at()] = x;
}

__global__ void shuffle_with_half_a_mask(const float* in, float* out) {
    out[at()] = __shfl_xor_sync(0x0000ffffu, in[at()], 1);
}

__global__ void write_behind_the_end(const float* in, float* out) { out[at() + 1] = in[at()]; }

__global__ void read_before_the_start(const float* in, float* out) { out[at()] = in[at() - 1]; }

__global__ void write_to_an_input(const float* in, float* out) { const_cast<float*>(in)[at()] = out[at()] = 1.0f; }

__global__ void blocks_share_an_element(const float* in, float* out) {
    if (threadIdx.x == 0) out[0] = in[at()];
}

__global__ void block_reads_of_another(const float* in, float* out) {
    const int64_t last = static_cast<int64_t>(gridDim.x) * SIZE - 1;
    out[at()] = in[at()];
    if (threadIdx.x == 0) out[at()] += out[last - at()];
}

__global__ void shared_memory_not_set(const float* in, float* out) {
    __shared__ float tile[SIZE];
    if (threadIdx.x > 0) tile[threadIdx.x] = in[at()];
    __syncthreads();
    out[at()] = tile[threadIdx.x];
}

__global__ void vector_off_its_alignment(const float* in, float* out) {
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}

__global__ void index_past_an_array(const float* in, float* out) {
    float mine[4];
    for (int i = 0; i < 4; ++i) mine[i + blockIdx.x] = in[at()] * i;
    out[at()] = mine[threadIdx.x % 4];
}

__global__ void offset_in_32_bits(const float* in, float* out) {
    const int offset = (static_cast<int>(blockIdx.x) + 1) * 0x40000000;
    out[at()] = in[at()] + static_cast<float>(offset);
}

}  // namespace
}  // namespace pyarith::cuda

#define PLANTED(KERNEL)                                                                          \
    extern "C" __attribute__((visibility("default"))) const char* run_##KERNEL(                  \
        const float* in, float* out, int blocks) {                                               \
        const dim3 grid(blocks), block(pyarith::cuda::SIZE);                                     \
        return pyarith::cuda::launch(pyarith::cuda::KERNEL, grid, block, nullptr, in, out);      \
    }
PLANTED(sound)
PLANTED(barrier_missing)
PLANTED(barrier_missing_before_reuse)
PLANTED(barrier_in_a_branch)
PLANTED(barriers_of_two_branches)
PLANTED(shuffle_in_a_branch)
PLANTED(shuffle_with_half_a_mask)
PLANTED(write_behind_the_end)
PLANTED(read_before_the_start)
PLANTED(write_to_an_input)
PLANTED(blocks_share_an_element)
PLANTED(block_reads_of_another)
PLANTED(shared_memory_not_set)
PLANTED(vector_off_its_alignment)
PLANTED(index_past_an_array)
PLANTED(offset_in_32_bits)
