// Thread block clusters and distributed shared memory (sm_90).
#pragma once

#include <cstdint>

namespace lowrank_ops::arch {

// All threads of the cluster arrive, then wait. Writes before the arrive are visible to the cluster after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ int cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// The shared::cluster address of `address` in the CTA of this rank.
__device__ __forceinline__ uint32_t mapa(uint32_t address, int cta_rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(cta_rank));
  return mapped;
}

// DSMEM store of 16 bytes.
__device__ __forceinline__ void st_shared_cluster_v4(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace lowrank_ops::arch
