// csrc/mma_sm90.cuh on the simulated device: each instruction as the PTX manual describes it.
#pragma once

#include <cuda.h>

#include "matrices.h"

namespace lowrank_ops::sm90 {

inline uint32_t shared_address(const void* pointer) { return simulator::shared_address(pointer); }

// ---- barriers in shared memory ----

inline void init_barrier(uint32_t barrier, int arrivals) { simulator::init_barrier(barrier, arrivals); }
inline void fence_barrier_init() { simulator::fence_barrier_init(); }
inline void fence_before_copies() { simulator::fence_before_copies(); }
inline void arrive(uint32_t barrier) { simulator::arrive(barrier, 0); }
inline void arrive_expecting(uint32_t barrier, int bytes) { simulator::arrive(barrier, bytes); }
inline void wait(uint32_t barrier, int parity) { simulator::wait(barrier, parity); }

// ---- tensor copy engine ----

inline void prefetch(const CUtensorMap*) {}

// A box to one place in shared memory.
inline std::function<void()> box_copy(uint32_t to, const CUtensorMap* map, int x, int y) {
  const simulator::MatrixMap matrix = simulator::matrix_map(*map);
  unsigned char* start = simulator::shared_bytes(to, matrix.box_bytes(), 128);
  const uint32_t offset = to % simulator::kBlockAddress;
  return [matrix, offset, start, x, y] {
    for (int row = 0; row < matrix.box_rows; ++row)
      for (int byte = 0; byte < matrix.box_cols * 2; byte += 2) {
        const int64_t r = int64_t{y} + row, c = int64_t{x} + byte / 2;
        const uint32_t address = offset + static_cast<uint32_t>(row * matrix.box_cols * 2 + byte);
        const bool inside = r >= 0 && r < matrix.rows && c >= 0 && c < matrix.cols;
        static constexpr uint16_t zero = 0;
        std::memcpy(start + (simulator::swizzled(address) - offset),
                    inside ? static_cast<const void*>(matrix.base + r * matrix.stride_bytes + c * 2) : &zero, 2);
      }
  };
}
inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  const simulator::Unwatched unwatched;
  simulator::copy_later(barrier, simulator::matrix_map(*map).box_bytes(), box_copy(to, map, x, y));
}

inline void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  const simulator::Unwatched unwatched;
  simulator::expect(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
                    "a bulk copy of 16-byte pieces");
  unsigned char* there = simulator::shared_bytes(to, bytes, 16);
  simulator::copy_later(barrier, bytes, [=] { std::memcpy(there, from, static_cast<size_t>(bytes)); });
}

// ---- warpgroup products ----

// Registers are not counted here.
template <int kRegisters>
void leave_registers() {}
template <int kRegisters>
void take_registers() {}

inline void fence_products() { simulator::fence_products(); }
inline void commit_products() { simulator::commit_products(); }
template <int kPending>
void wait_products() {
  simulator::wait_products(kPending);
}

// ---- memory ----

inline void add_in_memory(float* to, float value) { *to += value; }
inline void add_in_memory(double* to, double value) { *to += value; }
inline void add_pair_in_memory(float* to, float first, float second) {
  simulator::expect(reinterpret_cast<uintptr_t>(to) % 8 == 0, "a pair on 8 bytes");
  to[0] += first;
  to[1] += second;
}

}  // namespace lowrank_ops::sm90
