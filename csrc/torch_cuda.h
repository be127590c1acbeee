// The current stream and device attributes, through torch's C interface.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "planner.h"

// Weak: a torch without CUDA lacks this symbol, and the library has to load there, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace lowrank_ops {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lowrank_ops: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, "lowrank_ops: querying CUDA device ", device,
                  " failed: ", cudaGetErrorString(error));
  return value;
}

inline Machine machine_of(int32_t device) {
  return {10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
              device_attribute(cudaDevAttrComputeCapabilityMinor, device),
          device_attribute(cudaDevAttrMultiProcessorCount, device),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

}  // namespace lowrank_ops
