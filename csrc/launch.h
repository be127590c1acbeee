// Errors of CUDA calls, told with the op, its shapes and the arch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace lowrank_ops {

// What is being launched, for messages: "covariance_sm80 (tokens 4096, features 768, bfloat16) on sm_86".
struct Launch {
  std::string what;
  cudaStream_t stream;
};

inline void check(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("lowrank_ops: launching " + launch.what + " failed: " + cudaGetErrorString(error));
}

}  // namespace lowrank_ops
