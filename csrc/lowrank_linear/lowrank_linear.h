// Launchers of the low-rank linear kernels. No torch.
#pragma once

#include <array>

#include "../launch.h"
#include "../planner.h"
#include "arguments.h"

namespace lowrank_ops::lowrank_linear {

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
