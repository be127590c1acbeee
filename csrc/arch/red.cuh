// red: fire-and-forget additions to global memory. Rounds to nearest; the additions of one thread stay in order.
#pragma once

namespace lowrank_ops::arch {

__device__ __forceinline__ void red_add(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value) : "memory");
}
__device__ __forceinline__ void red_add(double* to, double value) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(value) : "memory");
}
// Two neighbors, aligned to 8 bytes.
__device__ __forceinline__ void red_add_v2(float* to, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(first),
               "f"(second)
               : "memory");
}

}  // namespace lowrank_ops::arch
