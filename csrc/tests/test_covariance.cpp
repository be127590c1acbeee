// The covariance kernels' index arithmetic, and their algorithm lane by lane, against plain sums.
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "../covariance/patches.h"
#include "../covariance/tiles.h"
#include "../planner.h"
#include "check.h"
#include "warp.h"

using namespace lowrank_ops;
using namespace lowrank_ops::covariance;

namespace {

void every_lower_tile_is_visited_once() {
  int64_t index = 0;
  for (int row = 0; row < 2000; ++row)
    for (int col = 0; col <= row; ++col, ++index) {
      const Tile tile = tile_at(index);
      EXPECT(tile.row == row && tile.col == col);
    }
  std::mt19937_64 random(1);
  for (int i = 0; i < 100000; ++i) {  // up to the largest grid
    int64_t at = static_cast<int64_t>(random() % 2147483647u);
    const Tile tile = tile_at(at);
    EXPECT(triangle(tile.row) + tile.col == at && tile.col >= 0 && tile.col <= tile.row);
  }
}

void every_token_is_counted_once() {
  std::mt19937_64 random(2);
  for (int i = 0; i < 20000; ++i) {
    int64_t tokens = 1 + static_cast<int64_t>(random() >> (29 + random() % 34));
    const CovariancePlan plan = plan_covariance({tokens, 1 + static_cast<int64_t>(random() % 8192), 1,
                                                 Dtype::bfloat16, Source::matrix, {90, 132, 232448}});
    int64_t expected = 0;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const Range range = tokens_of_split(split, plan.tokens_per_split, tokens);
      EXPECT(range.begin == expected && range.end > range.begin);
      expected = range.end;
    }
    EXPECT(expected == tokens);
  }
}

void every_chunk_is_copied_once_and_lies_alone() {
  for (bool along_tokens : {false, true}) {
    std::vector<int> hits(kTokens * kChunksPerRow, 0);
    std::vector<int> places(kPartBytes / 16, 0);
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < kCopies; ++i) {
        const Copy copy = along_tokens ? copy_along_tokens(thread, i) : copy_along_features(thread, i);
        EXPECT(copy.token >= 0 && copy.token < kTokens && copy.chunk >= 0 && copy.chunk < kChunksPerRow);
        ++hits[copy.token * kChunksPerRow + copy.chunk];
        const int offset = chunk_offset(copy.token, copy.chunk);
        EXPECT(offset % 16 == 0 && offset >= 0 && offset + 16 <= kPartBytes);
        ++places[offset / 16];
      }
    for (int count : hits) EXPECT(count == 1);
    for (int count : places) EXPECT(count == 1);
  }
}

int bank_conflicts(const std::vector<int>& offsets) {  // of eight lanes that touch 16 bytes each
  std::vector<int> banks(32, 0);
  for (int offset : offsets)
    for (int word = 0; word < 4; ++word) ++banks[(offset / 4 + word) % 32];
  int most = 0;
  for (int count : banks) most = std::max(most, count);
  return most - 1;
}

void shared_memory_is_touched_without_bank_conflicts() {
  for (int warp = 0; warp < kThreads / 32; ++warp)
    for (int phase = 0; phase < 4; ++phase) {
      for (int step = 0; step < kTokens / 16; ++step) {
        for (int row = 0; row < kMmaRows; ++row) {
          std::vector<int> offsets;
          for (int lane = phase * 8; lane < phase * 8 + 8; ++lane) offsets.push_back(a_offset(lane, warp, row, step));
          EXPECT(bank_conflicts(offsets) == 0);
        }
        for (int pair = 0; pair < kMmaCols / 2; ++pair) {
          std::vector<int> offsets;
          for (int lane = phase * 8; lane < phase * 8 + 8; ++lane) offsets.push_back(b_offset(lane, warp, pair, step));
          EXPECT(bank_conflicts(offsets) == 0);
        }
      }
      for (int i = 0; i < kCopies; ++i) {
        std::vector<int> rows, columns;
        for (int lane = phase * 8; lane < phase * 8 + 8; ++lane) {
          const Copy row = copy_along_features(warp * 32 + lane, i), column = copy_along_tokens(warp * 32 + lane, i);
          rows.push_back(chunk_offset(row.token, row.chunk));
          columns.push_back(chunk_offset(column.token, column.chunk));
        }
        EXPECT(bank_conflicts(rows) == 0);
        EXPECT(bank_conflicts(columns) == 0);
      }
    }
}

void the_tile_and_its_scratch_are_covered_once() {
  std::vector<int> elements(kTile * kTile, 0), scratch(kPartial, 0), sums(kTile, 0);
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int row = 0; row < kMmaRows; ++row)
      for (int col = 0; col < kMmaCols; ++col)
        for (int e = 0; e < 4; ++e) {
          ++elements[accumulator_row(thread % 32, thread / 32, row, e) * kTile +
                     accumulator_col(thread % 32, thread / 32, col, e)];
        }
    for (int slice = 0; slice < kAddBlocks; ++slice)
      for (int e = 0; e < kAddElements; ++e) ++scratch[added_element(slice, thread, e)];
    for (int half = 0; half < 2; ++half) {
      ++sums[sum_feature(thread) + half];
      EXPECT(sum_thread(sum_group(thread), sum_feature(thread) + half) == thread);
    }
  }
  for (int count : elements) EXPECT(count == 1);
  for (int count : scratch) EXPECT(count == 1);
  for (int count : sums) EXPECT(count == kSumGroups);
  // Partial tiles and sums of different blocks do not overlap, also beyond 2^31 floats.
  const int64_t groups = 3, splits = 64, tiles = 5050, features = 12800;
  int64_t end = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t split = 0; split < splits; ++split)
      for (int64_t tile = 0; tile < tiles; tile += tiles - 1) {
        const int64_t at = partial_offset(group, split, tile, splits, tiles);
        EXPECT(tile == 0 ? at == end : at == end + (tiles - 1) * kPartial);
        if (tile) end = at + kPartial;
      }
  EXPECT(end > (int64_t{1} << 31));
  EXPECT(partial_sum_offset(0, 0, 0, groups, splits, tiles, features) == end);
  EXPECT(partial_sum_offset(groups, 0, 0, groups, splits, tiles, features) == end + groups * splits * features);
}

// ---- the algorithm ----

struct Matrix {
  int64_t tokens, features;
  std::vector<float> values;
  float at(int64_t token, int64_t feature) const {
    EXPECT(token >= 0 && token < tokens && feature >= 0 && feature < features);
    return values.at(token * features + feature);
  }
};

Matrix random_matrix(int64_t tokens, int64_t features, unsigned seed) {
  std::mt19937 random(seed);
  Matrix x{tokens, features, std::vector<float>(tokens * features)};
  for (float& value : x.values) value = static_cast<float>(static_cast<int>(random() % 33) - 16) / 8;  // exact sums
  return x;
}

using Operand = std::vector<float>;  // one operand of a stage: kPartBytes / 2 elements

void bring(Operand& operand, const Matrix& x, int64_t first_feature, int64_t first_token, int64_t end, bool patches) {
  std::fill(operand.begin(), operand.end(), NAN);  // whatever is not written must not be read
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < kCopies; ++i) {
      const Copy copy = patches ? copy_along_tokens(thread, i) : copy_along_features(thread, i);
      const int64_t token = first_token + copy.token, feature = first_feature + copy.chunk * kChunk;
      const int valid = token < end ? valid_features(feature, x.features) : 0;
      for (int e = 0; e < kChunk; ++e)
        operand[chunk_offset(copy.token, copy.chunk) / 2 + e] = e < valid ? x.at(token, feature + e) : 0.0f;
    }
}

std::array<float, 8> row_of(const Operand& operand, int offset) {
  std::array<float, 8> row;
  std::copy_n(operand.begin() + offset / 2, 8, row.begin());
  return row;
}

struct Block {  // accumulators of all threads
  std::vector<std::array<float, 4>> tile = std::vector<std::array<float, 4>>(kThreads * kMmaRows * kMmaCols);
  std::vector<std::array<double, 2>> sums = std::vector<std::array<double, 2>>(kThreads);
  std::array<float, 4>& at(int thread, int row, int col) { return tile[(thread * kMmaRows + row) * kMmaCols + col]; }
};

void multiply_stage(Block& block, const Operand& rows, const Operand& cols, bool diagonal) {
  for (int warp = 0; warp < kThreads / 32; ++warp)
    for (int step = 0; step < kTokens / 16; ++step)
      for (int row = 0; row < kMmaRows; ++row) {
        const auto a = tests::load_matrices_transposed<float>(
            [&](int offset) { return row_of(rows, offset); },
            [&](int lane) { return a_offset(lane, warp, row, step); });
        for (int pair = 0; pair < kMmaCols / 2; ++pair) {
          const auto b = tests::load_matrices_transposed<float>(
              [&](int offset) { return row_of(cols, offset); },
              [&](int lane) { return b_offset(lane, warp, pair, step); });
          for (int half = 0; half < 2; ++half) {
            std::array<std::array<float, 4>, 32> d;
            std::array<std::array<tests::Pair<float>, 2>, 32> operand;
            for (int lane = 0; lane < 32; ++lane) {
              d[lane] = block.at(warp * 32 + lane, row, pair * 2 + half);
              operand[lane] = {b[lane][half * 2], b[lane][half * 2 + 1]};
            }
            tests::multiply_add(d, a, operand);
            for (int lane = 0; lane < 32; ++lane) block.at(warp * 32 + lane, row, pair * 2 + half) = d[lane];
          }
        }
      }
  if (!diagonal) return;
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < kSumTokens; ++i)
      for (int half = 0; half < 2; ++half) block.sums[thread][half] += rows[sum_offset(thread, i) / 2 + half];
}

// As the two kernels do it, tile by tile and split by split, from the plan to the state.
void run(const Matrix& x, const CovariancePlan& plan, bool patches, std::vector<double>& second_moment,
         std::vector<double>& total) {
  std::vector<float> scratch(plan.scratch_floats, NAN);
  Operand rows(kPartBytes / 2), cols(kPartBytes / 2);
  for (int64_t index = 0; index < plan.tiles; ++index) {
    const Tile tile = tile_at(index);
    const bool diagonal = tile.row == tile.col;
    const auto add = [&](int64_t row, int64_t col, double value) {
      if (row < x.features && col <= row) second_moment[row * x.features + col] += value;
    };
    for (int64_t split = 0; split < plan.splits; ++split) {
      const Range range = tokens_of_split(split, plan.tokens_per_split, x.tokens);
      Block block;
      for (int64_t token = range.begin; token < range.end; token += kTokens) {
        bring(rows, x, int64_t{tile.row} * kTile, token, range.end, patches);
        if (!diagonal) bring(cols, x, int64_t{tile.col} * kTile, token, range.end, patches);
        multiply_stage(block, rows, diagonal ? rows : cols, diagonal);
      }
      for (int thread = 0; thread < kThreads; ++thread)
        for (int row = 0; row < kMmaRows; ++row)
          for (int col = 0; col < kMmaCols; ++col)
            for (int e = 0; e < 4; ++e) {
              const float value = block.at(thread, row, col)[e];
              if (plan.splits == 1)
                add(int64_t{tile.row} * kTile + accumulator_row(thread % 32, thread / 32, row, e),
                    int64_t{tile.col} * kTile + accumulator_col(thread % 32, thread / 32, col, e), value);
              else
                scratch[partial_offset(0, split, index, plan.splits, plan.tiles) +
                        accumulator_row(thread % 32, thread / 32, row, e) * kTile +
                        accumulator_col(thread % 32, thread / 32, col, e)] = value;
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
    for (int slice = 0; slice < kAddBlocks; ++slice)
      for (int thread = 0; thread < kThreads; ++thread)
        for (int e = 0; e < kAddElements; ++e) {
          const int element = added_element(slice, thread, e);
          double sum = 0;
          for (int64_t split = 0; split < plan.splits; ++split)
            sum += scratch[partial_offset(0, split, index, plan.splits, plan.tiles) + element];
          add(int64_t{tile.row} * kTile + element / kTile, int64_t{tile.col} * kTile + element % kTile, sum);
        }
    for (int i = 0; diagonal && i < kTile && int64_t{tile.row} * kTile + i < x.features; ++i)
      for (int64_t split = 0; split < plan.splits; ++split)
        total[tile.row * kTile + i] += scratch[partial_sum_offset(0, split, tile.row * kTile + i, 1, plan.splits,
                                                                  plan.tiles, x.features)];
  }
}

bool equals_plain_sums(int64_t tokens, int64_t features, bool patches, int fewer_splits = 0, int fewer_tiles = 0) {
  const Matrix x = random_matrix(tokens, features, static_cast<unsigned>(tokens * 31 + features));
  CovariancePlan plan = plan_covariance(
      {tokens, features, 1, Dtype::bfloat16, patches ? Source::patches : Source::matrix, {80, 6, 166912}});
  EXPECT(plan.reason.empty());
  plan.splits -= fewer_splits;
  plan.tiles -= fewer_tiles;
  bool equal = true;
  std::vector<double> second_moment(features * features, 1.0), total(features, 1.0);  // added to, not overwritten
  run(x, plan, patches, second_moment, total);
  for (int64_t row = 0; row < features; ++row) {
    double sum = 1.0;
    for (int64_t token = 0; token < tokens; ++token) sum += x.at(token, row);
    equal &= total[row] == sum;
    for (int64_t col = 0; col < features; ++col) {
      double expected = 1.0;
      for (int64_t token = 0; col <= row && token < tokens; ++token)
        expected += static_cast<double>(x.at(token, row)) * x.at(token, col);
      equal &= second_moment[row * features + col] == expected;  // above the diagonal: untouched
    }
  }
  return equal;
}

void the_algorithm_gives_plain_sums() {
  for (int64_t tokens : {1, 31, 32, 33, 100, 257})
    for (int64_t features : {1, 7, 8, 127, 128, 129, 200, 300}) EXPECT(equals_plain_sums(tokens, features, false));
  EXPECT(equals_plain_sums(700, 130, true));
  EXPECT(equals_plain_sums(1000, 64, false));
}

void planted_faults_are_found() {
  EXPECT(!equals_plain_sums(1000, 130, false, 1, 0));
  EXPECT(!equals_plain_sums(1000, 130, false, 0, 1));
}

// ---- patches ----

void patches_are_those_of_a_convolution() {
  std::mt19937 random(5);
  for (int i = 0; i < 300; ++i) {
    const auto from = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    Patches p{};
    p.channels = from(1, 3);
    p.kernel_height = from(1, 3), p.kernel_width = from(1, 3);
    p.dilation_y = from(1, 2), p.dilation_x = from(1, 2);
    p.stride_y = from(1, 3), p.stride_x = from(1, 3);
    p.padding_y = from(0, 2), p.padding_x = from(0, 2);
    p.height = from(5, 9), p.width = from(5, 9);
    p.out_height = output_length(p.height, p.kernel_height, p.stride_y, p.padding_y, p.dilation_y);
    p.out_width = output_length(p.width, p.kernel_width, p.stride_x, p.padding_x, p.dilation_x);
    const bool last = random() % 2;  // channels last
    p.channel_stride = last ? 1 : p.height * p.width;
    p.col_stride = last ? p.channels : 1;
    p.row_stride = p.col_stride * p.width;
    p.image_stride = int64_t{p.channels} * p.height * p.width;
    uint32_t token = 0;
    for (int image = 0; image < 2; ++image)
      for (int oy = 0; oy < p.out_height; ++oy)
        for (int ox = 0; ox < p.out_width; ++ox, ++token) {
          const PatchToken corner = patch_token(p, token);
          int feature = 0;
          for (int c = 0; c < p.channels; ++c)
            for (int ky = 0; ky < p.kernel_height; ++ky)
              for (int kx = 0; kx < p.kernel_width; ++kx, ++feature) {
                const PatchFeature f = patch_feature(p, feature);
                const int y = oy * p.stride_y - p.padding_y + ky * p.dilation_y;
                const int x = ox * p.stride_x - p.padding_x + kx * p.dilation_x;
                const bool real = y >= 0 && y < p.height && x >= 0 && x < p.width;
                EXPECT(inside(p, corner, f) == real);
                if (real)
                  EXPECT(corner.offset + f.offset == image * p.image_stride + c * p.channel_stride +
                                                         y * p.row_stride + x * p.col_stride);
              }
        }
  }
  Patches huge{};  // offsets beyond 2^31 elements
  huge.channels = 64, huge.height = huge.width = huge.out_height = huge.out_width = 1024;
  huge.kernel_height = huge.kernel_width = huge.stride_y = huge.stride_x = huge.dilation_y = huge.dilation_x = 1;
  huge.col_stride = 1, huge.row_stride = 1024, huge.channel_stride = 1 << 20, huge.image_stride = int64_t{64} << 20;
  const PatchToken token = patch_token(huge, 100u * (1u << 20) + 5);
  EXPECT(token.offset == 100 * (int64_t{64} << 20) + 5);
}

}  // namespace

int main() {
  every_lower_tile_is_visited_once();
  every_token_is_counted_once();
  every_chunk_is_copied_once_and_lies_alone();
  shared_memory_is_touched_without_bank_conflicts();
  the_tile_and_its_scratch_are_covered_once();
  the_algorithm_gives_plain_sums();
  planted_faults_are_found();
  patches_are_those_of_a_convolution();
  return tests::result();
}
