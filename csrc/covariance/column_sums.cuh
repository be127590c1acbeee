// Column sums of the sm_90 covariance kernels, from the operands in shared memory.
#pragma once

#include "../elements.cuh"
#include "wgmma_tiles.h"

namespace lowrank_ops::covariance {

// In shared memory: every consumer's sums of its two columns.
struct ColumnSums {
  double values[wgmma::kConsumers][2];

  // Any thread, after a barrier behind the consumers' writes.
  __device__ double of_column(int column) const {
    double sum = 0.0;
    for (int group = 0; group < wgmma::kSumGroups; ++group)
      sum += values[wgmma::sum_consumer(group, column)][column % 2];
    return sum;
  }
};

// Adds a consumer's tokens of a stage to the sums of its two columns. `columns`: offset of the tile's first column.
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
