// Programmatic dependent launch (griddepcontrol, sm_90); before sm_90 no operation.
#pragma once

namespace lowrank_ops::arch {

// In the primary kernel: the dependent grid may start once all CTAs have executed this.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In the dependent kernel: waits until the primary grid has completed and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace lowrank_ops::arch
