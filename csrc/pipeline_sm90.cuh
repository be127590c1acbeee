// The stages between the warp that brings operands to shared memory and those that multiply them (sm_90a).
#pragma once

#include "mma_sm90.cuh"

namespace lowrank_ops::sm90 {

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
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), arrivals);
    }
  }
};

}  // namespace lowrank_ops::sm90
