// A kernel that may start while the one before it still runs (compute capability 9.0 and newer; nothing before that).
#pragma once

namespace lowrank_ops {

// In the one before: the next one may start when all blocks have come here.
__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the next one: waits until the one before has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace lowrank_ops
