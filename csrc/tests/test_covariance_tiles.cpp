// The covariance kernels' index arithmetic: each tile, token, chunk and patch element once, without bank conflicts.
#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "../covariance/patches.h"
#include "../covariance/tiles.h"
#include "../covariance/wide_tiles.h"
#include "../planner.h"
#include "check.h"

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
    const CovariancePlan plan = plan_covariance(
        {tokens, 1 + static_cast<int64_t>(random() % 8192), 1, Dtype::bfloat16, Source::matrix, {90, 132, 232448}});
    int64_t expected = 0;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const Range range = tokens_of_split(split, plan.tokens_per_split, tokens);
      EXPECT(range.begin == expected && range.end > range.begin);
      expected = range.end;
    }
    EXPECT(expected == tokens);
  }
}

template <class Layout>
void every_chunk_is_copied_once() {
  for (bool along_tokens : {false, true}) {
    std::vector<int> hits(kTokens * Layout::kChunksPerRow, 0);
    std::vector<int> slots(Layout::kBytes / 16, 0);
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < Layout::kCopies; ++i) {
        const Copy copy = along_tokens ? Layout::copy_along_tokens(thread, i) : Layout::copy_along_features(thread, i);
        EXPECT(copy.token >= 0 && copy.token < kTokens && copy.chunk >= 0 && copy.chunk < Layout::kChunksPerRow);
        ++hits[copy.token * Layout::kChunksPerRow + copy.chunk];
        const int offset = Layout::offset(copy.token, copy.chunk);
        EXPECT(offset % 16 == 0 && offset >= 0 && offset + 16 <= Layout::kBytes);
        ++slots[offset / 16];
      }
    for (int count : hits) EXPECT(count == 1);
    for (int count : slots) EXPECT(count <= 1);  // rows of 4-byte elements are padded
  }
}

// Of the lanes of one shared-memory phase: as many as access 128 bytes.
int bank_conflicts(int first_lane, int bytes, const std::function<int(int lane)>& offset) {
  std::vector<int> banks(32, 0);
  for (int lane = first_lane; lane < first_lane + 128 / bytes; ++lane)
    for (int word = 0; word < bytes / 4; ++word) ++banks[(offset(lane) / 4 + word) % 32];
  return *std::max_element(banks.begin(), banks.end()) - 1;
}

template <class Layout>
void copies_and_sums_have_no_bank_conflicts() {
  for (int thread = 0; thread < kThreads; thread += 8)
    for (int i = 0; i < Layout::kCopies; ++i) {
      EXPECT(bank_conflicts(thread, 16, [&](int lane) {
               const Copy copy = Layout::copy_along_features(lane, i);
               return Layout::offset(copy.token, copy.chunk);
             }) == 0);
      EXPECT(bank_conflicts(thread, 16, [&](int lane) {
               const Copy copy = Layout::copy_along_tokens(lane, i);
               return Layout::offset(copy.token, copy.chunk);
             }) == 0);
    }
  const int pair = 32 / Layout::kChunk;  // bytes
  for (int thread = 0; thread < kThreads; thread += 128 / pair)
    for (int i = 0; i < kSumTokens; ++i)
      EXPECT(bank_conflicts(thread, pair, [&](int lane) {
               return Layout::feature_offset(sum_token(lane, i), sum_feature(lane));
             }) == 0);
}

void operands_have_no_bank_conflicts() {
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    for (int step = 0; step < kTokens / 16; ++step)
      for (int phase = 0; phase < 32; phase += 8) {
        for (int row = 0; row < kMmaRows; ++row)
          EXPECT(bank_conflicts(phase, 16, [&](int lane) { return a_offset(lane, warp, row, step); }) == 0);
        for (int pair = 0; pair < kMmaCols / 2; ++pair)
          EXPECT(bank_conflicts(phase, 16, [&](int lane) { return b_offset(lane, warp, pair, step); }) == 0);
      }
    for (int step = 0; step < kTokens / 8; ++step) {
      for (int row = 0; row < kMmaRows; ++row)
        for (int i = 0; i < 4; ++i)
          EXPECT(bank_conflicts(0, 4, [&](int lane) { return tf32_a_offset(lane, warp, row, step, i); }) == 0);
      for (int col = 0; col < kMmaCols; ++col)
        for (int i = 0; i < 2; ++i)
          EXPECT(bank_conflicts(0, 4, [&](int lane) { return tf32_b_offset(lane, warp, col, step, i); }) == 0);
    }
  }
  // Rows without padding, and tokens in the instruction's order, would have conflicts.
  EXPECT(bank_conflicts(0, 4, [](int lane) { return lane % 4 * 2 * kTile * 4 + lane / 4 * 4; }) == 3);
  EXPECT(bank_conflicts(0, 4, [](int lane) { return Layout<4>::feature_offset(lane % 4, lane / 4); }) == 1);
}

void the_tile_and_its_scratch_are_covered_once() {
  std::vector<int> elements(kTile * kTile, 0), scratch(kTile * kTile, 0), sums(kTile, 0);
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int row = 0; row < kMmaRows; ++row)
      for (int col = 0; col < kMmaCols; ++col)
        for (int e = 0; e < 4; ++e) {
          ++elements[accumulator_row(thread % 32, thread / 32, row, e) * kTile +
                     accumulator_col(thread % 32, thread / 32, col, e)];
        }
    for (int slice = 0; slice < add_ctas(kTile); ++slice)
      for (int e = 0; e < kAddElements; ++e) ++scratch[added_element(slice, thread, e)];
    for (int half = 0; half < 2; ++half) {
      ++sums[sum_feature(thread) + half];
      EXPECT(sum_thread(sum_group(thread), sum_feature(thread) + half) == thread);
    }
  }
  for (int count : elements) EXPECT(count == 1);
  for (int count : scratch) EXPECT(count == 1);
  for (int count : sums) EXPECT(count == kSumGroups);
  // Partial tiles and sums of different CTAs do not overlap, also beyond 2^31 floats.
  const int64_t groups = 3, splits = 64, tiles = 5050, features = 12800;
  int64_t end = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t split = 0; split < splits; ++split)
      for (int64_t tile = 0; tile < tiles; tile += tiles - 1) {
        const int64_t at = partial_offset(group, split, tile, splits, tiles);
        EXPECT(tile == 0 ? at == end : at == end + (tiles - 1) * kTile * kTile);
        if (tile) end = at + kTile * kTile;
      }
  EXPECT(end > (int64_t{1} << 31));
  EXPECT(partial_sum_offset(0, 0, 0, groups, splits, tiles, features) == end);
  EXPECT(partial_sum_offset(groups, 0, 0, groups, splits, tiles, features) == end + groups * splits * features);
}

// ---- sm_90 ----

void wgmma_tiles_are_covered_once() {
  namespace w = wgmma;
  std::vector<int> elements(kTile * kTile, 0), sums(w::kTokens * kTile, 0), bytes(w::kOperandBytes / 2, 0);
  for (int consumer = 0; consumer < w::kConsumers; ++consumer) {
    for (int i = 0; i < w::kAccumulators; ++i)
      ++elements[arch::wgmma_accumulator_row(consumer, i) * kTile + arch::wgmma_accumulator_col(consumer, i)];
    for (int i = 0; i < w::kSumTokens; ++i)
      for (int half = 0; half < 2; ++half) {
        const int token = w::sum_token(consumer, i), feature = w::sum_feature(consumer) + half;
        ++sums[token * kTile + feature];
        EXPECT(w::feature_offset(token, w::sum_feature(consumer)) + 2 * half == w::feature_offset(token, feature));
        EXPECT(w::sum_consumer(consumer / (kTile / 2), feature) == consumer);
      }
  }
  for (int token = 0; token < w::kTokens; ++token)
    for (int feature = 0; feature < kTile; ++feature) {
      // TMA's 128-byte swizzle: address bits 4 to 6 are flipped by bits 7 to 9.
      const int plain = feature / 64 * w::kTmaBytes + token * 128 + feature % 64 * 2;
      EXPECT(w::feature_offset(token, feature) == (plain ^ ((plain >> 7 & 7) << 4)));
      ++bytes[w::feature_offset(token, feature) / 2];
    }
  for (int count : elements) EXPECT(count == 1);
  for (int count : sums) EXPECT(count == 1);
  for (int count : bytes) EXPECT(count == 1);
}

void wgmma_descriptors_start_on_whole_swizzles() {
  namespace w = wgmma;
  const auto expect_descriptor = [](int offset) {
    const uint64_t descriptor = w::descriptor(static_cast<uint32_t>(offset));
    EXPECT(descriptor >> 62 == 1 && (descriptor & 0x3FFF) * 16 == static_cast<uint64_t>(offset));
    EXPECT((descriptor >> 16 & 0x3FFF) * 16 == w::kTmaBytes && (descriptor >> 32 & 0x3FFF) * 16 == 8 * 128);
    EXPECT(offset % arch::kSwizzleAlignment == 0);
  };
  for (int k = 0; k < w::kTokens / w::kMmaK; ++k) {
    expect_descriptor(w::b_offset(k));
    for (int group = 0; group < 2; ++group) {
      expect_descriptor(w::a_offset(group, k));
      for (int rank = 0; rank < wide::kClusterCtas; ++rank)
        for (bool diagonal : {false, true}) {
          const int offset = wide::a_offset(diagonal, rank, group, k);
          expect_descriptor(offset);
          EXPECT(offset < wide::kStageBytes && (diagonal == (offset < wide::kColumnBytes)));
        }
    }
  }
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
                  EXPECT(corner.offset + f.offset ==
                         image * p.image_stride + c * p.channel_stride + y * p.row_stride + x * p.col_stride);
              }
        }
  }
}

// Of images of up to 2^22 pixels and batches of up to 2^31 - 1 patches.
void patches_are_right_beyond_2_to_the_31_elements() {
  std::mt19937 random(6);
  int64_t largest = 0;
  for (int i = 0; i < 100000; ++i) {
    const auto from = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    Patches p{};
    p.channels = from(1, 2048);
    p.height = from(1, 2048), p.width = from(1, 2048);
    p.kernel_height = from(1, 7), p.kernel_width = from(1, 7);
    p.stride_y = from(1, 3), p.stride_x = from(1, 3);
    p.padding_y = from(0, 3), p.padding_x = from(0, 3);
    p.dilation_y = from(1, 2), p.dilation_x = from(1, 2);
    p.out_height = output_length(p.height, p.kernel_height, p.stride_y, p.padding_y, p.dilation_y);
    p.out_width = output_length(p.width, p.kernel_width, p.stride_x, p.padding_x, p.dilation_x);
    if (p.out_height < 1 || p.out_width < 1) continue;
    const bool last = random() % 2;
    p.channel_stride = last ? 1 : int64_t{p.height} * p.width;
    p.col_stride = last ? p.channels : 1;
    p.row_stride = p.col_stride * p.width;
    p.image_stride = int64_t{p.channels} * p.height * p.width;
    const int64_t positions = int64_t{p.out_height} * p.out_width;
    const int64_t image = random() % (2147483647 / positions);
    const int oy = from(0, p.out_height - 1), ox = from(0, p.out_width - 1);
    const int c = from(0, p.channels - 1), ky = from(0, p.kernel_height - 1), kx = from(0, p.kernel_width - 1);
    const PatchToken token = patch_token(p, static_cast<uint32_t>(image * positions + oy * int64_t{p.out_width} + ox));
    const PatchFeature feature = patch_feature(p, (c * p.kernel_height + ky) * p.kernel_width + kx);
    const int y = oy * p.stride_y - p.padding_y + ky * p.dilation_y;
    const int x = ox * p.stride_x - p.padding_x + kx * p.dilation_x;
    const bool real = y >= 0 && y < p.height && x >= 0 && x < p.width;
    EXPECT(inside(p, token, feature) == real);
    if (!real) continue;
    const int64_t offset = image * p.image_stride + c * p.channel_stride + y * p.row_stride + x * p.col_stride;
    EXPECT(token.offset + feature.offset == offset);
    largest = max64(largest, offset);
  }
  EXPECT(largest > int64_t{1} << 33);
}

}  // namespace

int main() {
  every_lower_tile_is_visited_once();
  every_token_is_counted_once();
  every_chunk_is_copied_once<Layout<2>>();
  every_chunk_is_copied_once<Layout<4>>();
  copies_and_sums_have_no_bank_conflicts<Layout<2>>();
  copies_and_sums_have_no_bank_conflicts<Layout<4>>();
  operands_have_no_bank_conflicts();
  the_tile_and_its_scratch_are_covered_once();
  wgmma_tiles_are_covered_once();
  wgmma_descriptors_start_on_whole_swizzles();
  patches_are_those_of_a_convolution();
  patches_are_right_beyond_2_to_the_31_elements();
  return tests::result();
}
