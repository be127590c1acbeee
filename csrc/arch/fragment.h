// Layouts of tensor-core operands and accumulators: register fragments and shared-memory descriptors (PTX ISA).
#pragma once

#include "../host_device.h"

namespace lowrank_ops::arch {

// mma.sync m16n8: row and column of accumulator element e (0 to 3) of a lane.
LRO_HD constexpr int mma_accumulator_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
LRO_HD constexpr int mma_accumulator_col(int lane, int e) { return lane % 4 * 2 + e % 2; }

// wgmma m64nN: row and column of accumulator i of a thread. Threads of consecutive warpgroups own consecutive 64 rows.
LRO_HD constexpr int wgmma_accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
LRO_HD constexpr int wgmma_accumulator_col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The 128-byte swizzle permutes 16-byte chunks by address bits 7 to 9; it repeats every 1024 bytes.
constexpr int kSwizzleAlignment = 1024;

// wgmma shared-memory descriptor with the 128-byte swizzle.
//   K-major operand:  leading offset unused (a row is one swizzle wide), stride offset from 8 rows to the next 8.
//   MN-major operand: leading offset from 64 rows to the next 64, stride offset from 8 values of K to the next 8.
LRO_HD constexpr uint64_t smem_descriptor(uint32_t address, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes / 16) << 32 |
         static_cast<uint64_t>(leading_bytes / 16) << 16 | ((address & 0x3FFFF) >> 4);
}
// 64 values of K a row; 8 rows are one repetition of the swizzle.
LRO_HD constexpr uint64_t smem_descriptor_k_major(uint32_t address) { return smem_descriptor(address, 16, 1024); }

}  // namespace lowrank_ops::arch
