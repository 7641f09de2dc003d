// One vector type for the instruction set this file is compiled for: 16, 8 or 4 floats.
//
// Built on the vector extensions of GCC and Clang; intrinsics only where those have no word for it. Everything is
// static and always inlined, and the kernels use no templates of the standard library: a shared inline function
// compiled here with AVX-512 could otherwise be the copy that the linker keeps for the base kernels too.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define PYARITH_LEVEL avx512
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define PYARITH_LEVEL avx2
#else
#define PYARITH_LEVEL base
#endif

#define PYARITH_INLINE static inline __attribute__((always_inline))

namespace pyarith::cpu::PYARITH_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// How many lanes a load or store touches: all, or the n < W left at the end of a row.
struct Full {};
struct Tail {
    int n;
};

PYARITH_INLINE F splat(float x) { return x - F{}; }  // x - 0, since 0 + x would lose the sign of -0

PYARITH_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The smaller or larger of two; where one is NaN, the second.
PYARITH_INLINE F smaller(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
PYARITH_INLINE F larger(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// 1 / x for x in [1, 2^127], within 2 ulp: a Newton step costs half of what a 512-bit division does.
PYARITH_INLINE F reciprocal(F x) {
#if defined(__AVX512F__)
    F r = _mm512_rcp14_ps(x);
    return fma(r, fma(-x, r, splat(1.0f)), r);
#else
    return 1.0f / x;
#endif
}

PYARITH_INLINE float sum(F x) {
    float lane[W];
    memcpy(lane, &x, sizeof x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

PYARITH_INLINE F widen(H x) {
#if defined(__AVX512F__)  // GCC 12 makes three shuffles of a __builtin_convertvector here, and a slow one in narrow
    return (F)((U)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (F)(__builtin_convertvector(x, U) << 16);
#endif
}

// The bfloat16 nearest to x (ties to even) in the upper 16 bits; a NaN keeps its sign and stays a NaN. The instruction
// for it, vcvtneps2bf16, is not used: it flushes denormals.
PYARITH_INLINE U rounded(F x) {
    U bits = (U)x;
    return x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
// The lower 16 bits of each lane, of which the upper ones are 0.
PYARITH_INLINE H lower_halves(U x) {
#if defined(__AVX512F__)
    return (H)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0xd8));
#else
    return __builtin_convertvector(x, H);
#endif
}
PYARITH_INLINE H narrow(F x) { return lower_halves(rounded(x) >> 16); }

// The fp16 nearest to x (ties to even); infinite from 65520 on, a NaN stays a NaN.
PYARITH_INLINE H half(F x) {
    U sign = ((U)x >> 16) & 0x8000u, size = (U)x & 0x7fffffffu;
    U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // below the smallest normal number: adding 1/2 rounds to a multiple of 2^-24, which is what a denormal counts
    U denormal = (U)((F)size + 0.5f) - 0x3f000000u;
    U bits = size < 0x38800000u ? denormal : size >= 0x47800000u ? U{} + 0x7c00u : normal;
    return lower_halves((size > 0x7f800000u ? U{} + 0x7e00u : bits) | sign);
}

PYARITH_INLINE F square_root(F x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    F root;
    for (int i = 0; i < W; ++i) root[i] = __builtin_sqrtf(x[i]);
    return root;
#endif
}

PYARITH_INLINE F load(const float* p, Full) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
}
PYARITH_INLINE F load(const bf16* p, Full) {
    H x;
    memcpy(&x, p, sizeof x);
    return widen(x);
}
PYARITH_INLINE void store(float* p, F x, Full) { memcpy(p, &x, sizeof x); }
PYARITH_INLINE void store_halves(uint16_t* p, H x, Full) { memcpy(p, &x, sizeof x); }
PYARITH_INLINE void store(bf16* p, F x, Full) { store_halves(&p->bits, narrow(x), Full{}); }
PYARITH_INLINE void store(f16* p, F x, Full) { store_halves(&p->bits, half(x), Full{}); }

// Lanes past the end read as 0 and are not written. Memory past the end is not touched.
PYARITH_INLINE F load(const float* p, Tail tail) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << tail.n) - 1), p);
#else
    float lane[W] = {};
    for (int i = 0; i < tail.n; ++i) lane[i] = p[i];
    return load(lane, Full{});
#endif
}
PYARITH_INLINE F load(const bf16* p, Tail tail) {
#if defined(__AVX512F__)
    return widen((H)_mm256_maskz_loadu_epi16((__mmask16)((1u << tail.n) - 1), p));
#else
    bf16 lane[W] = {};
    for (int i = 0; i < tail.n; ++i) lane[i] = p[i];
    return load(lane, Full{});
#endif
}
PYARITH_INLINE void store(float* p, F x, Tail tail) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << tail.n) - 1), x);
#else
    for (int i = 0; i < tail.n; ++i) p[i] = x[i];
#endif
}
PYARITH_INLINE void store_halves(uint16_t* p, H x, Tail tail) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << tail.n) - 1), (__m256i)x);
#else
    for (int i = 0; i < tail.n; ++i) p[i] = x[i];
#endif
}
PYARITH_INLINE void store(bf16* p, F x, Tail tail) { store_halves(&p->bits, narrow(x), tail); }
PYARITH_INLINE void store(f16* p, F x, Tail tail) { store_halves(&p->bits, half(x), tail); }

// 64 bytes to an address that is a multiple of 64, past the caches where the instruction set can: memory that is only
// written need not be read first. Other threads may see it after `streamed()`.
PYARITH_INLINE void stream(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
    _mm256_stream_si256((__m256i*)to + 1, _mm256_loadu_si256((const __m256i*)from + 1));
#else
    memcpy(to, from, 64);
#endif
}
PYARITH_INLINE void streamed() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Lanes past the end set to 0: what a sum over a row adds of its last vector.
PYARITH_INLINE F live(F x, Full) { return x; }
PYARITH_INLINE F live(F x, Tail tail) {
    F kept = {};
    for (int i = 0; i < W; ++i) kept[i] = i < tail.n ? x[i] : 0.0f;
    return kept;
}

// body(offset, Full or Tail, which of the 4 accumulators) over 0..n; four chains hide the latency of an addition.
template <class Body>
PYARITH_INLINE void each(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        body(i, Full{}, 0);
        body(i + W, Full{}, 1);
        body(i + 2 * W, Full{}, 2);
        body(i + 3 * W, Full{}, 3);
    }
    for (; i + W <= n; i += W) body(i, Full{}, 0);
    if (i < n) body(i, Tail{(int)(n - i)}, 0);
}

// Two vectors computed in lockstep. One long dependent chain fills the processor's scheduler with waiting
// instructions; two interleaved chains keep it busy (1.5x on Zen 4).
struct Pair {
    F a, b;
};
PYARITH_INLINE Pair operator+(Pair x, float y) { return {x.a + y, x.b + y}; }
PYARITH_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
PYARITH_INLINE Pair operator-(Pair x) { return {-x.a, -x.b}; }
PYARITH_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
PYARITH_INLINE Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }
PYARITH_INLINE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
PYARITH_INLINE Pair smaller(Pair x, Pair y) { return {smaller(x.a, y.a), smaller(x.b, y.b)}; }
PYARITH_INLINE Pair larger(Pair x, Pair y) { return {larger(x.a, y.a), larger(x.b, y.b)}; }
PYARITH_INLINE Pair reciprocal(Pair x) { return {reciprocal(x.a), reciprocal(x.b)}; }
PYARITH_INLINE F size_of(F x) { return (F)((U)x & 0x7fffffffu); }
PYARITH_INLINE Pair size_of(Pair x) { return {size_of(x.a), size_of(x.b)}; }

template <class V>
PYARITH_INLINE V all(float x) {
    if constexpr (sizeof(V) == sizeof(F))
        return splat(x);
    else
        return {splat(x), splat(x)};
}

// 2W elements. Those of bfloat16 go even and odd into the two vectors, which takes no shuffle in either direction.
PYARITH_INLINE Pair load_pair(const float* p) { return {load(p, Full{}), load(p + W, Full{})}; }
PYARITH_INLINE Pair load_pair(const bf16* p) {
    U both;
    memcpy(&both, p, sizeof both);
    return {(F)(both << 16), (F)(both & 0xffff0000u)};
}
PYARITH_INLINE void store_pair(float* p, Pair x) {
    store(p, x.a, Full{});
    store(p + W, x.b, Full{});
}
PYARITH_INLINE void store_pair(bf16* p, Pair x) {
    U both = (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u);
    memcpy(p, &both, sizeof both);
}

// x * 2^n for integers n in [-151, 127]
PYARITH_INLINE F scaled(F x, F n) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(x, n);
#else
    I whole = __builtin_convertvector(n, I);
    I half = whole >> 1;  // two factors, since 2^-149 does not fit into one
    return x * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
#endif
}
PYARITH_INLINE Pair scaled(Pair x, Pair n) { return {scaled(x.a, n.a), scaled(x.b, n.b)}; }

// e^x within 1 ulp (2 without fused multiply-add) for x <= 88, underflowing through the denormals; e^88 above; NaN stays.
template <class V>
PYARITH_INLINE V exp(V x) {
    x = larger(all<V>(-104.0f), smaller(all<V>(88.0f), x));
    const V shift = all<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = fma(x, all<V>(1.44269504f), shift) - shift;
    V r = fma(n, all<V>(-0.693145752f), x);  // ln 2 in two parts, the first exact for every n here
    r = fma(n, all<V>(-1.42860677e-06f), r);
    // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, minimax fit, relative error 3e-9
    V p = all<V>(0.0013814606f);
    p = fma(p, r, all<V>(0.008368711f));
    p = fma(p, r, all<V>(0.04166839f));
    p = fma(p, r, all<V>(0.16666521f));
    p = fma(p, r, all<V>(0.49999994f));
    p = fma(p * r, r, r) + 1.0f;
    return scaled(p, n);
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
