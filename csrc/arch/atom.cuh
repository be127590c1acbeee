// Atomic operations on global memory that order other accesses.
#pragma once

namespace lowrank_ops::arch {

// Returns the value before. What this thread has written, or has seen written by its CTA before a barrier, is visible
// to the thread that sees the sum, and to its CTA after a barrier.
__device__ __forceinline__ unsigned atom_add_acq_rel(unsigned* to, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
  return before;
}

}  // namespace lowrank_ops::arch
