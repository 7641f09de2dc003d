// What a kernel may be given: views of tensors, and the checks that memory safety needs. Only bindings.cpp reads this.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "pyarith/dlpack.h"
#include "pyarith/ops.h"

namespace pyarith {

constexpr int cpu_device = 1;  // kDLCPU

// A tensor argument; undefined for None. Sizes and strides are borrowed from the tensor.
struct Tensor {
    DLTensor view{};
    bool defined = false;

    void* data() const { return defined ? static_cast<char*>(view.data) + view.byte_offset : nullptr; }
    int64_t size(int axis) const { return view.shape[axis]; }

    DType dtype() const {
        const auto [code, bits, lanes] = view.dtype;
        if (lanes == 1 && code == 2 && bits == 32) return DType::f32;
        if (lanes == 1 && code == 2 && bits == 16) return DType::f16;
        if (lanes == 1 && code == 2 && bits == 64) return DType::f64;
        if (lanes == 1 && code == 4 && bits == 16) return DType::bf16;
        if (lanes == 1 && code == 6 && bits == 8) return DType::boolean;
        throw std::invalid_argument("a dtype that no kernel knows");
    }
    DType dtype_or(DType other) const { return defined ? dtype() : other; }
};

inline bool contiguous(const DLTensor& view, int from = 0) {
    int64_t expected = 1;
    for (int axis = view.ndim - 1; axis >= from; --axis) {
        if (view.shape[axis] != 1 && view.strides[axis] != expected) return false;
        expected *= view.shape[axis];
    }
    return true;
}

inline bool empty(const DLTensor& view) {
    for (int axis = 0; axis < view.ndim; ++axis)
        if (view.shape[axis] == 0) return true;
    return false;
}

inline int64_t bytes(const DLTensor& view) {
    int64_t size = view.dtype.bits / 8;
    for (int axis = 0; axis < view.ndim; ++axis) size *= view.shape[axis];
    return size;
}

[[noreturn]] inline void refuse(const char* name, const std::string& expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected);
}

// How many leading dimensions may have any stride.
enum class Layout { contiguous, strided_rows, contiguous_heads };

inline void expect(const char* name, const Tensor& tensor, int device, const int64_t* shape, int axes,
                   std::initializer_list<DType> dtypes, Layout layout = Layout::contiguous) {
    if (!tensor.defined) return;
    const DLTensor& view = tensor.view;
    if (view.device.device_type != device) refuse(name, device == cpu_device ? "a CPU tensor" : "a CUDA tensor");
    bool fits = view.ndim == axes;
    for (int axis = 0; fits && axis < axes; ++axis) fits = view.shape[axis] == shape[axis];
    if (!fits) refuse(name, "another shape");
    bool known = false;
    for (DType dtype : dtypes) known = known || tensor.dtype() == dtype;
    if (!known) refuse(name, "a dtype that this kernel reads");
    const int from = layout == Layout::contiguous ? 0 : layout == Layout::strided_rows ? 1 : view.ndim - 2;
    if (!empty(view) && !contiguous(view, from)) refuse(name, "a contiguous tensor");
}

inline void expect(const char* name, const Tensor& tensor, int device, std::initializer_list<int64_t> shape,
                   std::initializer_list<DType> dtypes, Layout layout = Layout::contiguous) {
    expect(name, tensor, device, shape.begin(), static_cast<int>(shape.size()), dtypes, layout);
}

}  // namespace pyarith
