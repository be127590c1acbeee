// What ldmatrix, mma.m16n8k16 and mma.m16n8k8 do, lane by lane, on the host. Elements are floats or indices of the
// test's choice.
#pragma once

#include <array>
#include <functional>

namespace lowrank_ops::tests {

constexpr int kLanes = 32;

// Two elements, as they lie in a 32-bit register.
template <class T>
using Pair = std::array<T, 2>;

// ldmatrix.x4.trans: `row(address)` is the eight elements at an address, `address(lane)` what a lane names. Register m
// of a lane holds, of matrix m, elements (2 * (lane % 4), lane / 4) and the one below.
template <class T>
std::array<std::array<Pair<T>, 4>, kLanes> load_matrices_transposed(
    const std::function<std::array<T, 8>(int address)>& row, const std::function<int(int lane)>& address) {
  std::array<std::array<Pair<T>, 4>, kLanes> registers{};
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::array<std::array<T, 8>, 8> rows;
    for (int i = 0; i < 8; ++i) rows[i] = row(address(matrix * 8 + i));
    for (int lane = 0; lane < kLanes; ++lane)
      for (int half = 0; half < 2; ++half) registers[lane][matrix][half] = rows[lane % 4 * 2 + half][lane / 4];
  }
  return registers;
}

// mma.sync.aligned.m16n8k16.row.col: d += a b, operands spread over the lanes as the PTX manual draws them.
inline void multiply_add(std::array<std::array<float, 4>, kLanes>& d,
                         const std::array<std::array<Pair<float>, 4>, kLanes>& a,
                         const std::array<std::array<Pair<float>, 2>, kLanes>& b) {
  float full_a[16][16], full_b[16][8];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int half = 0; half < 2; ++half) {
      int group = lane / 4, k = lane % 4 * 2 + half;
      full_a[group][k] = a[lane][0][half];
      full_a[group + 8][k] = a[lane][1][half];
      full_a[group][k + 8] = a[lane][2][half];
      full_a[group + 8][k + 8] = a[lane][3][half];
      full_b[k][group] = b[lane][0][half];
      full_b[k + 8][group] = b[lane][1][half];
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int e = 0; e < 4; ++e) {
      int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) d[lane][e] += full_a[row][k] * full_b[k][col];
    }
}

// mma.sync.aligned.m16n8k8.row.col with 32-bit elements.
inline void multiply_add(std::array<std::array<float, 4>, kLanes>& d, const std::array<std::array<float, 4>, kLanes>& a,
                         const std::array<std::array<float, 2>, kLanes>& b) {
  float full_a[16][8], full_b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) full_a[group + i % 2 * 8][k + i / 2 * 4] = a[lane][i];
    for (int i = 0; i < 2; ++i) full_b[k + i * 4][group] = b[lane][i];
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int e = 0; e < 4; ++e) {
      int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 8; ++k) d[lane][e] += full_a[row][k] * full_b[k][col];
    }
}

}  // namespace lowrank_ops::tests
