// Loads and stores of 8 elements at a time, dtype chosen at run time: the branch is the same for a whole launch, and
// costs nothing beside the memory access it guards.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/math.h"
#include "pyarith/ops.h"

namespace pyarith::cuda {

constexpr int VECTOR = 8;

inline bool aligned(std::initializer_list<const void*> pointers) {
    uintptr_t bits = 0;
    for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
    return bits % 16 == 0;
}

// The only place with launch syntax, so that the kernels' sources also compile as plain C++ (tests/ops/cuda_on_cpu
// runs them there, with a `launch` of its own). Returns null, or CUDA's error text.
#ifdef __CUDACC__
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
    kernel<<<grid, block, 0, stream>>>(args...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

__device__ inline int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

__device__ inline float load_one(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    if (dtype == DType::f16) return __half2float(static_cast<const __half*>(data)[i]);
    return static_cast<const float*>(data)[i];
}

__device__ inline void store_one(void* data, DType dtype, int64_t i, float x) {
    if (dtype == DType::bf16)
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
    else if (dtype == DType::f16)
        static_cast<__half*>(data)[i] = __float2half_rn(x);
    else
        static_cast<float*>(data)[i] = x;
}

// 8 elements as they lie in memory; only fp32 fills the second part. A load does not wait for its value, an unpacking
// does: kernels load all that they need before they unpack the first.
struct Packed {
    uint4 part[2];
};

// Elements i .. i + 7: data is 16-byte aligned and i a multiple of 8.
__device__ inline Packed load_packed(const void* data, DType dtype, int64_t i) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + i * size_of(dtype));
    Packed packed;
    packed.part[0] = p[0];
    if (dtype == DType::f32) packed.part[1] = p[1];
    return packed;
}

__device__ inline void unpack(const Packed& packed, DType dtype, float (&x)[VECTOR]) {
    const uint4 low = packed.part[0];
    if (dtype == DType::f32) {
        const uint4 high = packed.part[1];
        x[0] = float_of_bits(low.x), x[1] = float_of_bits(low.y), x[2] = float_of_bits(low.z);
        x[3] = float_of_bits(low.w), x[4] = float_of_bits(high.x), x[5] = float_of_bits(high.y);
        x[6] = float_of_bits(high.z), x[7] = float_of_bits(high.w);
        return;
    }
    const uint32_t words[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float2 two;
        if (dtype == DType::bf16)
            two = make_float2(float_of_bits(words[j] << 16), float_of_bits(words[j] & 0xffff0000u));
        else
            two = __half22float2(*reinterpret_cast<const __half2*>(&words[j]));
        x[2 * j] = two.x, x[2 * j + 1] = two.y;
    }
}

__device__ inline void store_vector(void* data, DType dtype, int64_t i, const float (&x)[VECTOR]) {
    if (dtype == DType::f32) {
        float4* p = reinterpret_cast<float4*>(static_cast<float*>(data) + i);
        p[0] = make_float4(x[0], x[1], x[2], x[3]);
        p[1] = make_float4(x[4], x[5], x[6], x[7]);
        return;
    }
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (dtype == DType::bf16) {
            const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
            words[j] = *reinterpret_cast<const uint32_t*>(&two);
        } else {
            const __half2 two = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
            words[j] = *reinterpret_cast<const uint32_t*>(&two);
        }
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + i) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Sum over the block, the same bits in every thread and in every run: a fixed tree within the warp, then over warps.
// `shared` holds 32 floats; the leading barrier lets one array serve several sums in a row.
__device__ inline float block_sum(float x, float* shared) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f;
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

}  // namespace pyarith::cuda
