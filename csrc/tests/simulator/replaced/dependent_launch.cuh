// csrc/dependent_launch.cuh on the simulated device, which lets the next kernel start at any time.
#pragma once

#include "device.h"

namespace lowrank_ops {

inline void let_dependents_start() {}
inline void wait_for_predecessor() { simulator::wait_for_kernel_before(); }

}  // namespace lowrank_ops
