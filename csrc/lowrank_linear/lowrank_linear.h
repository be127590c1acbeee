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

// Divides the scratch, which the first member points to: floats(rank) for each down. Returns the end of the last part.
template <class Floats>
float* place_scratch(Group& group, const Floats& floats) {
  float* next = group.members[0].scratch;
  for (int i = 0; i < group.downs; ++i) {
    group.members[i].scratch = next;
    next += floats(group.members[i].rank);
  }
  for (int i = group.downs; i < group.count; ++i) group.members[i].scratch = group.members[0].scratch;
  return next;
}

void launch_decode_sm80(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch);
void launch_decode_sm90(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch);
void launch_prefill_sm90(const LowRankPlan& plan, const Group& group, Dtype dtype, const Launch& launch);

// Machine::clusters of the current device, which has code for sm_90a.
std::array<int64_t, 3> count_clusters(const Launch& launch);

}  // namespace lowrank_ops::lowrank_linear
