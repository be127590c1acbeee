// csrc/arch/pdl.cuh on the simulated device, where the dependent grid may start at any time.
#pragma once

#include "device.h"

namespace lowrank_ops::arch {

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() { simulator::griddepcontrol_wait(); }

}  // namespace lowrank_ops::arch
