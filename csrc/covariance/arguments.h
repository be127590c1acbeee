// The argument of the covariance kernels.
#pragma once

#include "../problem.h"
#include "patches.h"

namespace lowrank_ops::covariance {

struct Arguments {
  const void* x;         // first element of the first group
  int64_t x_row_stride;  // elements between tokens; unused for patches
  int64_t x_group_stride;
  Patches patches;  // for Source::patches
  int64_t tokens;
  int64_t features;
  int64_t groups;

  void* second_moment;  // (groups, features, features), only row >= column is written
  int64_t state_group_stride, state_row_stride, state_col_stride;
  void* total;  // (groups, features)
  int64_t total_group_stride, total_stride;
  bool state_is_double;

  float* scratch;  // plan.scratch_floats
  int64_t tiles;
  int64_t whole;  // the first tiles, which are not split
  int64_t splits;
  int64_t tokens_per_split;
};

}  // namespace lowrank_ops::covariance
