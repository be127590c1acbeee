// csrc/arch/red.cuh on the simulated device.
#pragma once

#include "device.h"

namespace lowrank_ops::arch {

inline void red_add(float* to, float value) { *to += value; }
inline void red_add(double* to, double value) { *to += value; }
inline void red_add_v2(float* to, float first, float second) {
  simulator::expect(reinterpret_cast<uintptr_t>(to) % 8 == 0, "a pair on 8 bytes");
  to[0] += first;
  to[1] += second;
}

}  // namespace lowrank_ops::arch
