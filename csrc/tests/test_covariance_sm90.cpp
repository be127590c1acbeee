// The sm_90 covariance kernel's addressing and algorithm on the host: the tensor copy engine and wgmma as the PTX
// manual describes them, fed with the kernel's own index functions and descriptors.
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "../covariance/wgmma_tiles.h"
#include "../planner.h"
#include "check.h"

using namespace lowrank_ops;
using covariance::kTile;
namespace w = lowrank_ops::covariance::wgmma;

namespace {

enum class Fault { none, no_swizzle, columns_for_rows, last_step_left_out };

using Shared = std::vector<float>;  // an element for every two bytes

// The 128-byte swizzle: address bits 4..6 are flipped by bits 7..9.
int swizzled(int address) { return address ^ ((address >> 7 & 7) << 4); }

struct Matrix {
  int64_t tokens, features;
  std::vector<float> values;
};

// cp.async.bulk.tensor with the 128-byte swizzle: rows of 64 features, one after another, zeros outside the tensor.
void copy_box(Shared& shared, int to, const Matrix& x, int64_t feature, int64_t token, Fault fault = Fault::none) {
  for (int row = 0; row < w::kTokens; ++row)
    for (int col = 0; col < w::kBoxFeatures; ++col) {
      const bool inside = token + row < x.tokens && feature + col < x.features;
      const int address = to + row * w::kBoxFeatures * 2 + col * 2;
      shared[(fault == Fault::no_swizzle ? address : swizzled(address)) / 2] =
          inside ? x.values[(token + row) * x.features + feature + col] : 0.0f;
    }
}

// Element (feature, token) of an operand that lies with its features contiguous, as wgmma finds it by a descriptor.
float operand(const Shared& shared, uint64_t descriptor, int feature, int token) {
  const int start = static_cast<int>(descriptor & 0x3FFF) * 16;
  const int leading = static_cast<int>(descriptor >> 16 & 0x3FFF) * 16;
  const int stride = static_cast<int>(descriptor >> 32 & 0x3FFF) * 16;
  EXPECT(descriptor >> 62 == 1);             // 128-byte swizzle
  EXPECT((descriptor >> 49 & 7) == 0);       // the pattern starts on 1024 bytes, and so
  EXPECT(start % 1024 == 0);                 // must what it describes
  const int address = start + feature / 64 * leading + token / 8 * stride + token % 8 * 128 + feature % 64 * 2;
  return shared[swizzled(address) / 2];
}

void columns_for_sums_are_where_the_copy_put_them() {
  Matrix x{w::kTokens, kTile, std::vector<float>(w::kTokens * kTile)};
  for (size_t i = 0; i < x.values.size(); ++i) x.values[i] = static_cast<float>(i);
  Shared shared(w::kOperandBytes / 2, NAN);
  for (int box = 0; box < w::kBoxes; ++box) copy_box(shared, box * w::kBoxBytes, x, box * w::kBoxFeatures, 0);
  std::vector<int> seen(w::kTokens * kTile, 0);
  for (int consumer = 0; consumer < w::kConsumers; ++consumer)
    for (int i = 0; i < w::kSumTokens; ++i)
      for (int half = 0; half < 2; ++half) {
        const int token = w::sum_token(consumer, i), feature = w::sum_feature(consumer) + half;
        EXPECT(shared[w::feature_offset(token, feature) / 2] == x.values[token * kTile + feature]);
        EXPECT(w::feature_offset(token, w::sum_feature(consumer)) + 2 * half == w::feature_offset(token, feature));
        ++seen[token * kTile + feature];
        EXPECT(w::sum_consumer(consumer / (kTile / 2), feature) == consumer);
      }
  for (int count : seen) EXPECT(count == 1);
}

void the_tile_is_covered_once() {
  std::vector<int> elements(kTile * kTile, 0);
  for (int consumer = 0; consumer < w::kConsumers; ++consumer)
    for (int i = 0; i < w::kAccumulators; ++i)
      ++elements[w::accumulator_row(consumer, i) * kTile + w::accumulator_col(consumer, i)];
  for (int count : elements) EXPECT(count == 1);
}

// One tile over one range of tokens, as a block does it: stages in turn, warpgroup by warpgroup, step by step.
bool equals_plain_sums(int64_t tokens, int64_t features, covariance::Tile tile, Fault fault = Fault::none) {
  std::mt19937 random(static_cast<unsigned>(tokens + 7 * features));
  Matrix x{tokens, features, std::vector<float>(tokens * features)};
  for (float& value : x.values) value = static_cast<float>(static_cast<int>(random() % 33) - 16) / 8;
  const bool diagonal = tile.row == tile.col;
  const CovariancePlan plan =
      plan_covariance({tokens, features, 1, Dtype::bfloat16, Source::aligned_matrix, {90, 2, 232448}});
  EXPECT(plan.kernel == "covariance_sm90");

  std::vector<float> result(kTile * kTile, 0.0f);
  for (int64_t split = 0; split < plan.splits; ++split) {
    const covariance::Range range = covariance::tokens_of_split(split, plan.tokens_per_split, tokens);
    Shared shared(w::kStages * w::kStageBytes / 2, NAN);
    const int steps =
        static_cast<int>(ceil_div(range.end - range.begin, w::kTokens)) - (fault == Fault::last_step_left_out);
    for (int step = 0; step < steps; ++step) {
      const int stage = step % w::kStages * w::kStageBytes;
      const int64_t token = range.begin + step * w::kTokens;
      for (int op = 0; op < (diagonal ? 1 : 2); ++op)
        for (int box = 0; box < w::kBoxes; ++box)
          copy_box(shared, stage + op * w::kOperandBytes + box * w::kBoxBytes, x,
                   int64_t{op == 0 ? tile.row : tile.col} * kTile + box * w::kBoxFeatures, token, fault);
      const int cols = diagonal || fault == Fault::columns_for_rows ? stage : stage + w::kOperandBytes;
      for (int group = 0; group < 2; ++group)
        for (int k = 0; k < w::kTokens / w::kStep; ++k) {
          const uint64_t a = w::descriptor(stage + w::a_start(group, k)), b = w::descriptor(cols + w::b_start(k));
          float left[64][w::kStep], right[kTile][w::kStep];
          for (int t = 0; t < w::kStep; ++t) {
            for (int m = 0; m < 64; ++m) left[m][t] = operand(shared, a, m, t);
            for (int n = 0; n < kTile; ++n) right[n][t] = operand(shared, b, n, t);
          }
          for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < w::kAccumulators; ++i) {
              // The manual's layout of the accumulator, and where the kernel says that it lies in the tile.
              const int m = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + thread % 4 * 2 + i % 2;
              float sum = 0;
              for (int t = 0; t < w::kStep; ++t) sum += left[m][t] * right[n][t];
              const int consumer = group * 128 + thread;
              result[w::accumulator_row(consumer, i) * kTile + w::accumulator_col(consumer, i)] += sum;
            }
        }
    }
  }
  bool equal = true;
  for (int row = 0; row < kTile; ++row)
    for (int col = 0; col < kTile; ++col) {
      const int64_t i = int64_t{tile.row} * kTile + row, j = int64_t{tile.col} * kTile + col;
      float expected = 0;
      for (int64_t token = 0; i < features && j < features && token < tokens; ++token)
        expected += x.values[token * features + i] * x.values[token * features + j];
      equal &= result[row * kTile + col] == expected;
    }
  return equal;
}

}  // namespace

int main() {
  columns_for_sums_are_where_the_copy_put_them();
  the_tile_is_covered_once();
  EXPECT(equals_plain_sums(64, 128, {0, 0}));
  EXPECT(equals_plain_sums(1, 8, {0, 0}));
  EXPECT(equals_plain_sums(333, 200, {1, 0}));
  EXPECT(equals_plain_sums(700, 264, {2, 1}));
  EXPECT(equals_plain_sums(130, 264, {2, 2}));
  for (Fault fault : {Fault::no_swizzle, Fault::columns_for_rows, Fault::last_step_left_out})  // planted, and found
    EXPECT(!equals_plain_sums(333, 200, {1, 0}, fault));
  return tests::result();
}
