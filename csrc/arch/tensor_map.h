// Encodes the tensor maps (TMA descriptors) that tma.cuh loads by. Host only.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tuple>
#include <type_traits>

#include "../host_device.h"
#include "../launch.h"

namespace lowrank_ops::arch {

template <class Element>
constexpr CUtensorMapDataType kTensorMapType =
    std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// cuTensorMapEncodeTiled without linking the driver: the library has to load where there is none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder(const Launch& launch) {
  static const auto encode = [&] {  // looked up once; a failed lookup throws and is repeated
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          launch);
    check(found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported, launch);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

// A row-major matrix of 16-bit elements in tiles of tile_rows x tile_cols with the 128-byte swizzle. Rows start on
// 16 bytes; `stride` counts elements. Elements outside the matrix read as zero.
template <class Element>
CUtensorMap encode_tensor_map_2d(const void* matrix, int64_t rows, int64_t cols, int64_t stride, int tile_rows,
                                 int tile_cols, const Launch& launch) {
  CUtensorMap map;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  if (rows == 1) stride = round_up(cols, 8);  // the stride of a single row is arbitrary
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t tile[2] = {static_cast<cuuint32_t>(tile_cols), static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      tensor_map_encoder(launch)(&map, kTensorMapType<Element>, 2, const_cast<void*>(matrix), size, strides, tile,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, launch);
  return map;
}

// The same, kept for matrices that are used again: it depends on nothing but the arguments and the device.
template <class Element>
const CUtensorMap& tensor_map_of_weight(const void* matrix, int64_t rows, int64_t cols, int64_t stride, int tile_rows,
                                        int tile_cols, const Launch& launch) {
  return remember(std::tuple{launch.device, matrix, rows, cols, stride, tile_rows, tile_cols}, [&] {
    return encode_tensor_map_2d<Element>(matrix, rows, cols, stride, tile_rows, tile_cols, launch);
  });
}

}  // namespace lowrank_ops::arch
