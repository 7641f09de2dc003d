// out = act(gate) * up, or act(gate).
// Owner: a thread owns a run of whole rows; out may be gate or up, since an element is read before it is written.
// Bytes per element: three times the dtype's size (two without up).
// Accumulation: none; bf16 is computed in fp32 and rounded once.
// Bitwise repeatable, whatever the number of threads.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyarith::cpu::PYARITH_LEVEL {
namespace {

template <Act act, class V>
PYARITH_INLINE V activated(V x) {
    if constexpr (act == Act::relu) return larger(all<V>(0.0f), x);
    if constexpr (act == Act::silu) return x * reciprocal(exp(-x) + 1.0f);
    if constexpr (act == Act::gelu_tanh) {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel for negative u
        V minus_2u = x * fma(x * x, all<V>(-0.0713548163f), all<V>(-1.59576912f));
        return x * reciprocal(exp(minus_2u) + 1.0f);
    }
    // gelu = max(x, 0) - |x| * erfc(|x| / sqrt 2) / 2, which does not cancel either. erfc(t) = exp(-t^2) * R(u) with
    // u = 1 / (1 + |x| / 4), R a minimax fit of the scaled erfc (relative error 2e-8) up to |x| = 14.2, where the
    // product is 0. The square is kept to twice the precision, since exp would magnify its rounding error.
    V size = smaller(all<V>(14.2f), size_of(x));
    V half = size * 0.5f;
    V square = half * size;
    V rest = fma(half, size, -square);
    V u = reciprocal(fma(size, all<V>(0.25f), all<V>(1.0f)));
    V r = all<V>(0.067474097f);
    r = fma(r, u, all<V>(-0.3900987f));
    r = fma(r, u, all<V>(0.78474474f));
    r = fma(r, u, all<V>(-0.6599808f));
    r = fma(r, u, all<V>(0.603223f));
    r = fma(r, u, all<V>(-0.037693944f));
    r = fma(r, u, all<V>(0.24207443f));
    r = fma(r, u, all<V>(0.18986852f));
    r = fma(r, u, all<V>(0.20043036f));
    r = fma(r, u, all<V>(-4.1761082e-5f));
    V erfc = exp(-square) * fma(-rest, r, r);
    return fma(-half, erfc, larger(all<V>(0.0f), x));
}

template <Act act, class T>
void rows(const GatedAct& op, [[maybe_unused]] int threads) {
    const T* gates = static_cast<const T*>(op.gate);
    const T* ups = static_cast<const T*>(op.up);
    T* outs = static_cast<T*>(op.out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < op.rows; ++r) {
        const T* gate = gates + r * op.gate_stride;
        const T* up = ups ? ups + r * op.up_stride : nullptr;
        T* out = outs + r * op.out_stride;
        const int64_t paired = op.d_mlp / (2 * W) * (2 * W);
        for (int64_t i = 0; i < paired; i += 2 * W) {
            Pair value = activated<act>(load_pair(gate + i));
            if (up) value = value * load_pair(up + i);
            store_pair(out + i, value);
        }
        each(op.d_mlp - paired, [&](int64_t j, auto lanes, int) {
            const int64_t i = paired + j;
            F value = activated<act>(load(gate + i, lanes));
            if (up) value *= load(up + i, lanes);
            store(out + i, value, lanes);
        });
    }
}

template <Act act>
void by_dtype(const GatedAct& op, int threads) {
    if (op.dtype == DType::bf16)
        rows<act, bf16>(op, threads);
    else
        rows<act, float>(op, threads);
}

}  // namespace

void gated_act(const GatedAct& op, int threads) {
    switch (op.act) {
        case Act::silu: return by_dtype<Act::silu>(op, threads);
        case Act::gelu: return by_dtype<Act::gelu>(op, threads);
        case Act::gelu_tanh: return by_dtype<Act::gelu_tanh>(op, threads);
        case Act::relu: return by_dtype<Act::relu>(op, threads);
    }
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
