// The decode kernels' products on the host, lane by lane, with the kernels' own index functions.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../lowrank_linear/fragments.h"
#include "check.h"
#include "warp.h"

namespace lowrank_ops::tests {

using namespace lowrank_linear;

struct Matrix {
  int64_t rows, cols;
  std::vector<float> values;
  float at(int64_t row, int64_t col) const {
    EXPECT(row >= 0 && row < rows && col >= 0 && col < cols);
    return values.at(row * cols + col);
  }
};

inline Matrix random_matrix(int64_t rows, int64_t cols, std::mt19937& random) {
  Matrix m{rows, cols, std::vector<float>(rows * cols)};
  for (float& value : m.values) value = static_cast<float>(static_cast<int>(random() % 9) - 4) / 4;  // exact sums
  return m;
}

// Where a lane's 8 values come from: a row, counted from the first of the product, and a feature.
using Load = std::function<std::array<float, 8>(int64_t row, int64_t feature)>;

// 8 features of a row of a matrix, zeros past its last row and past `end`.
inline Load rows_of(const Matrix& m, int64_t first_row, int64_t end) {
  return [&m, first_row, end](int64_t row, int64_t feature) {
    std::array<float, 8> v{};
    for (int e = 0; e < kVector; ++e)
      if (first_row + row < m.rows && feature + e < end) v[e] = m.at(first_row + row, feature + e);
    return v;
  };
}

// Sums of a block: products of 16 rows of a weight with groups of 8 tokens over [begin, end), per warp.
inline std::vector<float> multiply(const Load& weight, const Load& tokens, int64_t begin, int64_t end, int products,
                                   int token_tile) {
  const int rows = products * kRows;
  std::vector<float> sums(sum_bytes(rows, token_tile) / 4, NAN);
  const int steps = static_cast<int>(ceil_div(end - begin, kFeatures));
  for (int warp = 0; warp < kWarps; ++warp)
    for (int p = 0; p < products; ++p)
      for (int group = 0; group < token_tile / 8; ++group) {
        std::array<std::array<float, 4>, 32> acc{};
        for (int i = 0; step_of_warp(warp, i) < steps; ++i)
          for (int half = 0; half < 2; ++half) {  // words 2 * half and 2 * half + 1 of a lane's vectors
            std::array<std::array<Pair<float>, 4>, 32> a;
            std::array<std::array<Pair<float>, 2>, 32> b;
            for (int lane = 0; lane < 32; ++lane) {
              const int64_t feature = begin + int64_t{step_of_warp(warp, i)} * kFeatures + lane_feature(lane);
              const auto top = weight(p * kRows + lane_row(lane), feature);
              const auto bottom = weight(p * kRows + lane_row(lane) + 8, feature);
              const auto token = tokens(group * 8 + lane_token(lane), feature);
              const auto word = [&](const std::array<float, 8>& v, int w) {
                return Pair<float>{v[(2 * half + w) * 2], v[(2 * half + w) * 2 + 1]};
              };
              a[lane] = {word(top, 0), word(bottom, 0), word(top, 1), word(bottom, 1)};
              b[lane] = {word(token, 0), word(token, 1)};
            }
            multiply_add(acc, a, b);
          }
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < 4; ++e)
            sums[sum_index(warp, p * kRows + accumulator_row(lane, e), group * 8 + accumulator_token(lane, e), rows,
                           token_tile)] = acc[lane][e];
      }
  return sums;
}

inline float sum_of_warps(const std::vector<float>& sums, int row, int token, int rows, int token_tile) {
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[sum_index(warp, row, token, rows, token_tile)];
  return sum;
}

}  // namespace lowrank_ops::tests
