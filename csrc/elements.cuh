// 16-bit elements: rounding, and pairs packed in a 32-bit register, the lower element first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lowrank_ops {

template <class Element>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

__device__ __forceinline__ float2 to_float2(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 to_float2(__half2 pair) { return __half22float2(pair); }

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  return to_float2(reinterpret_cast<const typename PairOf<Element>::type&>(bits));
}

__device__ __forceinline__ __nv_bfloat162 round_pair(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ __half2 round_pair(float low, float high, __half) { return __floats2half2_rn(low, high); }

// Rounds to nearest.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const auto pair = round_pair(low, high, Element{});
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class Element>
__device__ __forceinline__ uint32_t pack(Element low, Element high) {
  return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(low)) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(high)) << 16;
}

__device__ __forceinline__ __nv_bfloat16 round_to(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ __half round_to(float value, __half) { return __float2half_rn(value); }

}  // namespace lowrank_ops
