// The epilogue: bias and activation before y is rounded.
#pragma once

#include "../elements.cuh"
#include "activation.h"
#include "arguments.h"

namespace lowrank_ops::lowrank_linear {

// y sigmoid(x), accurate to some ulps of float32, fewer with larger |x|: y is rounded to 16 bits. Underflows to zero.
__device__ __forceinline__ float times_sigmoid(float y, float x) { return __fdividef(y, 1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::none: return y;
    case Activation::relu: return y < 0.0f ? 0.0f : y;  // keeps NaN
    case Activation::gelu: return gelu(y);
    case Activation::gelu_tanh:  // 1 + tanh(x) is 2 sigmoid(2 x)
      return times_sigmoid(y, 2.0f * 0.79788456080286536f * (y + 0.044715f * y * y * y));
    case Activation::silu: return times_sigmoid(y, y);
  }
  return y;
}

// All values with one switch.
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

// One element of y: bias, activation, rounding.
template <class Element>
__device__ __forceinline__ void store_output(const Arguments& args, int64_t token, int64_t n, float y) {
  if (args.bias) y += static_cast<float>(static_cast<const Element*>(args.bias)[n]);
  static_cast<Element*>(args.y)[token * args.out_features + n] = round_to(activate(y, args.activation), Element{});
}

}  // namespace lowrank_ops::lowrank_linear
