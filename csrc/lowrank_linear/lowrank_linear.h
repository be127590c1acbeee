// Launchers of the low-rank linear kernels. No torch.
#pragma once

#include <array>

#include "../launch.h"
#include "../planner.h"

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
  int64_t x_stride, down_stride, up_stride;  // elements between rows
  int64_t tokens, in_features, rank, out_features;
  int64_t split_features;
  int splits;
  int64_t resident_tiles;  // decode_sm90: 16-row tiles of up that a CTA keeps in shared memory
  Activation activation;
};

void launch_decode_sm80(const LowRankPlan& plan, const Arguments& arguments, Dtype dtype, const Launch& launch);
void launch_decode_sm90(const LowRankPlan& plan, const Arguments& arguments, Dtype dtype, const Launch& launch);
void launch_prefill_sm90(const LowRankPlan& plan, const Arguments& arguments, Dtype dtype, const Launch& launch);

// Machine::clusters of the current device, which has code for sm_90a.
std::array<int64_t, 3> count_clusters(const Launch& launch);

}  // namespace lowrank_ops::lowrank_linear
