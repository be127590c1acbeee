// The CUDA runtime and driver functions that the launchers call, for the simulated device.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "device.h"
#include "matrices.h"

namespace sim = lowrank_ops::simulator;

namespace lowrank_ops::simulator {

HostCalls& host_calls() {
  static HostCalls calls;
  return calls;
}

}  // namespace lowrank_ops::simulator

namespace {

// Refuses what the driver refuses.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++sim::host_calls().tensor_maps;
  const bool supported = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                         rank == 2 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && steps[0] == 1 && steps[1] == 1;
  const bool legal = reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0 &&
                     strides[0] >= sizes[0] * 2 && strides[0] < (cuuint64_t{1} << 40) && sizes[0] > 0 && sizes[1] > 0 &&
                     sizes[0] <= (cuuint64_t{1} << 32) && sizes[1] <= (cuuint64_t{1} << 32) && box[0] > 0 &&
                     box[0] * 2 <= 128 && box[0] * 2 % 16 == 0 && box[1] > 0 && box[1] <= 256;
  if (!supported || !legal) return CUDA_ERROR_INVALID_VALUE;
  const sim::TensorMap matrix{
      static_cast<const unsigned char*>(address), static_cast<int64_t>(sizes[1]), static_cast<int64_t>(sizes[0]),
      static_cast<int64_t>(strides[0]),           static_cast<int>(box[1]),       static_cast<int>(box[0])};
  std::memcpy(map, &matrix, sizeof(matrix));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++sim::host_calls().function_attributes;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value > sim::config().shared_memory) return cudaErrorInvalidValue;
  sim::allow_shared_bytes(kernel, value);
  return cudaSuccess;
}

// At once: the memory is new, and no kernel that is queued uses it.
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  int ctas = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      ctas = static_cast<int>(config->attrs[i].val.clusterDim.x);
  if (ctas == 0) return cudaErrorInvalidClusterSize;  // the attribute is required, also for 1
  *clusters = sim::config().sm_count / ctas;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
