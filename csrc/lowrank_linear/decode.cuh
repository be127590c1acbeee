// Shared by the decode kernels: weights from global memory to mma.sync, the reduction over the warps of a CTA, and t
// from L2 to shared memory.
#pragma once

#include "../arch/mma.cuh"
#include "decode_layout.h"

namespace lowrank_ops::lowrank_linear {

constexpr int kPrefetch = 4;  // steps whose weights a warp has in flight
constexpr int kGather = 8;    // vectors of t that a thread has in flight

struct Vector {
  uint32_t words[4];  // 8 features
};

// 8 features of a row, zeros past its end. kVectorized: the row starts and ends on 16 bytes, so there are 8 or none:
// one predicated load. A branch for partial vectors would keep the compiler from issuing the loads of tokens together.
template <class Element, bool kVectorized>
__device__ __forceinline__ Vector load_features(const Element* row, int64_t feature, int64_t features, bool exists) {
  Vector v{{0, 0, 0, 0}};
  if (!exists || feature >= features) return v;
  if constexpr (kVectorized) {
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

// A warp's weights of one step: rows r and r + 8 of each 16-row tile.
template <int kRowTiles>
struct Weights {
  Vector rows[kRowTiles][2];
};

template <class Element, bool kVectorized, int kRowTiles>
__device__ __forceinline__ void load_weights(Weights<kRowTiles>& weights, const Element* weight, int64_t stride,
                                             int64_t first_row, int64_t rows, int64_t feature, int64_t features) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + tile * kRows + lane_row(threadIdx.x % 32) + half * 8;
      weights.rows[tile][half] =
          load_features<Element, kVectorized>(weight + row * stride, feature, features, row < rows);
    }
}

// The MMAs of one step with one group of 8 tokens.
template <class Element, int kRowTiles, int kTokenGroups>
__device__ __forceinline__ void mma_step(float (&acc)[kRowTiles][kTokenGroups][4], const Weights<kRowTiles>& weights,
                                         const Vector& tokens, int group) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector &top = weights.rows[tile][0], &bottom = weights.rows[tile][1];
      const uint32_t a[4] = {top.words[2 * half], bottom.words[2 * half], top.words[2 * half + 1],
                             bottom.words[2 * half + 1]};
      arch::mma_m16n8<Element>(acc[tile][group], a, tokens.words[2 * half], tokens.words[2 * half + 1]);
    }
}

// A warp's steps of rows of down times a token tile over features [begin, end). All row tiles share what is read of x.
template <class Element, int kRowTiles, int kTokenGroups, bool kVectorized>
__device__ __forceinline__ void mma_down(float (&acc)[kRowTiles][kTokenGroups][4], const Element* down,
                                         int64_t down_stride, int64_t first_row, int64_t rows, const Element* x,
                                         int64_t x_stride, int64_t first_token, int64_t tokens, int64_t begin,
                                         int64_t end) {
  constexpr int kMmas = kRowTiles * kTokenGroups;  // accumulators take the registers of steps in flight
  constexpr int kSteps = kMmas <= 8 ? kPrefetch : kMmas <= 16 ? kPrefetch / 2 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = static_cast<int>(ceil_div(end - begin, kFeatures));
  for (int i = 0; step_of_warp(warp, i) < steps; i += kSteps) {
    Weights<kRowTiles> weights[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      load_weights<Element, kVectorized>(weights[j], down, down_stride, first_row, rows,
                                         begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane),
                                         end);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int64_t feature = begin + int64_t{step_of_warp(warp, i + j)} * kFeatures + lane_feature(lane);
#pragma unroll
      for (int group = 0; group < kTokenGroups; ++group) {
        const int64_t token = first_token + group * 8 + lane_token(lane);
        mma_step<Element>(acc, weights[j],
                          load_features<Element, kVectorized>(x + token * x_stride, feature, end, token < tokens),
                          group);
      }
    }
  }
}

// Every warp's accumulators to shared memory, and a barrier.
template <int kRowTiles, int kTokenGroups>
__device__ __forceinline__ void store_warp_sums(const float (&acc)[kRowTiles][kTokenGroups][4], float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kTokenGroups; ++group)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[sum_index(warp, tile * kRows + arch::mma_accumulator_row(lane, e),
                       group * 8 + arch::mma_accumulator_col(lane, e), kRowTiles * kRows, kTokenGroups * 8)] =
            acc[tile][group][e];
  __syncthreads();
}

// In the order of the warps.
template <int kRowTiles, int kTokenGroups>
__device__ __forceinline__ float reduce_warp_sums(const float* sums, int row, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    sum += sums[sum_index(warp, row, token, kRowTiles * kRows, kTokenGroups * 8)];
  return sum;
}

// A token tile's t to shared memory: the `tokens` rows that exist, of `vectors` x 16 bytes, zeros in the others. All
// threads share all vectors, so that a thread waits for L2 once per kGather of them.
template <int kTokens>
__device__ __forceinline__ void gather_t(const uint4* from, int64_t tokens, int vectors, int64_t pitch,
                                         unsigned char* to) {
  const int total = kTokens * vectors, existing = static_cast<int>(min64(tokens, kTokens)) * vectors;
  const int rows_apart = kThreads / vectors, vectors_apart = kThreads % vectors;  // of a thread's vectors
  int row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
  for (int first = threadIdx.x; first < total; first += kGather * kThreads) {
    uint4 loaded[kGather];
#pragma unroll
    for (int j = 0; j < kGather; ++j)  // cached in L2 only: L1 is not coherent with the writes of other CTAs
      loaded[j] = first + j * kThreads < existing ? __ldcg(from + first + j * kThreads) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kGather; ++j) {
      if (first + j * kThreads < total) *reinterpret_cast<uint4*>(to + row * pitch + vector * 16) = loaded[j];
      vector += vectors_apart;
      row += rows_apart + (vector >= vectors);
      vector -= vector >= vectors ? vectors : 0;
    }
  }
}

__device__ __forceinline__ Vector load_shared(const unsigned char* row, int64_t feature, bool exists) {
  if (!exists) return {{0, 0, 0, 0}};
  const uint4 bits = *reinterpret_cast<const uint4*>(row + feature * 2);
  return {{bits.x, bits.y, bits.z, bits.w}};
}

}  // namespace lowrank_ops::lowrank_linear
