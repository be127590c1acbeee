// Dtype, alignment and shape of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace lowrank_ops {

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: throw std::runtime_error("lowrank_ops: a tensor is not bfloat16, float16, float32 or float64");
  }
}

// Whether a matrix and each of its rows start on 16 bytes.
inline bool aligned(const torch::stable::Tensor& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0 &&
         (matrix.size(0) < 2 || matrix.stride(0) * static_cast<int64_t>(matrix.element_size()) % 16 == 0);
}

// "[12608, 768]"
inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string shape = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) shape += (i ? ", " : "") + std::to_string(tensor.size(i));
  return shape + "]";
}

}  // namespace lowrank_ops
