// Shared-memory addresses and vector loads.
#pragma once

#include <cstdint>

namespace lowrank_ops::arch {

// A 32-bit address in the shared::cta window, as PTX takes it.
__device__ __forceinline__ uint32_t cast_smem_ptr_to_uint(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ld_shared_v4(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ld.shared::cta.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace lowrank_ops::arch
