// csrc/arch/mma.cuh on the simulated device.
#pragma once

#include <cmath>

#include "device.h"
#include "elements.h"

namespace lowrank_ops::arch {

inline void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t row) {
  struct Lane {
    uint16_t row[8];
    uint32_t* to;
  } mine;
  std::memcpy(mine.row, simulator::shared_bytes(row, 16, 16), 16);
  mine.to = to;
  simulator::converge_warp("ldmatrix", &mine, [](void* const* lanes) {
    const auto element = [&](int matrix, int r, int c) {
      return uint32_t{static_cast<const Lane*>(lanes[matrix * 8 + r])->row[c]};
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<Lane*>(lanes[lane])->to[matrix] =
            element(matrix, lane % 4 * 2, lane / 4) | element(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
  });
}

template <class Element>
void mma_m16n8(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* acc;
    const uint32_t* a;
    uint32_t b[2];
  } mine{acc, a, {b0, b1}};
  simulator::converge_warp("mma.m16n8k16", &mine, [](void* const* lanes) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<const Lane*>(lanes[lane]);
      for (int half = 0; half < 2; ++half) {
        const int group = lane / 4, k = lane % 4 * 2 + half;
        for (int word = 0; word < 4; ++word)
          left[group + word % 2 * 8][k + word / 2 * 8] = simulator::half_of<Element>(from.a[word], half);
        for (int word = 0; word < 2; ++word)
          right[group][k + word * 8] = simulator::half_of<Element>(from.b[word], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        float& sum = static_cast<Lane*>(lanes[lane])->acc[e];
        simulator::Sum exact{sum};
        for (int k = 0; k < 16; ++k) exact.add(left[lane / 4 + e / 2 * 8][k], right[lane % 4 * 2 + e % 2][k]);
        sum = static_cast<float>(exact.value);
      }
  });
}

struct Tf32;

// To nearest, ties away from zero.
inline uint32_t cvt_rna_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? 0x7FFFE000u : (bits + 0x1000) & ~uint32_t{0x1FFF};
}

template <>
inline void mma_m16n8<Tf32>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* acc;
    const uint32_t* a;
    uint32_t b[2];
  } mine{acc, a, {b0, b1}};
  for (uint32_t bits : {a[0], a[1], a[2], a[3], b0, b1})
    simulator::expect(bits % 0x2000 == 0, "operands that are rounded to TensorFloat-32");
  simulator::converge_warp("mma.m16n8k8", &mine, [](void* const* lanes) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<const Lane*>(lanes[lane]);
      const int group = lane / 4, k = lane % 4;
      for (int word = 0; word < 4; ++word) std::memcpy(&left[group + word % 2 * 8][k + word / 2 * 4], &from.a[word], 4);
      for (int word = 0; word < 2; ++word) std::memcpy(&right[group][k + word * 4], &from.b[word], 4);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        float& sum = static_cast<Lane*>(lanes[lane])->acc[e];
        simulator::Sum exact{sum};
        for (int k = 0; k < 8; ++k) exact.add(left[lane / 4 + e / 2 * 8][k], right[lane % 4 * 2 + e % 2][k]);
        sum = static_cast<float>(exact.value);
      }
  });
}

}  // namespace lowrank_ops::arch
