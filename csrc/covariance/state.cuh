// Adding to the state: float or double, any strides, the lower triangle only.
#pragma once

#include "covariance.h"

namespace lowrank_ops::covariance {

__device__ __forceinline__ void add_to_state(const Arguments& args, int64_t group, int64_t row, int64_t col,
                                             double value) {
  if (row >= args.features || col > row) return;
  const int64_t at = group * args.state_group_stride + row * args.state_row_stride + col * args.state_col_stride;
  if (args.state_is_double)
    static_cast<double*>(args.second_moment)[at] += value;
  else
    static_cast<float*>(args.second_moment)[at] =
        static_cast<float>(static_cast<float*>(args.second_moment)[at] + value);
}

__device__ __forceinline__ void add_to_total(const Arguments& args, int64_t group, int64_t feature, double value) {
  const int64_t at = group * args.total_group_stride + feature * args.total_stride;
  if (args.state_is_double)
    static_cast<double*>(args.total)[at] += value;
  else
    static_cast<float*>(args.total)[at] = static_cast<float>(static_cast<float*>(args.total)[at] + value);
}

}  // namespace lowrank_ops::covariance
