// csrc/arch/atom.cuh on the simulated device.
#pragma once

#include "device.h"
#include "order.h"

namespace lowrank_ops::arch {

inline unsigned atom_add_relaxed(unsigned* to, unsigned value) {
  const simulator::Unwatched unwatched;
  const unsigned before = *to;
  *to = before + value;
  return before;
}
inline unsigned atom_add_acq_rel(unsigned* to, unsigned value) {
  simulator::acquire(to);
  simulator::release(to);
  return atom_add_relaxed(to, value);
}

}  // namespace lowrank_ops::arch
