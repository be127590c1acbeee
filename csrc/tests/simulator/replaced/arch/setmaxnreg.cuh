// csrc/arch/setmaxnreg.cuh on the simulated device, which has no registers.
#pragma once

namespace lowrank_ops::arch {

template <int kRegisters>
void warpgroup_reg_dealloc() {}
template <int kRegisters>
void warpgroup_reg_alloc() {}

}  // namespace lowrank_ops::arch
