// The current stream and the facts about a tensor's device, through torch's C interface.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "planner.h"

// Weak: a torch without CUDA lacks this one symbol, and the library has to load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);

namespace lowrank_ops {

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lowrank_ops: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, "lowrank_ops: asking about CUDA device ", device,
                  " failed: ", cudaGetErrorString(error));
  return value;
}

inline Machine machine_of(int32_t device) {
  return {10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
              device_attribute(cudaDevAttrComputeCapabilityMinor, device),
          device_attribute(cudaDevAttrMultiProcessorCount, device),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: throw std::runtime_error("lowrank_ops: a tensor is not bfloat16, float16, float32 or float64");
  }
}

// Whether a matrix and each of its rows start on 16 bytes.
inline bool aligned(const torch::stable::Tensor& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0 &&
         (matrix.size(0) < 2 || matrix.stride(0) * static_cast<int64_t>(matrix.element_size()) % 16 == 0);
}

// "[12608, 768]"
inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string shape = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape += (i ? ", " : "") + std::to_string(tensor.size(i));
  return shape + "]";
}

}  // namespace lowrank_ops
