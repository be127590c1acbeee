// Operands of TMA and wgmma: matrices in global memory, and in shared memory by descriptors.
#pragma once

#include <cuda.h>

#include <array>

#include "device.h"
#include "elements.h"
#include "order.h"

namespace lowrank_ops::simulator {

// The 128-byte swizzle: address bits 4 to 6 are flipped by bits 7 to 9.
constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

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

// Element (row, k) of a wgmma operand with the 128-byte swizzle, K-major or MN-major (arch/fragment.h has the offsets).
template <class Element>
float operand(uint64_t descriptor, int row, int k, bool mn_major) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) * 16;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
  const uint32_t r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(k);
  const uint32_t address = mn_major ? start + r / 64 * leading + c / 8 * stride + c % 8 * 128 + r % 64 * 2
                                    : start + r / 8 * stride + r % 8 * 128 + c * 2;
  const Unwatched unwatched;  // wgmma reads through the async proxy, as TMA writes: no fence between them
  uint16_t bits;
  std::memcpy(&bits, shared_bytes(swizzled(address), 2, 2), 2);
  return value_of<Element>(bits);
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
      float left[16][16], right[kN][16];
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row)
          if (lanes[0].a.registers == nullptr)
            left[row][k] = operand<Element>(lanes[0].a.descriptor, first_row + row, k, lanes[0].a.mn_major);
          else
            left[row][k] = half_of<Element>(lanes[row % 8 * 4 + k % 8 / 2].a.registers[row / 8 + k / 8 * 2], k % 2);
        for (int col = 0; col < kN; ++col) right[col][k] = operand<Element>(lanes[0].b, col, k, b_mn_major);
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < kN / 2; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float& sum = lanes[static_cast<size_t>(lane)].d[i];
          Sum exact{lanes[0].scale_d ? sum : 0.0f};
          for (int k = 0; k < 16; ++k) exact.add(left[row][k], right[col][k]);
          sum = static_cast<float>(exact.value);
        }
    });
  });
}

}  // namespace lowrank_ops::simulator
