// Descriptions of matrices for the tensor copy engine of compute capability 9.0.
#pragma once

#include <cuda.h>

#include "host_device.h"
#include "launch.h"

namespace lowrank_ops::sm90 {

// The driver's function, without linking the driver: the library has to load where there is none.
inline decltype(&cuTensorMapEncodeTiled) encoder(const Launch& launch) {
  static const auto encode = [&] {  // asked for by name once, and again only where that failed
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          launch);
    check(found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported, launch);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

// A matrix of 16-bit values, row-major with rows on 16 bytes, brought in boxes with the 128-byte swizzle; what a box
// has outside of the matrix becomes zero.
inline CUtensorMap matrix_map(CUtensorMapDataType type, const void* matrix, int64_t rows, int64_t cols, int64_t stride,
                              int box_rows, int box_cols, const Launch& launch) {
  CUtensorMap map;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  if (rows == 1) stride = round_up(cols, 8);  // one row has any stride
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encoder(launch)(&map, type, 2, const_cast<void*>(matrix), size, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, launch);
  return map;
}

}  // namespace lowrank_ops::sm90
