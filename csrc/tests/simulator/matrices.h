// Operands of TMA and wgmma: matrices in global memory, and in shared memory by descriptors.
#pragma once

#include <cuda.h>

#include <array>

#include "device.h"
#include "elements.h"
#include "order.h"

// Without ThreadSanitizer's instrumentation.
#ifdef LOWRANK_OPS_RACES
#define LRO_NOT_WATCHED __attribute__((no_sanitize_thread))
#else
#define LRO_NOT_WATCHED
#endif

namespace lowrank_ops::simulator {

// The 128-byte swizzle: address bits 4 to 6 are flipped by bits 7 to 9.
LRO_NOT_WATCHED constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// The contents of a simulated CUtensorMap: a row-major matrix of 16-bit values in tiles with the 128-byte swizzle.
struct TensorMap {
  const unsigned char* base;
  int64_t rows, cols, stride_bytes;
  int tile_rows, tile_cols;
  int64_t tile_bytes() const { return int64_t{tile_rows} * tile_cols * 2; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap tensor_map(const CUtensorMap& map) {
  TensorMap matrix;
  std::memcpy(&matrix, &map, sizeof(matrix));
  return matrix;
}

// The address of element (row, k) of a wgmma operand with the 128-byte swizzle, K-major or MN-major (arch/fragment.h
// has the offsets).
LRO_NOT_WATCHED inline uint32_t operand_address(uint64_t descriptor, int row, int k, bool mn_major) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) * 16;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
  const uint32_t r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(k);
  return swizzled(mn_major ? start + r / 64 * leading + c / 8 * stride + c % 8 * 128 + r % 64 * 2
                           : start + r / 8 * stride + r % 8 * 128 + c * 2);
}

// `kRows` x 16 elements of an operand, by k. Not watched: wgmma reads through the async proxy, as TMA writes, and no
// fence is between them.
template <class Element, int kRows>
LRO_NOT_WATCHED void load_operand(uint64_t descriptor, int first_row, bool mn_major, float (&to)[16][kRows]) {
  uint32_t lowest = operand_address(descriptor, first_row, 0, mn_major), highest = lowest;
  for (int row = first_row; row < first_row + kRows; ++row)
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = operand_address(descriptor, row, k, mn_major);
      lowest = address < lowest ? address : lowest;
      highest = address > highest ? address : highest;
    }
  const unsigned char* const bytes = shared_bytes(lowest, highest - lowest + 2, 2);
  const float* const values = value_table<Element>();
  for (int row = 0; row < kRows; ++row)
    for (int k = 0; k < 16; ++k)
      to[k][row] = values[*reinterpret_cast<const uint16_t*>(
          bytes + (operand_address(descriptor, first_row + row, k, mn_major) - lowest))];
}

// The tensor cores add the products of one instruction more exactly than float32, and round once.
template <int kN>
LRO_NOT_WATCHED void multiply(const float (&left)[16][16], const float (&right)[16][kN], double (&sums)[16][kN]) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < kN; ++col) sums[row][col] = 0;
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < kN; ++col) sums[row][col] += static_cast<double>(left[k][row]) * right[k][col];
  }
}

inline void expect_descriptor(uint64_t descriptor, bool mn_major) {
  constexpr uint64_t kFields = 0xC00E'3FFF'3FFF'3FFFu;  // start, leading and stride offset, base offset, swizzle
  expect(descriptor >> 62 == 1 && (descriptor & ~kFields) == 0, "a descriptor with the 128-byte swizzle");
  const uint64_t start = (descriptor & 0x3FFF) * 16 % 1024;
  expect((descriptor >> 49 & 7) == 0 && (mn_major ? start == 0 : start < 128 && start % 32 == 0),
         "a descriptor that starts in the first row of the swizzle's pattern, and stays in its rows");
  expect((descriptor >> 32 & 0x3FFF) * 16 % 1024 == 0 && (!mn_major || (descriptor >> 16 & 0x3FFF) * 16 % 1024 == 0),
         "offsets of whole patterns of the swizzle");
}

struct OperandA {
  uint64_t descriptor;
  const uint32_t* registers;  // instead of the descriptor
  bool mn_major;
};

// wgmma.m64nNk16: the warp's 16 of the 64 rows. Operands and accumulators are used when the wgmma is done, at some time
// before its wait.
template <class Element, int kN>
void wgmma(const char* name, float* d, OperandA a, uint64_t b, bool b_mn_major, int scale_d) {
  struct Lane {
    float* d;
    OperandA a;
    uint64_t b;
    int scale_d;
  } mine{d, a, b, scale_d};
  const int first_row = position().warp % 4 * 16;
  converge_warp(name, &mine, [first_row, b_mn_major](void* const* arguments) {
    std::array<Lane, 32> lanes;
    for (int i = 0; i < 32; ++i) lanes[static_cast<size_t>(i)] = *static_cast<const Lane*>(arguments[i]);
    for (const Lane& lane : lanes)
      expect(lane.a.descriptor == lanes[0].a.descriptor && lane.b == lanes[0].b && lane.scale_d == lanes[0].scale_d,
             "the same operands for all lanes of a wgmma");
    expect_descriptor(lanes[0].b, b_mn_major);
    if (lanes[0].a.registers == nullptr) expect_descriptor(lanes[0].a.descriptor, lanes[0].a.mn_major);
    note_instruction(lanes[0].a.descriptor);
    note_instruction(lanes[0].b ^ static_cast<uint64_t>(lanes[0].scale_d != 0) << 61 ^ kN);
    add_wgmma([lanes, first_row, b_mn_major] {
      float left[16][16], right[16][kN];
      double sums[16][kN];
      const OperandA& a = lanes[0].a;
      if (a.registers == nullptr) {
        load_operand<Element>(a.descriptor, first_row, a.mn_major, left);
      } else {
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            left[k][row] = half_of<Element>(lanes[row % 8 * 4 + k % 8 / 2].a.registers[row / 8 + k / 8 * 2], k % 2);
      }
      load_operand<Element>(lanes[0].b, 0, b_mn_major, right);
      multiply<kN>(left, right, sums);
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < kN / 2; ++i) {
          float& sum = lanes[static_cast<size_t>(lane)].d[i];
          sum = static_cast<float>((lanes[0].scale_d ? static_cast<double>(sum) : 0.0) +
                                   sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
        }
    });
  });
}

}  // namespace lowrank_ops::simulator
