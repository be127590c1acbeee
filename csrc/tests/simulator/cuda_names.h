// nvcc's built-in names for the simulated device. Included ahead of every kernel's source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "device.h"

#define threadIdx (::lowrank_ops::simulator::position().thread)
#define blockIdx (::lowrank_ops::simulator::position().cta)
// Not a macro: the runtime's structures have members of this name.
struct GridDim {
  struct {
    operator unsigned() const { return lowrank_ops::simulator::position().grid_size.x; }
  } x;
};
inline constexpr GridDim gridDim{};

#define __launch_bounds__(...)

using std::max;
using std::min;

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f && std::fabs(y) < INFINITY ? 0.0f : x / y; }

inline void __syncthreads() { lowrank_ops::simulator::sync_cta(); }
inline void __syncwarp() { lowrank_ops::simulator::sync_warp(); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  struct Exchange {
    T given, got;
    int lane, mask;
  } mine{value, {}, lowrank_ops::simulator::position().lane, lanes};
  lowrank_ops::simulator::converge_warp("__shfl_xor_sync", &mine, [](void* const* all) {
    for (int lane = 0; lane < 32; ++lane) {
      Exchange& to = *static_cast<Exchange*>(all[lane]);
      to.got = static_cast<const Exchange*>(all[to.lane ^ to.mask])->given;
    }
  });
  return mine.got;
}

namespace lowrank_ops::simulator {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  GridShape shape{config.gridDim, config.blockDim, static_cast<int64_t>(config.dynamicSmemBytes), 1, false, false,
                  false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      shape.has_cluster = true, shape.cluster = static_cast<int>(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = true;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) shape.pdl = true;
  }
  launch(shape, reinterpret_cast<const void*>(kernel),
         [kernel, copies = std::tuple<Arguments...>(arguments...)] { std::apply(kernel, copies); });
  return cudaSuccess;
}

}  // namespace lowrank_ops::simulator

// The only launch, in csrc/launch.h: the simulator takes the kernel and its arguments instead of their addresses.
#define cudaLaunchKernelExC(config, function, addresses)      \
  (static_cast<void>(addresses), static_cast<void>(function), \
   ::lowrank_ops::simulator::launch_kernel(*(config), kernel, arguments...))
