// mbarrier and the proxy fences around it (sm_90). Barriers are named by their shared-memory address.
#pragma once

#include <cstdint>

namespace lowrank_ops::arch {

__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
// Makes mbarrier_init visible to the cluster and to the async proxy (TMA).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Orders a thread's own accesses to shared memory before later TMA writes to it: TMA writes through the async proxy,
// which an mbarrier alone does not order after the generic proxy.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
// Arrives at an mbarrier of any CTA of the cluster; the address is mapa's. Without .release.cluster: the thread has
// only read what it hands over, and a release at cluster scope would wait for all its global stores.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, int parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
}

}  // namespace lowrank_ops::arch
