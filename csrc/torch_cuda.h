// The current stream, through torch's C interface, and the device's attributes.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "lowrank_linear/lowrank_linear.h"
#include "planner.h"
#include "remember.h"

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

// Of the current device.
inline const Machine& machine_of(int32_t device) {
  return remember(device, [&] {
    Machine machine{10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                        device_attribute(cudaDevAttrComputeCapabilityMinor, device),
                    device_attribute(cudaDevAttrMultiProcessorCount, device),
                    device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
#ifdef LOWRANK_OPS_SM90
    const auto what = [] { return std::string("a kernel with clusters"); };
    if (machine.capability == 90)
      machine.clusters = lowrank_linear::count_clusters({nullptr, device, machine.shared_memory, what});
#endif
    return machine;
  });
}

}  // namespace lowrank_ops
