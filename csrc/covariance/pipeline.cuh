// What the sm_90 covariance kernels share: the stages between the warp that brings operands and those that multiply
// them, and the sums of columns.
#pragma once

#include "../mma_sm80.cuh"
#include "../mma_sm90.cuh"
#include "wgmma_tiles.h"

namespace lowrank_ops::covariance {

// A stage has a pair of barriers; both are told by the number of the step that uses it.
template <int kStages, int kStageBytes>
struct Pipeline {
  uint32_t barriers;
  uint32_t stages;
  __device__ uint32_t full(int step) const { return barriers + step % kStages * 16; }
  __device__ uint32_t empty(int step) const { return full(step) + 8; }
  __device__ uint32_t stage(int step) const { return stages + step % kStages * kStageBytes; }
  __device__ static int parity(int step) { return step / kStages % 2; }

  // One thread, which then has to fence them. A stage is empty when `arrivals` have come.
  __device__ void init(int arrivals) const {
    for (int stage = 0; stage < kStages; ++stage) {
      sm90::init_barrier(full(stage), 1);
      sm90::init_barrier(empty(stage), arrivals);
    }
  }
};

// In shared memory: what each consumer has summed of its two columns.
struct Sums {
  double values[wgmma::kConsumers][2];

  // All threads, once all consumers have left theirs.
  __device__ double of_column(int column) const {
    double sum = 0.0;
    for (int group = 0; group < wgmma::kSumGroups; ++group)
      sum += values[wgmma::sum_consumer(group, column)][column % 2];
    return sum;
  }
};

// Adds a consumer's part of a stage to the sums of its two columns, the first of which lies `columns` bytes in.
template <class Element>
__device__ __forceinline__ void add_columns(float (&sum)[2], const unsigned char* stage, int columns, int consumer) {
#pragma unroll
  for (int i = 0; i < wgmma::kSumTokens; ++i) {
    const float2 pair = unpack<Element>(*reinterpret_cast<const uint32_t*>(
        stage + columns + wgmma::feature_offset(wgmma::sum_token(consumer, i), wgmma::sum_feature(consumer))));
    sum[0] += pair.x;
    sum[1] += pair.y;
  }
}

}  // namespace lowrank_ops::covariance
