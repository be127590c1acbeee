// cp.async (sm_80): asynchronous copies from global to shared memory, in groups per thread.
#pragma once

#include <cstdint>

namespace lowrank_ops::arch {

// Copies `bytes` (0 to 16) and fills the rest of 16 with zeros; `global` must be a valid address even for 0.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lowrank_ops::arch
