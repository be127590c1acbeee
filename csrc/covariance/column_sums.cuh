// How the sm_90 covariance kernels sum columns of what lies in a stage.
#pragma once

#include "../mma_sm80.cuh"
#include "wgmma_tiles.h"

namespace lowrank_ops::covariance {

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
