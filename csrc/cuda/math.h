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

// a * b and a + b rounded each by itself: nvcc would make one operation of the two.
PYARITH_SHARED float times(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
PYARITH_SHARED float plus(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

// One element of masked_adamw, whose formula is in ops.h. Division and root round to nearest: nvcc's default.
PYARITH_SHARED void adamw(const AdamwFactors& by, float g, float& p, float& m, float& v) {
    m = by.from_grad ? plus(g, times(by.blend, plus(m, -g))) : plus(m, times(by.blend, plus(g, -m)));
    v = plus(times(by.keep, v), times(by.second, times(g, g)));
    const float change = times(by.rate, m / plus(times(sqrtf(v), by.unbias), by.eps));
    p = plus(p, -plus(change, times(by.shrink, p)));
}

struct Words {
    uint32_t at[4];
};

// Philox4x32-10 (Salmon et al. 2011): the words for one counter.
PYARITH_SHARED Words philox(uint64_t seed, Words counter) {
    uint32_t *c = counter.at, low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xd2511f53u} * c[0], b = uint64_t{0xcd9e8d57u} * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ low;
        c[1] = static_cast<uint32_t>(b);
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ high;
        c[3] = static_cast<uint32_t>(a);
        low += 0x9e3779b9u;
        high += 0xbb67ae85u;
    }
    return counter;
}

// The bits of x in bfloat16, away from zero where what is cut off and 16 random bits make more than 16 bits.
PYARITH_SHARED uint32_t rounded_by(float x, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (x != x ? bits | 0x400000u : bits + noise) >> 16;
}

// 64-bit division is a loop on a GPU, and almost no tensor needs it.
PYARITH_SHARED int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
}

}  // namespace pyarith::cuda
