// Included before every csrc/cuda/*.cu when it is compiled by g++ (see build.py): the CUDA language as plain C++.
// Types and conversions are the toolkit's own headers; here is only what nvcc builds in. Kernels run in runtime.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

// Blocks run one after the other, so one copy of each array serves them all.
#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace pyarith::emulator {

struct Site {
    const char* file;
    int line;
};

// By functions, not by variables: the checker must not take reads of them for accesses of the kernel.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

void barrier(Site site);
uint64_t exchange(unsigned mask, uint64_t bits, int source_lane, Site site);

// Runs body(call) once for every thread; returns null or what went wrong. `call`: arguments that any thread may read.
const char* run(dim3 grid, dim3 block, void (*body)(const void* call), const void* call, size_t call_size);

template <class T>
T exchange_value(unsigned mask, T value, int source_lane, Site site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, source_lane, site);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int lane() {
    const dim3 t = thread_index(), size = block_size();
    return static_cast<int>((t.x + size.x * (t.y + size.y * t.z)) % 32);
}

}  // namespace pyarith::emulator

namespace pyarith::cuda {

// In place of the one in common.cuh, which exists for nvcc only.
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t, Args... args) {
    struct Call {
        void (*kernel)(Params...);
        std::tuple<Params...> params;
    } call{kernel, std::tuple<Params...>(args...)};
    const auto body = [](const void* c) {
        const Call& mine = *static_cast<const Call*>(c);
        std::apply(mine.kernel, mine.params);
    };
    return emulator::run(grid, block, body, &call, sizeof call);
}

}  // namespace pyarith::cuda

#define threadIdx (::pyarith::emulator::thread_index())
#define blockIdx (::pyarith::emulator::block_index())
#define blockDim (::pyarith::emulator::block_size())
#define gridDim (::pyarith::emulator::grid_size())

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    ::pyarith::emulator::barrier({file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    const int lane = ::pyarith::emulator::lane(), source = lane ^ lane_mask;
    const bool inside = source / width <= lane / width;  // beyond its own group of `width` a lane gets its own value
    return ::pyarith::emulator::exchange_value(mask, value, inside ? source : lane, {file, line});
}
