// One declaration per op and device. Plain pointers and sizes; nothing here knows Python or torch.
// Tensors are contiguous unless a stride is given; sizes and strides count elements.
#pragma once

#include <cstdint>

namespace pyarith {

enum class DType : int { f32, bf16, f16, f64, boolean };
enum class Norm : int { rms, rms1p, layer };
enum class Act : int { silu, gelu, gelu_tanh, relu };

// row[v, b] += delta[v, b] + write[b]; out[v, b] = norm(row[v, b]). Null delta, write or bias means none.
struct AddNorm {
    float* row;         // [variants, batch, d_model]
    const void* delta;  // like row, in delta_dtype
    const float* write; // [batch, d_model]
    const void* weight; // [d_model], in weight_dtype
    const void* bias;   // [d_model], in bias_dtype
    void* out;          // like row, in out_dtype
    int64_t variants, batch, d_model;
    float eps;
    Norm kind;
    DType delta_dtype, weight_dtype, bias_dtype, out_dtype;
};

// out = act(gate) * up, or act(gate) where up is null; all three in one dtype, out may be gate or up.
struct GatedAct {
    const void* gate;
    const void* up;
    void* out;
    int64_t rows, d_mlp, gate_stride, up_stride, out_stride;
    Act act;
    DType dtype;
};

// h = norm(row[v, b] + write[b]); out[v, b, k] = cap(scale * (h . target[b, k]) + target_bias[b, k]).
struct AnswerLogits {
    const float* row;         // [variants, batch, d_model]
    const float* write;       // [batch, d_model]
    const void* weight;       // [d_model], in weight_dtype
    const void* bias;         // [d_model], in bias_dtype
    const void* target;       // [batch, k, d_model], in target_dtype
    const float* target_bias; // [batch, k]
    float* out;               // [variants, batch, k]
    int64_t variants, batch, k, d_model;
    float eps, scale, softcap;
    Norm kind;
    DType weight_dtype, bias_dtype, target_dtype;
};

// out[v, b, p, h] = ablate[v, h] ? baseline[b, p, h] : z[v, b, p, h]. Null baseline means 0; out may be z.
struct AblateHeads {
    const void* z;                // [variants, batch, pos, heads, d_head], contiguous from heads on
    const unsigned char* ablate;  // [variants, heads], 0 or 1
    const void* baseline;         // [batch, pos, heads, d_head], contiguous from heads on
    void* out;                    // like z, contiguous
    int64_t variants, batch, pos, heads, d_head;
    int64_t z_variant, z_batch, z_pos, baseline_batch, baseline_pos;  // strides; 0 = one for all
    int element_bytes;                                                // 2 or 4
};

// Elements `begin` up to the next run's begin of a row of a slice lie at `weight_begin` of the weight's row.
struct AdamwRun {
    int64_t begin, weight_begin;
};

// One compact slice [rows, width] and the weight [rows, weight_width] that holds its rows in runs. Rows of the weight
// that are whole need no rows here: the slice is then one row, and its runs are longer.
struct AdamwSlice {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* weight;  // in weight_dtype
    int64_t rows, width, weight_width;
    const AdamwRun* runs;  // sorted by begin, the first one's is 0
    int64_t run_count;
    DType weight_dtype;
};

// g = grad * grad_scale;  m += blend * (g - m), or m = g + blend * (m - g) from_grad;  v = keep * v + second * (g * g);
// p -= rate * (m / (sqrt(v) * unbias + eps)) + shrink * p;  weight = p in its dtype.
// Each operation rounds by itself, so that every backend gives the same bits. The decay is no factor 1 - lr * weight_decay
// on its own: in fp32 that rounds to steps of 6e-8, which is what the decay of one step may amount to.
struct AdamwFactors {
    float shrink, blend;
    bool from_grad;  // blend is beta1, below 1/2, in place of 1 - beta1: what is small is multiplied
    float keep, second, unbias, rate, eps;
};
struct MaskedAdamw {
    const AdamwSlice* slices;
    int64_t slice_count;
    const float* grad_scale;  // one number; null = 1
    AdamwFactors factors;
    bool stochastic;  // round into bf16 by the generator with this seed, at this step
    uint64_t seed;
    uint32_t step;
};

namespace cpu {

enum class Level : int { base, avx2, avx512 };

// What this machine has, and the most that it may use (a limit can only lower it).
Level supported();
Level level();
void limit(Level most);

void add_norm(const AddNorm& op, int threads);
void gated_act(const GatedAct& op, int threads);
void answer_logits(const AnswerLogits& op, int threads);
void masked_adamw(const MaskedAdamw& op, int threads);

}  // namespace cpu

namespace cuda {

// `stream` is the integer value of a cudaStream_t of the current device. Each returns null, or CUDA's error text.
const char* add_norm(const AddNorm& op, uintptr_t stream);
const char* gated_act(const GatedAct& op, uintptr_t stream);
const char* answer_logits(const AnswerLogits& op, uintptr_t stream);
const char* ablate_heads(const AblateHeads& op, uintptr_t stream);
const char* masked_adamw(const MaskedAdamw& op, uintptr_t stream);

// As CUDA numbers them: 13000 is 13.0. The driver is 0 where there is none.
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace cuda
}  // namespace pyarith
