// Launching kernels, and errors of CUDA calls, told with the kernel, its shapes and the arch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
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

// How a kernel is spread over a device.
struct Grid {
  dim3 blocks;
  int threads;                // per block
  int64_t shared_bytes;       // of dynamic shared memory, per block
  int cluster = 0;            // blocks that share their shared memory, one as well; 0: not told, for kernels without
  bool all_at_once = false;   // starts when all blocks can, or fails: the kernel has a barrier for all
  bool may_overlap = false;   // may start before the kernel before it has ended, for which it waits itself
};

// The form that the runtime takes; lasts as long as what it is made from.
class LaunchConfig {
 public:
  LaunchConfig(const Grid& grid, const Launch& launch) {
    config_.gridDim = grid.blocks;
    config_.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config_.stream = launch.stream;
    config_.attrs = attributes_;
    if (grid.cluster > 0) {
      cudaLaunchAttribute& attribute = add(cudaLaunchAttributeClusterDimension);
      attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (grid.all_at_once) add(cudaLaunchAttributeCooperative).val.cooperative = 1;
    if (grid.may_overlap)
      add(cudaLaunchAttributeProgrammaticStreamSerialization).val.programmaticStreamSerializationAllowed = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute;
  }
  cudaLaunchAttribute attributes_[3]{};
  cudaLaunchConfig_t config_{};
};

template <class T>
struct Exactly {
  using type = T;
};

// The arguments have to be of the kernel's own types: they are handed over by address.
template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Grid& grid, const Launch& launch,
                   const typename Exactly<Parameters>::type&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernelExC(LaunchConfig(grid, launch).get(), reinterpret_cast<const void*>(kernel), addresses),
        launch);
}

}  // namespace lowrank_ops
