// csrc/torch_cuda.h for host tensors and the simulated device.
#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "planner.h"

namespace lowrank_ops {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
  ~DeviceGuard() {}
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

inline Machine machine_of(int32_t) {
  const simulator::Config& config = simulator::config();
  return {config.capability, config.sm_count, config.shared_memory};
}

}  // namespace lowrank_ops
