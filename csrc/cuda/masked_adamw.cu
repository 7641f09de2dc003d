// AdamW on compact slices, each new value rounded into its place in the full weight; the formula is in ops.h.
// Owner: a thread owns 8 elements of a slice that follow each other, and their places in the weight.
// Bytes per element: 28 (param and two moments read and written, grad read) + the weight's size, written.
// Accumulation: none; fp32, each operation rounded by itself.
// Bitwise repeatable, and the bits of the other backends: every element depends on its own inputs and number alone.
#include "cuda/common.cuh"

namespace pyarith::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int PER_BLOCK = THREADS * VECTOR;
constexpr int PARTS = 20, RUNS = 96;  // of one launch

// Some runs of a slice, all of its rows: [rows, width] at a distance of slice_width.
struct Part {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* weight;
    int64_t rows, width, slice_width, weight_width;
    int64_t first_element;  // its number in the slice
    int first_run, run_count, first_block;
    uint32_t slice;  // its number
    DType weight_dtype;
    bool vectors;  // whether 8 elements lie together and aligned everywhere
};

// Passed by value: no memory to allocate, to fill or to keep for a captured graph.
struct Batch {
    Part parts[PARTS];
    AdamwRun runs[RUNS];
    const float* grad_scale;
    AdamwFactors factors;
    uint64_t seed;
    uint32_t step;
    int part_count, run_count;
    int64_t blocks;
};
static_assert(sizeof(Batch) <= 4000, "kernels take at most 4 KB of arguments on older drivers");

struct Place {
    int64_t slice, weight;
};

__device__ inline Place place_of(const Batch& batch, const Part& part, int64_t i) {
    const int64_t row = quotient(i, part.width), column = i - row * part.width;
    int run = part.first_run, end = run + part.run_count;
    while (end - run > 1) {
        const int middle = (run + end) / 2;
        if (batch.runs[middle].begin <= column)
            run = middle;
        else
            end = middle;
    }
    const AdamwRun& found = batch.runs[run];
    return {row * part.slice_width + column, row * part.weight_width + found.weight_begin + column - found.begin};
}

// Random bits of the group of 8 elements that holds one.
__device__ inline Words drawn(const Batch& batch, const Part& part, int64_t element) {
    const uint64_t group = static_cast<uint64_t>(part.first_element + element) / VECTOR;
    return philox(batch.seed, {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), batch.step, part.slice}});
}

template <bool stochastic>
__device__ inline void update_vector(const Batch& batch, const Part& part, float scale, int64_t i) {
    const Place at = place_of(batch, part, i);
    const Packed grad = load_packed(part.grad, DType::f32, at.slice);
    const Packed param = load_packed(part.param, DType::f32, at.slice);
    const Packed exp_avg = load_packed(part.exp_avg, DType::f32, at.slice);
    const Packed exp_avg_sq = load_packed(part.exp_avg_sq, DType::f32, at.slice);
    float g[VECTOR], p[VECTOR], m[VECTOR], v[VECTOR];
    unpack(grad, DType::f32, g);
    unpack(param, DType::f32, p);
    unpack(exp_avg, DType::f32, m);
    unpack(exp_avg_sq, DType::f32, v);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) adamw(batch.factors, times(g[e], scale), p[e], m[e], v[e]);
    store_vector(part.exp_avg, DType::f32, at.slice, m);
    store_vector(part.exp_avg_sq, DType::f32, at.slice, v);
    store_vector(part.param, DType::f32, at.slice, p);
    if constexpr (stochastic) {
        const Words noise = drawn(batch, part, at.slice);
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            words[j] = rounded_by(p[2 * j], noise.at[j] & 0xffffu) | rounded_by(p[2 * j + 1], noise.at[j] >> 16) << 16;
        uint4* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(part.weight) + at.weight);
        *to = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        store_vector(part.weight, part.weight_dtype, at.weight, p);
    }
}

template <bool stochastic>
__device__ inline void update_one(const Batch& batch, const Part& part, float scale, int64_t i) {
    const Place at = place_of(batch, part, i);
    float p = part.param[at.slice], m = part.exp_avg[at.slice], v = part.exp_avg_sq[at.slice];
    adamw(batch.factors, times(part.grad[at.slice], scale), p, m, v);
    part.param[at.slice] = p;
    part.exp_avg[at.slice] = m;
    part.exp_avg_sq[at.slice] = v;
    if constexpr (stochastic) {
        const Words noise = drawn(batch, part, at.slice);
        const int e = static_cast<int>((part.first_element + at.slice) % VECTOR), j = e / 2;
        const uint32_t word = j == 0 ? noise.at[0] : j == 1 ? noise.at[1] : j == 2 ? noise.at[2] : noise.at[3];
        const uint32_t half = e % 2 == 0 ? word & 0xffffu : word >> 16;
        static_cast<uint16_t*>(part.weight)[at.weight] = static_cast<uint16_t>(rounded_by(p, half));
    } else {
        store_one(part.weight, part.weight_dtype, at.weight, p);
    }
}

template <bool stochastic>
__global__ void __launch_bounds__(THREADS) update(const __grid_constant__ Batch batch) {
    const int block = static_cast<int>(blockIdx.x);
    int number = 0;
    while (number + 1 < batch.part_count && batch.parts[number + 1].first_block <= block) ++number;
    const Part& part = batch.parts[number];
    const float scale = batch.grad_scale ? *batch.grad_scale : 1.0f;
    const int64_t begin = static_cast<int64_t>(block - part.first_block) * PER_BLOCK, count = part.rows * part.width;
    if (part.vectors) {
        const int64_t i = begin + static_cast<int64_t>(threadIdx.x) * VECTOR;
        if (i < count) update_vector<stochastic>(batch, part, scale, i);
        return;
    }
    for (int64_t i = begin + threadIdx.x; i < count && i < begin + PER_BLOCK; i += THREADS)
        update_one<stochastic>(batch, part, scale, i);
}

const char* start(Batch& batch, bool stochastic, cudaStream_t stream) {
    if (batch.part_count == 0) return nullptr;
    if (batch.blocks > INT32_MAX) return "masked_adamw: more than 2^31 - 1 blocks in one launch";
    const dim3 grid(static_cast<unsigned>(batch.blocks)), block(THREADS);
    const char* error = launch(stochastic ? update<true> : update<false>, grid, block, stream, batch);
    batch.part_count = batch.run_count = 0;
    batch.blocks = 0;
    return error;
}

// Appends the runs from `first` on, as many as there is room for; returns the next one.
int64_t append(Batch& batch, const AdamwSlice& slice, int64_t number, int64_t first) {
    const int64_t room = RUNS - batch.run_count, left = slice.run_count - first;
    const int64_t next = first + (left < room ? left : room), begin = slice.runs[first].begin;
    const int64_t end = next < slice.run_count ? slice.runs[next].begin : slice.width;
    Part part{slice.param + begin,      slice.grad + begin, slice.exp_avg + begin,
              slice.exp_avg_sq + begin, slice.weight,       slice.rows,
              end - begin,              slice.width,        slice.weight_width,
              begin,                    batch.run_count,    static_cast<int>(next - first),
              static_cast<int>(batch.blocks),               static_cast<uint32_t>(number),
              slice.weight_dtype,       false};
    int64_t steps = begin | (end - begin);
    if (slice.rows > 1) steps |= slice.width | slice.weight_width;
    for (int64_t r = first; r < next; ++r) {
        const AdamwRun run{slice.runs[r].begin - begin, slice.runs[r].weight_begin};
        steps |= run.begin | run.weight_begin;
        batch.runs[batch.run_count++] = run;
    }
    part.vectors =
        steps % VECTOR == 0 && aligned({part.param, part.grad, part.exp_avg, part.exp_avg_sq, part.weight});
    batch.parts[batch.part_count++] = part;
    batch.blocks += (part.rows * part.width + PER_BLOCK - 1) / PER_BLOCK;
    return next;
}

}  // namespace

const char* masked_adamw(const MaskedAdamw& op, uintptr_t stream_value) {
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_value);
    Batch batch{};
    batch.grad_scale = op.grad_scale;
    batch.factors = op.factors;
    batch.seed = op.seed;
    batch.step = op.step;
    for (int64_t number = 0; number < op.slice_count; ++number) {
        const AdamwSlice& slice = op.slices[number];
        if (slice.rows * slice.width == 0) continue;
        for (int64_t run = 0; run < slice.run_count;) {
            if (batch.part_count == PARTS || batch.run_count == RUNS)
                if (const char* error = start(batch, op.stochastic, stream)) return error;
            run = append(batch, slice, number, run);
        }
    }
    return start(batch, op.stochastic, stream);
}

}  // namespace pyarith::cuda
