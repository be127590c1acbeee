// For the tests of low-rank products: matrices, what is expected of their product, and the decode kernels' products lane
// by lane, with the kernels' own index functions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../lowrank_linear/fragments.h"
#include "check.h"
#include "half.h"
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

inline Matrix normal_matrix(int64_t rows, int64_t cols, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Matrix m{rows, cols, std::vector<float>(rows * cols)};
  for (float& value : m.values) value = to_bfloat16(scale * normal(random));
  return m;
}

// (x down^T) up^T for values whose sums are exact: all that is rounded is t.
inline std::vector<float> exact(const Matrix& x, const Matrix& down, const Matrix& up) {
  std::vector<float> y(x.rows * up.rows, 0.0f);
  for (int64_t token = 0; token < x.rows; ++token)
    for (int64_t r = 0; r < down.rows; ++r) {
      float t = 0;
      for (int64_t k = 0; k < x.cols; ++k) t += x.at(token, k) * down.at(r, k);
      for (int64_t n = 0; n < up.rows; ++n) y[token * up.rows + n] += to_bfloat16(t) * up.at(n, r);
    }
  return y;
}

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());  // a NaN differs from all
}

// The project's tolerance: at most twice as far from float64 as two products in bfloat16 with t rounded between.
inline void expect_as_near_as_two_products(const std::vector<float>& mine, const Matrix& x, const Matrix& down,
                                           const Matrix& up) {
  double worst = 0, allowed = 0;
  for (int64_t token = 0; token < x.rows; ++token) {
    std::vector<double> t(down.rows, 0.0);
    std::vector<float> rounded(down.rows, 0.0f);
    for (int64_t r = 0; r < down.rows; ++r) {
      float sum = 0;
      for (int64_t k = 0; k < x.cols; ++k) {
        t[r] += static_cast<double>(x.at(token, k)) * down.at(r, k);
        sum += x.at(token, k) * down.at(r, k);
      }
      rounded[r] = to_bfloat16(sum);
    }
    for (int64_t n = 0; n < up.rows; ++n) {
      double y = 0;
      float same_dtype = 0;
      for (int64_t r = 0; r < down.rows; ++r) {
        y += t[r] * up.at(n, r);
        same_dtype += rounded[r] * up.at(n, r);
      }
      const double error = std::abs(to_bfloat16(mine[token * up.rows + n]) - y);
      EXPECT(!std::isnan(error));
      worst = std::max(worst, error);
      allowed = std::max(allowed, std::abs(to_bfloat16(same_dtype) - y));
    }
  }
  EXPECT(worst <= 2 * allowed + 1e-6);
  EXPECT(worst > 0);
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
