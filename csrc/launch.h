// Errors of CUDA calls, told with the kernel, its shapes and the arch.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <stdexcept>
#include <string>

namespace lowrank_ops {

struct Launch {
  cudaStream_t stream;
  std::function<std::string()> what;  // "covariance_sm80 (...) on sm_86"; asked for only when something failed
};

inline void check(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here: the next launch, which asks for the last error, must not find it
  throw std::runtime_error("lowrank_ops: launching " + launch.what() + " failed: " + cudaGetErrorString(error));
}

// Lets a kernel without static shared memory have all that a block of the current device may ask for. What is allowed
// belongs to the kernel, not to the launch: were it what one launch needs, a launch of another shape on another thread
// could take it back in between.
inline void allow_all_shared_memory(const void* kernel, const Launch& launch) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), launch);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), launch);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), launch);
}

}  // namespace lowrank_ops
