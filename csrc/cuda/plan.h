// How a row of d_model elements is laid over a block: plain host code, tested without a GPU.
#pragma once

#include <cstdint>

namespace pyarith::cuda {

struct RowPlan {
    int threads;  // per block, a multiple of the warp
    int vectors;  // per thread, held in registers; 0 = the row does not fit or is not aligned: read it twice
};

// `aligned`: every pointer is 16-byte aligned and d_model a multiple of `width`, so 16-byte accesses are allowed.
constexpr RowPlan row_plan(int64_t d_model, bool aligned, int width) {
    const int64_t units = aligned ? (d_model + width - 1) / width : d_model;
    const int64_t most = 512;
    const int64_t warps = (units + 31) / 32;
    const int threads = static_cast<int>(warps * 32 < most ? (warps > 0 ? warps * 32 : 32) : most);
    const int64_t each = (units + threads - 1) / threads;
    if (!aligned || each > 4) return {threads, 0};
    return {threads, each <= 1 ? 1 : each <= 2 ? 2 : 4};
}

}  // namespace pyarith::cuda
