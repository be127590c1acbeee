// The arguments of the low-rank linear kernels.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace lowrank_ops::lowrank_linear {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

struct Arguments {
  const void* x;                             // (tokens, in_features)
  const void* down;                          // (rank, in_features)
  const void* up;                            // (out_features, rank)
  const void* bias;                          // (out_features,) or null
  void* y;                                   // (tokens, out_features), contiguous
  float* scratch;                            // decode_sm80: decode_layout.h
                                             // decode_sm90: t (tokens, rank) in the dtype of x
  unsigned* counters;                        // decode_sm80: of the units of down, where features are split
  int64_t x_stride, down_stride, up_stride;  // elements between rows
  int64_t tokens, in_features, rank, out_features;
  int64_t split_features;
  int splits;
  int64_t resident_tiles;  // decode_sm90: 16-row tiles of up that a CTA keeps in shared memory
  Activation activation;
};

// What a launch computes: a layer, or the members of lowrank_linear_grouped.
struct Group {
  Arguments members[kMaxMembers];
  int count;
  int downs;     // 1 where all members have the first one's down, and so its t; else `count`
  int64_t rank;  // the largest
};

}  // namespace lowrank_ops::lowrank_linear
