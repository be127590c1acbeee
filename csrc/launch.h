// Launching kernels. A failed CUDA call becomes an exception that names the kernel, its shapes and the arch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "planner.h"
#include "remember.h"

namespace lowrank_ops {

struct Launch {
  cudaStream_t stream;
  int device;                         // the current one
  int64_t shared_memory;              // that its CTAs may opt in to
  std::function<std::string()> what;  // "covariance_sm80 (...) on sm_86"; called only after a failure
};

inline void check(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("lowrank_ops: launching " + launch.what() + " failed: " + cudaGetErrorString(error));
}

// The function to launch for a kernel: the kernel itself, unless NVRTC compiled it (nvrtc.cpp).
#ifdef LOWRANK_OPS_NVRTC
const void* function_of(const void* kernel, const Launch& launch);
#else
inline const void* function_of(const void* kernel, const Launch&) { return kernel; }
#endif

// More than 48 KB of dynamic shared memory needs an opt-in, once. It belongs to the kernel, not to the launch: `bytes`
// is the same in all calls for a kernel, which opts in to the maximum if its size varies, or a launch on another thread
// could lower the limit before this one.
template <class... Parameters>
void opt_in_shared_memory(void (*kernel)(Parameters...), int64_t bytes, const Launch& launch) {
  const void* const function = function_of(reinterpret_cast<const void*>(kernel), launch);
  remember(std::tuple{launch.device, function, bytes}, [&] {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), launch);
    return true;
  });
}

struct LaunchShape {
  dim3 grid;
  int threads;               // per CTA
  int64_t shared_bytes;      // dynamic shared memory per CTA
  int cluster = 0;           // CTAs per cluster; 0: no cluster attribute
  bool cooperative = false;  // all CTAs are co-resident, for a grid barrier
  bool pdl = false;          // programmatic dependent launch: may start before the previous kernel has completed
};

// The runtime's form of it. It points into itself.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, const Launch& launch) {
    config_.gridDim = shape.grid;
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config_.stream = launch.stream;
    config_.attrs = attributes_;
    if (shape.cluster > 0) {
      cudaLaunchAttribute& attribute = add(cudaLaunchAttributeClusterDimension);
      attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) add(cudaLaunchAttributeCooperative).val.cooperative = 1;
    if (shape.pdl)
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

// Arguments are passed by address and so have exactly the kernel's parameter types.
template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, const Launch& launch,
                   const typename Exactly<Parameters>::type&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const void* const function = function_of(reinterpret_cast<const void*>(kernel), launch);
  check(cudaLaunchKernelExC(LaunchConfig(shape, launch).get(), function, addresses), launch);
}

// Calls `f` with a value of the 16-bit element type.
template <class F>
void dispatch_16_bit(Dtype dtype, const F& f) {
  if (dtype == Dtype::bfloat16) return f(__nv_bfloat16{});
  f(__half{});
}

// Calls f(element, i) for each variant i of a kernel, a constant, until it returns true: that variant was planned.
template <class F, size_t... kVariants>
void dispatch_variant(Dtype dtype, const Launch& launch, std::index_sequence<kVariants...>, const F& f) {
  dispatch_16_bit(dtype, [&](auto element) {
    const bool launched = (f(element, std::integral_constant<size_t, kVariants>{}) || ...);
    check(launched ? cudaSuccess : cudaErrorInvalidValue, launch);
  });
}

}  // namespace lowrank_ops
