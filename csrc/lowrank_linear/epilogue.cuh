// What becomes of a sum before it is stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lowrank_linear.h"

namespace lowrank_ops::lowrank_linear {

// y sigmoid(x), to some units in float32's last place, more with |x|: it is rounded to 16 bits. Far below zero it is zero.
__device__ __forceinline__ float times_sigmoid(float y, float x) { return __fdividef(y, 1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::none: return y;
    case Activation::relu: return y < 0.0f ? 0.0f : y;  // keeps NaN
    case Activation::gelu: return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
    case Activation::gelu_tanh:  // 1 + tanh(x) is 2 sigmoid(2 x)
      return times_sigmoid(y, 2.0f * 0.79788456080286536f * (y + 0.044715f * y * y * y));
    case Activation::silu: return times_sigmoid(y, y);
  }
  return y;
}

// The same for many, asking once which it is.
template <int kValues>
__device__ __forceinline__ void activate_all(float (&values)[kValues], Activation activation) {
  const auto each = [&](Activation known) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = activate(values[i], known);
  };
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return each(Activation::relu);
    case Activation::gelu: return each(Activation::gelu);
    case Activation::gelu_tanh: return each(Activation::gelu_tanh);
    case Activation::silu: return each(Activation::silu);
  }
}

__device__ __forceinline__ __nv_bfloat16 round_to(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ __half round_to(float value, __half) { return __float2half_rn(value); }

}  // namespace lowrank_ops::lowrank_linear
