// mma.sync and ldmatrix (sm_80).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tf32.h"

namespace lowrank_ops::arch {

// Four 8 x 8 matrices of 16-bit elements, each transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Rounds to nearest. The tensor cores would truncate, and squares would be biased downward.
__device__ __forceinline__ uint32_t cvt_rna_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// d += a b with A (16 x 16) row-major, B (16 x 8) column-major; for Tf32, A (16 x 8) and B (8 x 8).
template <class Element>
__device__ __forceinline__ void mma_m16n8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define LRO_MMA(Element, shape, type)                                                                    \
  template <>                                                                                            \
  __device__ __forceinline__ void mma_m16n8<Element>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                                     uint32_t b1) {                                      \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }
LRO_MMA(__nv_bfloat16, "m16n8k16", "bf16")
LRO_MMA(__half, "m16n8k16", "f16")
LRO_MMA(Tf32, "m16n8k8", "tf32")
#undef LRO_MMA

}  // namespace lowrank_ops::arch
