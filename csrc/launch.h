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
  throw std::runtime_error("lowrank_ops: launching " + launch.what() + " failed: " + cudaGetErrorString(error));
}

}  // namespace lowrank_ops
