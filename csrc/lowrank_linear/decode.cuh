// What the decode kernels share: weights from memory to the tensor cores, and the warps' sums.
#pragma once

#include "../mma_sm80.cuh"
#include "fragments.h"

namespace lowrank_ops::lowrank_linear {

constexpr int kAhead = 4;  // steps whose weights a warp has on the way

struct Vector {
  uint32_t words[4];  // 8 features
};

// 8 features of a row, zeros past its end. kAligned: the row starts and ends on 16 bytes, and `feature` is on 16 bytes, so
// that there are 8 or none: one predicated load. A branch for a part of them would keep the loads of tokens from being
// issued together, and each would wait for the product of the one before.
template <class Element, bool kAligned>
__device__ __forceinline__ Vector load_features(const Element* row, int64_t feature, int64_t features, bool exists) {
  Vector v{{0, 0, 0, 0}};
  if (!exists || feature >= features) return v;
  if constexpr (kAligned) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + feature));
    return {{bits.x, bits.y, bits.z, bits.w}};
  } else {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(row + feature);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (feature + e < features) v.words[e / 2] |= static_cast<uint32_t>(__ldg(bits + e)) << (e % 2 * 16);
    return v;
  }
}

// A warp's weights of one step: rows r and r + 8 of each 16-row product.
template <int kProducts>
struct Weights {
  Vector rows[kProducts][2];
};

template <class Element, bool kAligned, int kProducts>
__device__ __forceinline__ void load_weights(Weights<kProducts>& weights, const Element* weight, int64_t stride,
                                             int64_t first_row, int64_t rows, int64_t feature, int64_t features) {
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + p * kRows + lane_row(threadIdx.x % 32) + half * 8;
      weights.rows[p][half] =
          load_features<Element, kAligned>(weight + row * stride, feature, features, row < rows);
    }
}

template <class Element, int kProducts, int kGroups>
__device__ __forceinline__ void multiply(float (&acc)[kProducts][kGroups][4], const Weights<kProducts>& weights,
                                         const Vector& tokens, int group) {
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector &top = weights.rows[p][0], &bottom = weights.rows[p][1];
      const uint32_t a[4] = {top.words[2 * half], bottom.words[2 * half], top.words[2 * half + 1],
                             bottom.words[2 * half + 1]};
      multiply_add<Element>(acc[p][group], a, tokens.words[2 * half], tokens.words[2 * half + 1]);
    }
}

// A warp's products of 16 rows of a weight with a tile of tokens over features [begin, end), its steps only.
template <class Element, int kGroups, bool kAligned>
__device__ __forceinline__ void multiply_range(float (&acc)[1][kGroups][4], const Element* weight,
                                               int64_t weight_stride, int64_t first_row, int64_t rows,
                                               const Element* x, int64_t x_stride, int64_t first_token,
                                               int64_t tokens, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(end - begin, kFeatures));
  for (int i = 0; step_of_warp(warp, i) < steps; i += kAhead) {
    Weights<1> weights[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      load_weights<Element, kAligned>(weights[j], weight, weight_stride, first_row, rows,
                                      begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane),
                                      end);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t feature = begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t token = first_token + group * 8 + lane_token(lane);
        multiply<Element>(
            acc, weights[j],
            load_features<Element, kAligned>(x + token * x_stride, feature, end, token < tokens), group);
      }
    }
  }
}

// Leaves every warp's sums in shared memory.
template <int kProducts, int kGroups>
__device__ __forceinline__ void leave_sums(const float (&acc)[kProducts][kGroups][4], float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[sum_index(warp, p * kRows + accumulator_row(lane, e), group * 8 + accumulator_token(lane, e),
                       kProducts * kRows, kGroups * 8)] = acc[p][group][e];
  __syncthreads();
}

template <int kProducts, int kGroups>
__device__ __forceinline__ float sum_of_warps(const float* sums, int row, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    sum += sums[sum_index(warp, row, token, kProducts * kRows, kGroups * 8)];
  return sum;
}

}  // namespace lowrank_ops::lowrank_linear
