// Arithmetic that the kernels share, as plain functions of floats without device-only intrinsics: g++ compiles it too,
// and tests/ops/test_device_math.py compares it with fp64.
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

// x / (1 + e^-x). Far below zero e^-x is infinite and the quotient -0, where x * e^x / (1 + e^x) would be NaN.
PYARITH_SHARED float silu(float x) { return x / (1.0f + expf(-x)); }

PYARITH_SHARED float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// (1 + tanh(u)) / 2 = 1 / (1 + e^-2u) with 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3): cheaper than tanhf, and does not
// cancel for negative u.
PYARITH_SHARED float gelu_tanh(float x) {
    const float two_u = x * fmaf(x * x, 0.0713548163f, 1.59576912f);
    return x / (1.0f + expf(-two_u));
}

PYARITH_SHARED float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays

template <Act act>
PYARITH_SHARED float activated(float x) {
    if constexpr (act == Act::silu) return silu(x);
    if constexpr (act == Act::gelu) return gelu(x);
    if constexpr (act == Act::gelu_tanh) return gelu_tanh(x);
    if constexpr (act == Act::relu) return relu(x);
}

PYARITH_SHARED float softcapped(float x, float cap) { return cap > 0.0f ? cap * tanhf(x / cap) : x; }

struct RowStats {
    float mean;   // 0 for the RMS norms
    float scale;  // 1 / sqrt(mean square (or variance) + eps)
};

PYARITH_SHARED float normed(float x, RowStats stats, float weight, float bias, Norm kind) {
    if (kind == Norm::rms1p) weight += 1.0f;
    return fmaf((x - stats.mean) * stats.scale, weight, bias);
}

// 64-bit division is a loop on a GPU, and almost no tensor needs it.
PYARITH_SHARED int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
}

}  // namespace pyarith::cuda
