// What the tensor copy engine and wgmma take: matrices in memory, matrices in shared memory by descriptors.
#pragma once

#include <cuda.h>

#include <array>

#include "device.h"
#include "elements.h"

namespace lowrank_ops::simulator {

// The 128-byte swizzle: address bits 4 to 6 are flipped by bits 7 to 9.
constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// What is inside of a CUtensorMap here: a row-major matrix of 16-bit values, in boxes with the 128-byte swizzle.
struct MatrixMap {
  const unsigned char* base;
  int64_t rows, cols, stride_bytes;
  int box_rows, box_cols;
  int64_t box_bytes() const { return int64_t{box_rows} * box_cols * 2; }
};
static_assert(sizeof(MatrixMap) <= sizeof(CUtensorMap));

inline MatrixMap matrix_map(const CUtensorMap& map) {
  MatrixMap matrix;
  std::memcpy(&matrix, &map, sizeof(matrix));
  return matrix;
}

// Element (row, k) of a wgmma operand with the 128-byte swizzle. Contiguous are either the summed values k (leading
// offset unused, stride offset from 8 rows to the next) or the rows (leading offset from 64 rows to the next, stride
// offset from 8 values of k to the next).
template <class Element>
float operand(uint64_t descriptor, int row, int k, bool rows_contiguous) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) * 16;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
  const uint32_t r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(k);
  const uint32_t address = rows_contiguous ? start + r / 64 * leading + c / 8 * stride + c % 8 * 128 + r % 64 * 2
                                           : start + r / 8 * stride + r % 8 * 128 + c * 2;
  uint16_t bits;
  std::memcpy(&bits, shared_bytes(swizzled(address), 2, 2), 2);
  return value_of<Element>(bits);
}

inline void expect_descriptor(uint64_t descriptor, bool rows_contiguous) {
  constexpr uint64_t kFields = 0xC00E'3FFF'3FFF'3FFFu;  // start, leading and stride offset, base offset, swizzle
  expect(descriptor >> 62 == 1 && (descriptor & ~kFields) == 0, "a descriptor with the 128-byte swizzle");
  const uint64_t start = (descriptor & 0x3FFF) * 16 % 1024;
  expect((descriptor >> 49 & 7) == 0 && (rows_contiguous ? start == 0 : start < 128 && start % 32 == 0),
         "a descriptor that starts in the first row of the swizzle's pattern, and stays in its rows");
  expect((descriptor >> 32 & 0x3FFF) * 16 % 1024 == 0 && (!rows_contiguous || (descriptor >> 16 & 0x3FFF) * 16 % 1024 == 0),
         "offsets of whole patterns of the swizzle");
}

struct Left {
  uint64_t descriptor;
  const uint32_t* registers;  // instead of the descriptor
  bool rows_contiguous;
};

// wgmma.m64nNk16: the warp's 16 of the 64 rows. Operands and accumulators are used when the product is done, some
// time before it is waited for.
template <class Element, int kColumns>
void multiply(const char* name, float* d, Left left, uint64_t right, bool right_contiguous, int accumulate) {
  struct Lane {
    float* d;
    Left left;
    uint64_t right;
    int accumulate;
  } mine{d, left, right, accumulate};
  const int first_row = position().warp % 4 * 16;
  meet_warp(name, &mine, [first_row, right_contiguous](void* const* brought) {
    std::array<Lane, 32> lanes;
    for (int i = 0; i < 32; ++i) lanes[static_cast<size_t>(i)] = *static_cast<const Lane*>(brought[i]);
    for (const Lane& lane : lanes)
      expect(lane.left.descriptor == lanes[0].left.descriptor && lane.right == lanes[0].right &&
                 lane.accumulate == lanes[0].accumulate,
             "the same operands for all lanes of a product");
    expect_descriptor(lanes[0].right, right_contiguous);
    if (lanes[0].left.registers == nullptr) expect_descriptor(lanes[0].left.descriptor, lanes[0].left.rows_contiguous);
    note_instruction(lanes[0].left.descriptor);
    note_instruction(lanes[0].right ^ static_cast<uint64_t>(lanes[0].accumulate != 0) << 61 ^ kColumns);
    add_product([lanes, first_row, right_contiguous] {
      float a[16][16], b[kColumns][16];
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row)
          if (lanes[0].left.registers == nullptr)
            a[row][k] = operand<Element>(lanes[0].left.descriptor, first_row + row, k, lanes[0].left.rows_contiguous);
          else
            a[row][k] = half_of<Element>(lanes[row % 8 * 4 + k % 8 / 2].left.registers[row / 8 + k / 8 * 2], k % 2);
        for (int col = 0; col < kColumns; ++col) b[col][k] = operand<Element>(lanes[0].right, col, k, right_contiguous);
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < kColumns / 2; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float& sum = lanes[static_cast<size_t>(lane)].d[i];
          Sum exact{lanes[0].accumulate ? sum : 0.0f};
          for (int k = 0; k < 16; ++k) exact.add(a[row][k], b[col][k]);
          sum = static_cast<float>(exact.value);
        }
    });
  });
}

}  // namespace lowrank_ops::simulator
