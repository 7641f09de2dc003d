// How a row of d_model elements is laid over a block: plain host code, tested without a GPU.
#pragma once

#include <cstdint>

namespace pyarith::cuda {

constexpr int most_threads = 512;  // what a block that keeps its row in registers may have, at 128 registers a thread

struct RowPlan {
    int threads;  // per block, a multiple of the warp
    int vectors;  // per thread, held in registers; 0 = the row does not fit or is not aligned: read it twice
};

// Few threads with several vectors each, rather than the reverse: more blocks are then resident, so that some load
// while others wait at the barriers of their sums. Beyond d_model 1024 a thread has 2 vectors of 8, beyond 4096 it has 4.
// `aligned`: every pointer is 16-byte aligned and d_model a multiple of `width`, so 16-byte accesses are allowed.
constexpr RowPlan row_plan(int64_t d_model, bool aligned, int width) {
    const int64_t units = aligned ? (d_model + width - 1) / width : d_model;
    const int vectors = !aligned || units <= 128 ? 1 : units <= 512 ? 2 : 4;
    const int64_t warps = (units + 32 * vectors - 1) / (32 * vectors);
    const bool fits = warps * 32 <= most_threads;
    const int threads = fits ? static_cast<int>(warps > 0 ? warps * 32 : 32) : most_threads;
    return {threads, aligned && fits ? vectors : 0};
}

}  // namespace pyarith::cuda
