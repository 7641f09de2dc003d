// Arithmetic that the kernels share, as plain functions of floats: g++ compiles it too, and tests/ops/test_device_math.py
// compares it with fp64. No device-only intrinsics: what runs here on the CPU is what the GPU is asked for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pyarith/ops.h"

#ifdef __CUDACC__
#define PYARITH_SHARED __host__ __device__ inline
#else
#define PYARITH_SHARED inline
#endif

namespace pyarith::cuda {

PYARITH_SHARED float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace pyarith::cuda
