// csrc/arch/cp_async.cuh on the simulated device.
#pragma once

#include <cstring>

#include "device.h"

namespace lowrank_ops::arch {

inline void cp_async_16(uint32_t smem, const void* global, int bytes) {
  simulator::expect(bytes >= 0 && bytes <= 16, "cp.async of at most 16 bytes");
  simulator::expect(reinterpret_cast<uintptr_t>(global) % 16 == 0, "cp.async from an address on 16 bytes");
  unsigned char* to = simulator::shared_bytes(smem, 16, 16);
  simulator::add_cp_async([to, global, bytes] {
    std::memset(to, 0, 16);
    std::memcpy(to, global, static_cast<size_t>(bytes));
  });
}
inline void cp_async_commit_group() { simulator::commit_cp_async(); }
template <int kPending>
void cp_async_wait_group() {
  simulator::wait_cp_async(kPending);
}

}  // namespace lowrank_ops::arch
