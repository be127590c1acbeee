// setmaxnreg (sm_90a): moves registers between warpgroups. All four warps of a warpgroup execute it.
#pragma once

namespace lowrank_ops::arch {

template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Blocks until the registers are available.
template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace lowrank_ops::arch
