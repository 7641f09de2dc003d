// The part of the DLPack 1.2 C ABI that bindings.cpp uses: a plain view of a tensor, and the table of
// functions that torch.Tensor publishes as `__dlpack_c_exchange_api__`. Field order is the ABI.
#pragma once

#include <cstdint>

extern "C" {

struct DLDevice {
    int32_t device_type;  // 1 = CPU, 2 = CUDA
    int32_t device_id;
};

struct DLDataType {
    uint8_t code;  // 2 = IEEE float, 4 = bfloat16, 6 = bool
    uint8_t bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DLPackVersion {
    uint32_t major;
    uint32_t minor;
};

struct DLPackExchangeAPI {
    DLPackVersion version;
    void* prev_api;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // extern "C"
