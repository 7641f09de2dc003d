// AdamW on compact slices, each new value rounded into its place in the full weight; the formula is in ops.h.
// Owner: a thread owns a run of whole chunks of all slices laid end to end, with what they write of the weights.
// Bytes per element: 28 (param and two moments read and written, grad read) + the weight's size, written past the
// caches where the slices are too large for them.
// Accumulation: none; fp32, each operation rounded by itself.
// Bitwise repeatable, whatever the number of threads and the instruction set; so is the stochastic rounding.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyarith::cpu::PYARITH_LEVEL {
namespace {

// Elements. Small, so that the loads of one chunk and the writes past the caches of another are in flight together
// (1024 is slower by a tenth), and a multiple of what `draw` makes at a time.
constexpr int CHUNK = 256;
// Elements. What fewer of them write, 1 MiB, may still be in a cache when the next forward pass reads it.
constexpr int64_t streamed_from = int64_t{1} << 18;

typedef uint64_t Q __attribute__((vector_size(W * 4)));

// x * factor in 64 bits, as its lower and upper halves.
PYARITH_INLINE void multiply(U x, uint64_t factor, U& low, U& high) {
    const Q even = ((Q)x & 0xffffffffu) * factor, odd = ((Q)x >> 32) * factor;
    low = (U)((even & 0xffffffffu) | odd << 32);
    high = (U)(even >> 32 | (odd & ~Q{} << 32));
}

// Philox4x32-10 (Salmon et al. 2011). Group q of 8 elements of a slice takes the 16-bit halves, the lower one first, of
// the 4 words for the counter (q, q >> 32, step, number of the slice). Here those of CHUNK elements from `begin` on,
// a multiple of CHUNK, W groups at a time.
PYARITH_INLINE void draw(const MaskedAdamw& op, int64_t slice, int64_t begin, int64_t n, uint16_t* noise) {
    U lane;
    for (int i = 0; i < W; ++i) lane[i] = (uint32_t)i;
    for (int64_t i = 0; i < n; i += 8 * W) {
        const uint64_t group = (uint64_t)(begin + i) / 8;
        U word[4] = {lane + (uint32_t)group, U{} + (uint32_t)(group >> 32), U{} + op.step, U{} + (uint32_t)slice};
        uint32_t key[2] = {(uint32_t)op.seed, (uint32_t)(op.seed >> 32)};
        for (int round = 0; round < 10; ++round) {
            U low[2], high[2];
            multiply(word[0], 0xd2511f53u, low[0], high[0]);
            multiply(word[2], 0xcd9e8d57u, low[1], high[1]);
            word[0] = high[1] ^ word[1] ^ key[0];
            word[1] = low[1];
            word[2] = high[0] ^ word[3] ^ key[1];
            word[3] = low[0];
            key[0] += 0x9e3779b9u;
            key[1] += 0xbb67ae85u;
        }
        for (int j = 0; j < W; ++j)
            for (int k = 0; k < 4; ++k) {
                noise[i + 8 * j + 2 * k] = (uint16_t)word[k][j];
                noise[i + 8 * j + 2 * k + 1] = (uint16_t)(word[k][j] >> 16);
            }
    }
}

// x in bfloat16, away from zero where the bits that are cut off and 16 random ones make more than 16 bits.
PYARITH_INLINE H rounded_by(F x, const uint16_t* noise) {
    H drawn;
    memcpy(&drawn, noise, sizeof drawn);
    U bits = (U)x, moved = bits + __builtin_convertvector(drawn, U);
    return lower_halves((x != x ? bits | 0x400000u : moved) >> 16);
}

// n elements from i on of a slice; their new values rounded to T go to `out`, those of a fp32 weight stay in param.
template <class T, bool stochastic>
void update(const MaskedAdamw& op, const AdamwSlice& slice, float scale, int64_t i, int64_t n,
            [[maybe_unused]] const uint16_t* noise, [[maybe_unused]] T* out) {  // noise: for every lane up to CHUNK
    float *param = slice.param + i, *exp_avg = slice.exp_avg + i, *exp_avg_sq = slice.exp_avg_sq + i;
    const float* grad = slice.grad + i;
    const auto [shrink, blend, from_grad, keep, second, unbias, rate, eps] = op.factors;
    each(n, [&](int64_t j, auto lanes, int) {
        F g = load(grad + j, lanes) * scale, m = load(exp_avg + j, lanes), v = load(exp_avg_sq + j, lanes);
        m = from_grad ? g + (m - g) * blend : m + (g - m) * blend;
        v = v * keep + g * g * second;
        F p = load(param + j, lanes);
        p = p - (m / (square_root(v) * unbias + eps) * rate + p * shrink);
        store(exp_avg + j, m, lanes);
        store(exp_avg_sq + j, v, lanes);
        store(param + j, p, lanes);
        if constexpr (stochastic)
            store_halves(&out[j].bits, rounded_by(p, noise + j), lanes);
        else if constexpr (sizeof(T) < sizeof(float))
            store(out + j, p, lanes);
    });
}

// Where a chunk begins: its row, its column in the slice's row and the run that holds it.
struct Place {
    int64_t row, column, run;
};

template <class T>
PYARITH_INLINE void copy(T* to, const T* from, int64_t n, bool past_caches) {
    int64_t i = 0;
    if (past_caches) {
        const int64_t per_line = 64 / sizeof(T);
        const int64_t off = (int64_t)((uintptr_t)to / sizeof(T)) & (per_line - 1);
        const int64_t head = off ? per_line - off : 0;
        if (head + per_line <= n) {
            for (; i < head; ++i) to[i] = from[i];
            for (; i + per_line <= n; i += per_line) stream(to + i, from + i);
        }
    }
    memcpy(to + i, from + i, (n - i) * sizeof(T));
}

// Copies the next n values of a slice into the weight, and moves on.
template <class T>
PYARITH_INLINE void write(const AdamwSlice& slice, Place& at, const T* values, int64_t n, bool past_caches) {
    T* weight = static_cast<T*>(slice.weight);
    while (n > 0) {
        const AdamwRun* run = slice.runs + at.run;
        const int64_t end = at.run + 1 < slice.run_count ? run[1].begin : slice.width;
        const int64_t length = n < end - at.column ? n : end - at.column;
        T* to = weight + at.row * slice.weight_width + run->weight_begin + (at.column - run->begin);
        copy(to, values, length, past_caches);
        values += length;
        n -= length;
        at.column += length;
        if (at.column < end) return;
        if (++at.run == slice.run_count) at = {at.row + 1, 0, 0};
    }
}

template <class T, bool stochastic>
void chunks(const MaskedAdamw& op, int64_t number, float scale, int64_t begin, int64_t end, bool past_caches) {
    const AdamwSlice& slice = op.slices[number];
    alignas(64) T values[sizeof(T) < sizeof(float) ? CHUNK : 1];
    alignas(64) uint16_t noise[stochastic ? CHUNK : 1];
    Place at{begin / slice.width, begin % slice.width, 0};
    while (at.run + 1 < slice.run_count && slice.runs[at.run + 1].begin <= at.column) ++at.run;
    for (int64_t i = begin; i < end; i += CHUNK) {
        const int64_t n = end - i < CHUNK ? end - i : CHUNK;
        if (stochastic) draw(op, number, i, n, noise);
        update<T, stochastic>(op, slice, scale, i, n, noise, values);
        if constexpr (sizeof(T) < sizeof(float))
            write(slice, at, values, n, past_caches);
        else
            write(slice, at, slice.param + i, n, past_caches);
    }
}

}  // namespace

void masked_adamw(const MaskedAdamw& op, int threads) {
    int64_t elements = 0, all = 0;
    for (int64_t s = 0; s < op.slice_count; ++s) {
        const int64_t size = op.slices[s].rows * op.slices[s].width;
        elements += size;
        all += (size + CHUNK - 1) / CHUNK;
    }
    const float scale = op.grad_scale ? *op.grad_scale : 1.0f;
    const bool past_caches = elements >= streamed_from;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread) {
        int64_t from = all * thread / threads, to = all * (thread + 1) / threads;  // of this thread, in chunks
        for (int64_t s = 0; s < op.slice_count && to > 0; ++s) {
            const int64_t size = op.slices[s].rows * op.slices[s].width, here = (size + CHUNK - 1) / CHUNK;
            if (from < here) {
                const int64_t begin = from * CHUNK, end = to < here ? to * CHUNK : size;
                switch (op.slices[s].weight_dtype) {
                    case DType::bf16:
                        if (op.stochastic)
                            chunks<bf16, true>(op, s, scale, begin, end, past_caches);
                        else
                            chunks<bf16, false>(op, s, scale, begin, end, past_caches);
                        break;
                    case DType::f16: chunks<f16, false>(op, s, scale, begin, end, past_caches); break;
                    default: chunks<float, false>(op, s, scale, begin, end, past_caches);
                }
            }
            from = from > here ? from - here : 0;
            to -= here;
        }
        streamed();
    }
}

}  // namespace pyarith::cpu::PYARITH_LEVEL
