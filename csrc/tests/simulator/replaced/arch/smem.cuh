// csrc/arch/smem.cuh on the simulated device.
#pragma once

#include <cstring>

#include "device.h"

namespace lowrank_ops::arch {

inline uint32_t cast_smem_ptr_to_uint(const void* pointer) { return simulator::shared_address(pointer); }
inline void ld_shared_v4(uint32_t (&words)[4], uint32_t address) {
  std::memcpy(words, simulator::shared_bytes(address, 16, 16), 16);
}

}  // namespace lowrank_ops::arch
