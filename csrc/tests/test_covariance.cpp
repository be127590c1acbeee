// The sm_80 covariance kernels' algorithm, lane by lane and with their own index functions, against plain sums.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "../covariance/tiles.h"
#include "../planner.h"
#include "check.h"
#include "half.h"
#include "warp.h"

using namespace lowrank_ops;
using namespace lowrank_ops::covariance;

namespace {

enum class Products { of_16_bits, bfloat16_parts, tf32 };
enum class Fault {
  none,
  last_split_left_out,
  last_tile_left_out,
  one_chain,          // accumulators leave for the state only at the end
  no_low_part,
  cut,                // to TensorFloat-32
  rounded_sums,
  tokens_of_columns,  // B numbers its tokens as the instruction does, A does not
};

struct Matrix {
  int64_t tokens, features;
  std::vector<float> values;
  float at(int64_t token, int64_t feature) const {
    EXPECT(token >= 0 && token < tokens && feature >= 0 && feature < features);
    return values.at(token * features + feature);
  }
};

template <class Next>
Matrix matrix(int64_t tokens, int64_t features, Next next) {
  std::mt19937 random(static_cast<unsigned>(tokens * 31 + features));
  Matrix x{tokens, features, std::vector<float>(tokens * features)};
  for (float& value : x.values) value = next(random);
  return x;
}
Matrix eighths(int64_t tokens, int64_t features) {  // whose sums are exact
  return matrix(tokens, features,
                [](auto& random) { return static_cast<float>(static_cast<int>(random() % 33) - 16) / 8; });
}

struct Block {  // accumulators of all threads
  std::vector<std::array<float, 4>> tile = std::vector<std::array<float, 4>>(kThreads * kMmaRows * kMmaCols);
  std::vector<std::array<float, 2>> sum = std::vector<std::array<float, 2>>(kThreads);
  std::vector<std::array<double, 2>> sums = std::vector<std::array<double, 2>>(kThreads);
  std::array<float, 4>& at(int thread, int row, int col) { return tile[(thread * kMmaRows + row) * kMmaCols + col]; }
  std::array<std::array<float, 4>, 32> of_warp(int warp, int row, int col) {
    std::array<std::array<float, 4>, 32> d;
    for (int lane = 0; lane < 32; ++lane) d[lane] = at(warp * 32 + lane, row, col);
    return d;
  }
  void keep(int warp, int row, int col, const std::array<std::array<float, 4>, 32>& d) {
    for (int lane = 0; lane < 32; ++lane) at(warp * 32 + lane, row, col) = d[lane];
  }
};

template <class Layout>
struct Operand {  // of a stage: its high and its low part
  static constexpr int kElementBytes = 16 / Layout::kChunk;
  std::vector<float> part[2] = {std::vector<float>(Layout::kBytes / kElementBytes),
                                std::vector<float>(Layout::kBytes / kElementBytes)};
  float at(int p, int offset) const { return part[p].at(offset / kElementBytes); }
};

template <Products kProducts>
struct Emulation {
  using Layout = covariance::Layout<kProducts == Products::tf32 ? 4 : 2>;
  static constexpr int kParts = kProducts == Products::bfloat16_parts ? 2 : 1;
  const Matrix& x;
  const CovariancePlan& plan;
  bool patches;
  Fault fault;

  void bring(Operand<Layout>& operand, int64_t first_feature, int64_t first_token, int64_t end) const {
    for (auto& part : operand.part) std::fill(part.begin(), part.end(), NAN);  // what is not written must not be read
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < Layout::kCopies; ++i) {
        const Copy copy = patches ? Layout::copy_along_tokens(thread, i) : Layout::copy_along_features(thread, i);
        const int64_t token = first_token + copy.token, feature = first_feature + copy.chunk * Layout::kChunk;
        const int valid = token < end ? Layout::valid_features(feature, x.features) : 0;
        for (int e = 0; e < Layout::kChunk; ++e) {
          const float value = e < valid ? x.at(token, feature + e) : 0.0f;
          const float high = kParts == 1 ? value : tests::to_bfloat16(value);
          const int to = Layout::offset(copy.token, copy.chunk) / Operand<Layout>::kElementBytes + e;
          operand.part[0].at(to) = high;
          if (kParts == 2)
            operand.part[1].at(to) = fault == Fault::no_low_part ? 0.0f : tests::to_bfloat16(value - high);
        }
      }
  }

  // By ldmatrix and products of 16 tokens.
  void multiply(Block& block, int warp, int step, int row, const Operand<Layout>& rows,
                const Operand<Layout>& cols) const {
    const auto load = [&](const Operand<Layout>& operand, int p, const std::function<int(int)>& address) {
      const auto eight = [&](int offset) {
        std::array<float, 8> at;
        for (int e = 0; e < 8; ++e) at[e] = operand.at(p, offset + 2 * e);
        return at;
      };
      return tests::load_matrices_transposed<float>(eight, address);
    };
    for (int p = 0; p < kParts; ++p) {
      const auto a = load(rows, p, [&](int lane) { return a_offset(lane, warp, row, step); });
      for (int q = 0; q + p < kParts; ++q)
        for (int pair = 0; pair < kMmaCols / 2; ++pair) {
          const auto b = load(cols, q, [&](int lane) { return b_offset(lane, warp, pair, step); });
          for (int half = 0; half < 2; ++half) {
            auto d = block.of_warp(warp, row, pair * 2 + half);
            std::array<std::array<tests::Pair<float>, 2>, 32> operand;
            for (int lane = 0; lane < 32; ++lane) operand[lane] = {b[lane][half * 2], b[lane][half * 2 + 1]};
            tests::multiply_add(d, a, operand);
            block.keep(warp, row, pair * 2 + half, d);
          }
        }
    }
  }

  // By loads of single elements and products of 8 tokens.
  void multiply_tf32(Block& block, int warp, int step, int row, const Operand<Layout>& rows,
                     const Operand<Layout>& cols) const {
    const auto load = [&](const Operand<Layout>& operand, int offset) {
      return tests::to_tf32(operand.at(0, offset), fault == Fault::cut);
    };
    std::array<std::array<float, 4>, 32> a;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) a[lane][i] = load(rows, tf32_a_offset(lane, warp, row, step, i));
    for (int col = 0; col < kMmaCols; ++col) {
      auto d = block.of_warp(warp, row, col);
      std::array<std::array<float, 2>, 32> b;
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 2; ++i) {
          const int numbered = covariance::Layout<4>::feature_offset(
              step * 8 + lane % 4 + i * 4, warp % 4 * kWarpCols + col * 8 + lane / 4);
          b[lane][i] = load(cols, fault == Fault::tokens_of_columns ? numbered
                                                                    : tf32_b_offset(lane, warp, col, step, i));
        }
      tests::multiply_add(d, a, b);
      block.keep(warp, row, col, d);
    }
  }

  void multiply_stage(Block& block, const Operand<Layout>& rows, const Operand<Layout>& cols, bool diagonal) const {
    constexpr bool kTf32 = kProducts == Products::tf32;
    for (int warp = 0; warp < kThreads / 32; ++warp)
      for (int step = 0; step < kTokens / (kTf32 ? 8 : 16); ++step)
        for (int row = 0; row < kMmaRows; ++row)
          kTf32 ? multiply_tf32(block, warp, step, row, rows, cols) : multiply(block, warp, step, row, rows, cols);
    if (!diagonal) return;
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < kSumTokens; ++i)
        for (int half = 0; half < 2; ++half)
          for (int p = 0; p < kParts; ++p) {
            const int offset = Layout::feature_offset(sum_token(thread, i), sum_feature(thread) + half);
            const float value = rows.at(p, offset);
            block.sum[thread][half] += fault == Fault::rounded_sums ? tests::to_tf32(value) : value;
          }
  }

  // As the two kernels do it, tile by tile and split by split, from the plan to the state.
  void run(std::vector<double>& second_moment, std::vector<double>& total) const {
    std::vector<float> scratch(plan.scratch_floats, NAN);
    Operand<Layout> rows, cols;
    for (int64_t index = 0; index < plan.tiles - (fault == Fault::last_tile_left_out); ++index) {
      const Tile tile = tile_at(index);
      const bool diagonal = tile.row == tile.col;
      const int splits = plan.splits - (fault == Fault::last_split_left_out);
      const auto add = [&](int64_t row, int64_t col, double value) {
        if (row < x.features && col <= row) second_moment[row * x.features + col] += value;
      };
      const auto flush = [&](Block& block, int64_t split, bool first) {
        for (int thread = 0; thread < kThreads; ++thread) {
          for (int row = 0; row < kMmaRows; ++row)
            for (int col = 0; col < kMmaCols; ++col)
              for (int e = 0; e < 4; ++e) {
                const float value = block.at(thread, row, col)[e];
                const int r = accumulator_row(thread % 32, thread / 32, row, e);
                const int c = accumulator_col(thread % 32, thread / 32, col, e);
                float* to = plan.splits == 1 ? nullptr
                                             : &scratch[partial_offset(0, split, index, plan.splits, plan.tiles) +
                                                        r * kTile + c];
                if (to)
                  *to = first ? value : *to + value;
                else
                  add(int64_t{tile.row} * kTile + r, int64_t{tile.col} * kTile + c, value);
              }
          for (int half = 0; half < 2; ++half) block.sums[thread][half] += block.sum[thread][half];
        }
        std::fill(block.tile.begin(), block.tile.end(), std::array<float, 4>{});
        std::fill(block.sum.begin(), block.sum.end(), std::array<float, 2>{});
      };
      for (int64_t split = 0; split < splits; ++split) {
        const Range range = tokens_of_split(split, plan.tokens_per_split, x.tokens);
        Block block;
        const int64_t steps = ceil_div(range.end - range.begin, kTokens);
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t token = range.begin + step * kTokens;
          bring(rows, int64_t{tile.row} * kTile, token, range.end);
          if (!diagonal) bring(cols, int64_t{tile.col} * kTile, token, range.end);
          multiply_stage(block, rows, diagonal ? rows : cols, diagonal);
          if (((step + 1) % kChunkSteps == 0 && fault != Fault::one_chain) || step + 1 == steps)
            flush(block, split, step < kChunkSteps);
        }
        for (int i = 0; diagonal && i < kTile; ++i) {
          const int64_t feature = int64_t{tile.row} * kTile + i;
          if (feature >= x.features) continue;
          double sum = 0;
          for (int group = 0; group < kSumGroups; ++group) sum += block.sums[sum_thread(group, i)][i % 2];
          if (plan.splits == 1)
            total[feature] += sum;
          else
            scratch[partial_sum_offset(0, split, feature, 1, plan.splits, plan.tiles, x.features)] =
                static_cast<float>(sum);
        }
      }
      if (plan.splits == 1) continue;
      for (int slice = 0; slice < add_blocks(kTile); ++slice)
        for (int thread = 0; thread < kThreads; ++thread)
          for (int e = 0; e < kAddElements; ++e) {
            const int element = added_element(slice, thread, e);
            double sum = 0;
            for (int64_t split = 0; split < splits; ++split)
              sum += scratch[partial_offset(0, split, index, plan.splits, plan.tiles) + element];
            add(int64_t{tile.row} * kTile + element / kTile, int64_t{tile.col} * kTile + element % kTile, sum);
          }
      for (int i = 0; diagonal && i < kTile && int64_t{tile.row} * kTile + i < x.features; ++i)
        for (int64_t split = 0; split < splits; ++split)
          total[tile.row * kTile + i] += scratch[partial_sum_offset(0, split, tile.row * kTile + i, 1, plan.splits,
                                                                    plan.tiles, x.features)];
    }
  }
};

// The largest error of the second moment relative to the sum of |x_i x_j|, of its diagonal, and of the total relative
// to the sum of |x_i|; NaN or infinite where anything above the diagonal was touched.
struct Errors {
  double products = 0, diagonal = 0, total = 0;
  bool none() const { return products == 0 && total == 0; }
};

template <Products kProducts>
Errors errors(const Matrix& x, bool patches = false, Fault fault = Fault::none, int multiprocessors = 6) {
  const bool tf32 = kProducts == Products::tf32;
  const CovariancePlan plan = plan_covariance(
      {x.tokens, x.features, 1, kProducts == Products::of_16_bits ? Dtype::bfloat16 : Dtype::float32,
       patches ? Source::patches : Source::matrix, {80, multiprocessors, 166912}, tf32});
  EXPECT(plan.reason.empty() && plan.tf32 == tf32);
  std::vector<double> second_moment(x.features * x.features, 1.0), total(x.features, 1.0);  // added to
  Emulation<kProducts>{x, plan, patches, fault}.run(second_moment, total);
  Errors most;
  for (int64_t row = 0; row < x.features; ++row) {
    double sum = 1.0, size = 1.0;
    for (int64_t token = 0; token < x.tokens; ++token) sum += x.at(token, row), size += std::fabs(x.at(token, row));
    most.total = std::fmax(most.total, std::fabs(total[row] - sum) / size);
    for (int64_t col = 0; col < x.features; ++col) {
      double expected = 1.0, magnitude = 1.0;
      for (int64_t token = 0; col <= row && token < x.tokens; ++token) {
        const double product = static_cast<double>(x.at(token, row)) * x.at(token, col);
        expected += product, magnitude += std::fabs(product);
      }
      const double error = std::fabs(second_moment[row * x.features + col] - expected) / magnitude;
      most.products = error <= most.products ? most.products : error;  // a NaN stays
      if (row == col) most.diagonal = std::fmax(most.diagonal, error);
      if (col > row && error != 0) most.products = INFINITY;
    }
  }
  return most;
}

void the_algorithm_gives_plain_sums() {
  for (int64_t tokens : {1, 31, 32, 33, 100, 257})
    for (int64_t features : {1, 7, 8, 127, 128, 129, 200, 300}) {
      EXPECT(errors<Products::of_16_bits>(eighths(tokens, features)).none());
      EXPECT(errors<Products::tf32>(eighths(tokens, features)).none());
    }
  for (bool patches : {false, true}) {
    EXPECT(errors<Products::of_16_bits>(eighths(700, 130), patches).none());
    EXPECT(errors<Products::bfloat16_parts>(eighths(700, 130), patches).none());
    EXPECT(errors<Products::tf32>(eighths(700, 130), patches).none());
  }
  EXPECT(errors<Products::of_16_bits>(eighths(1000, 64)).none());
}

// float32 that neither format holds, far from zero.
Matrix shifted(int64_t tokens, int64_t features) {
  return matrix(tokens, features, [](auto& random) {
    return 1.0f + static_cast<float>(std::uniform_real_distribution<>(-0.5, 2.0)(random));
  });
}

void float32_is_as_exact_as_it_is_said_to_be() {
  const Matrix x = shifted(600, 140);
  const Errors parts = errors<Products::bfloat16_parts>(x), tf32 = errors<Products::tf32>(x);
  EXPECT(parts.products <= std::ldexp(1.0, -15) && parts.total <= std::ldexp(1.0, -17));
  EXPECT(tf32.products <= std::ldexp(1.0, -10) && tf32.total <= 1e-6);
  EXPECT(tf32.diagonal <= std::ldexp(1.0, -13));  // rounding to the nearest leans to neither side
}

// Odd squares: 2048 of them are exact in float32, what comes after is not.
Matrix odd(int64_t tokens, int64_t features) {
  return matrix(tokens, features, [](auto& random) { return static_cast<float>(51 + 2 * (random() % 20)); });
}

void planted_faults_are_found() {
  for (Fault fault : {Fault::last_split_left_out, Fault::last_tile_left_out}) {
    EXPECT(!errors<Products::of_16_bits>(eighths(1000, 130), false, fault).none());
    EXPECT(!errors<Products::tf32>(eighths(1000, 130), false, fault).none());
  }
  EXPECT(!errors<Products::tf32>(eighths(100, 130), false, Fault::tokens_of_columns).none());
  const Matrix x = shifted(600, 140);
  EXPECT(errors<Products::bfloat16_parts>(x, false, Fault::no_low_part).products > std::ldexp(1.0, -13));
  EXPECT(errors<Products::tf32>(x, false, Fault::cut).diagonal > std::ldexp(1.0, -12));
  EXPECT(errors<Products::tf32>(x, false, Fault::rounded_sums).total > 1e-6);
  for (Fault fault : {Fault::none, Fault::one_chain}) {  // one multiprocessor: no split, straight into the state
    EXPECT(errors<Products::of_16_bits>(odd(5000, 20), false, fault, 1).none() == (fault == Fault::none));
    EXPECT(errors<Products::tf32>(odd(5000, 20), false, fault, 1).none() == (fault == Fault::none));
  }
}

}  // namespace

int main() {
  the_algorithm_gives_plain_sums();
  float32_is_as_exact_as_it_is_said_to_be();
  planted_faults_are_found();
  return tests::result();
}
