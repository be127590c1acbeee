// The shared-memory pipeline between a TMA producer thread and MMA consumer warps (sm_90).
#pragma once

#include "cluster.cuh"
#include "mbarrier.cuh"

namespace lowrank_ops::arch {

// kStages stages, each with a full and an empty mbarrier. A stage is named by the number of the step that uses it.
//   full:  one arrival with expect_tx by the producer; completed by the TMA bytes.
//   empty: one arrival per consumer warp and CTA of the cluster that writes to this CTA's stages (kCtas).
template <int kStages, int kStageBytes, int kCtas = 1>
struct Pipeline {
  uint32_t mbarriers;
  uint32_t stages;

  __device__ uint32_t full(int step) const { return mbarriers + step % kStages * 16; }
  __device__ uint32_t empty(int step) const { return full(step) + 8; }
  __device__ uint32_t stage(int step) const { return stages + step % kStages * kStageBytes; }
  __device__ static int parity(int step) { return step / kStages % 2; }

  // One thread; fence_mbarrier_init and a barrier have to follow.
  __device__ void init(int consumer_warps) const {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), kCtas * consumer_warps);
    }
  }

  // Producer: waits until the stage is empty and expects `bytes`. The first round finds every stage empty.
  __device__ void producer_acquire(int step, int bytes) const {
    mbarrier_wait(empty(step), parity(step) ^ 1);
    mbarrier_arrive_expect_tx(full(step), bytes);
  }
  // A CTA must not exit while a peer may still arrive on its mbarriers: waits until all stages are released.
  __device__ void producer_tail(int step) const {
    for (const int end = step + kStages; step < end; ++step) mbarrier_wait(empty(step), parity(step) ^ 1);
  }

  __device__ void consumer_wait(int step) const { mbarrier_wait(full(step), parity(step)); }

  // A warp has read the stage. Its first kCtas lanes arrive, each at one CTA that writes to the stage by multicast;
  // where only this CTA writes to it (`multicast` false), all of them arrive here.
  __device__ __forceinline__ void consumer_release(int step, int thread, bool multicast = kCtas > 1) const {
    if (thread % 32 >= kCtas) return;
    if (kCtas > 1 && multicast)
      mbarrier_arrive_cluster(mapa(empty(step), thread % 32));
    else
      mbarrier_arrive(empty(step));
  }
};

}  // namespace lowrank_ops::arch
