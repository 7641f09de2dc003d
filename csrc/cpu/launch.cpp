// Chooses the instruction set, the number of threads and the scratch memory, then calls the kernel.
// Compiled once, for the base instruction set.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace pyarith::cpu {
namespace {

Level limit_ = Level::avx512;

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t elements_per_thread = 16384;

int useful_threads(int threads, int64_t rows, int64_t elements) {
    const int64_t most = std::min<int64_t>(rows, elements / elements_per_thread);
    return static_cast<int>(std::clamp<int64_t>(most, 1, std::max(threads, 1)));
}

float as_float(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// fp32 copies of weight and bias where the kernel cannot read them as they are.
class Converted {
public:
    Converted(const void* weight, DType weight_dtype, const void* bias, DType bias_dtype, int64_t n, Norm kind) {
        const bool copy_weight = weight_dtype != DType::f32 || kind == Norm::rms1p;
        const bool copy_bias = bias && bias_dtype != DType::f32;
        weights = {static_cast<const float*>(weight), static_cast<const float*>(bias)};
        memory_.resize((copy_weight + copy_bias) * n);
        float* next = memory_.data();
        if (copy_weight) {
            const float plus = kind == Norm::rms1p ? 1.0f : 0.0f;
            for (int64_t i = 0; i < n; ++i) next[i] = plus + as_float(weight, weight_dtype, i);
            weights.weight = next;
            next += n;
        }
        if (copy_bias) {
            for (int64_t i = 0; i < n; ++i) next[i] = as_float(bias, bias_dtype, i);
            weights.bias = next;
        }
    }

    NormWeights weights;

private:
    std::vector<float> memory_;
};

}  // namespace

Level supported() {
#if defined(PYARITH_X86)
    static const Level found = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            return Level::avx512;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::avx2 : Level::base;
    }();
    return found;
#else
    return Level::base;
#endif
}

Level level() { return std::min(supported(), limit_); }
void limit(Level most) { limit_ = std::min(limit_, most); }

#if defined(PYARITH_X86)
#define PYARITH_CALL(KERNEL, ...)                                 \
    switch (level()) {                                            \
        case Level::avx512: return avx512::KERNEL(__VA_ARGS__);   \
        case Level::avx2: return avx2::KERNEL(__VA_ARGS__);       \
        case Level::base: return base::KERNEL(__VA_ARGS__);       \
    }
#else
#define PYARITH_CALL(KERNEL, ...) return base::KERNEL(__VA_ARGS__);
#endif

void add_norm(const AddNorm& op, int threads) {
    const int64_t rows = op.variants * op.batch;
    if (rows * op.d_model == 0) return;
    const Converted norm(op.weight, op.weight_dtype, op.bias, op.bias_dtype, op.d_model, op.kind);
    threads = useful_threads(threads, rows, rows * op.d_model);
    PYARITH_CALL(add_norm, op, norm.weights, threads)
}

void gated_act(const GatedAct& op, int threads) {
    threads = useful_threads(threads, op.rows, op.rows * op.d_mlp);
    PYARITH_CALL(gated_act, op, threads)
}

void answer_logits(const AnswerLogits& op, int threads) {
    const int64_t rows = op.variants * op.batch;
    if (rows * op.k == 0) return;
    const Converted norm(op.weight, op.weight_dtype, op.bias, op.bias_dtype, op.d_model, op.kind);
    threads = useful_threads(threads, rows, rows * op.d_model);
    std::vector<float> scratch(threads * op.d_model);
    PYARITH_CALL(answer_logits, op, norm.weights, scratch.data(), threads)
}

void masked_adamw(const MaskedAdamw& op, int threads) {
    int64_t elements = 0;
    for (int64_t i = 0; i < op.slice_count; ++i) elements += op.slices[i].rows * op.slices[i].width;
    threads = useful_threads(threads, elements, elements);
    PYARITH_CALL(masked_adamw, op, threads)
}

}  // namespace pyarith::cpu
