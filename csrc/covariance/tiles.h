// Index arithmetic of the covariance kernels: which tile, tokens, bytes and accumulators.
//
// A CTA owns one 128 x 128 tile of the lower triangle and one range of tokens (split-K). In the sm_80 kernel a stage
// holds 32 tokens of the tile's 128 row features and 128 column features, token-major, in chunks of 16 bytes.
// wgmma_tiles.h has what differs on sm_90.
#pragma once

#include <cmath>

#include "../arch/fragment.h"

namespace lowrank_ops::covariance {

constexpr int kTile = 128;
constexpr int kTokens = 32;  // per stage
constexpr int kThreads = 256;
constexpr int kChunkSteps = 64;  // 2048 tokens: the longest accumulation in the tensor cores' fp32

// 2 x 4 warps over the tile; each owns 64 x 32 as 4 x 4 MMAs of 16 x 8.
constexpr int kWarpRows = 64;
constexpr int kWarpCols = 32;
constexpr int kMmaRows = kWarpRows / 16;
constexpr int kMmaCols = kWarpCols / 8;
constexpr int kStaticSharedBytes = 4096 + 4096 + 128;  // column sums; patch offsets; tile origin

struct Tile {
  int row;
  int col;  // <= row
};

LRO_HD int64_t triangle(int64_t rows) { return rows * (rows + 1) / 2; }

// The index-th tile of the lower triangle in row-major order.
LRO_HD Tile tile_at(int64_t index) {
  int64_t row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (triangle(row) > index) --row;  // the square root may round either way
  while (triangle(row + 1) <= index) ++row;
  return {static_cast<int>(row), static_cast<int>(index - triangle(row))};
}

struct Range {
  int64_t begin;
  int64_t end;
};

LRO_HD Range tokens_of_split(int64_t split, int64_t tokens_per_split, int64_t tokens) {
  return {min64(split * tokens_per_split, tokens), min64((split + 1) * tokens_per_split, tokens)};
}

struct Copy {
  int token;  // in the stage
  int chunk;  // in the row
};

// One operand of one stage, in elements of 2 or 4 bytes.
template <int kElementBytes>
struct Layout {
  static constexpr int kChunk = 16 / kElementBytes;  // features
  static constexpr int kChunksPerRow = kTile / kChunk;
  static constexpr int kRowBytes = kTile * kElementBytes + (kElementBytes == 4 ? 16 : 0);
  static constexpr int kBytes = kTokens * kRowBytes;
  static constexpr int kCopies = kTokens * kChunksPerRow / kThreads;  // chunks per thread

  // Byte offset of a chunk, free of bank conflicts between the same chunk of eight rows: rows of 256 bytes are
  // swizzled, longer rows padded by 16 bytes.
  LRO_HD static constexpr int offset(int token, int chunk) {
    return token * kRowBytes + (kElementBytes == 2 ? chunk ^ (token & 7) : chunk) * 16;
  }
  LRO_HD static constexpr int feature_offset(int token, int feature) {
    return offset(token, feature / kChunk) + feature % kChunk * kElementBytes;
  }

  // The copy-th chunk that a thread loads: neighboring threads load the rest of the row.
  LRO_HD static constexpr Copy copy_along_features(int thread, int copy) {
    return {thread / kChunksPerRow + copy * (kThreads / kChunksPerRow), thread % kChunksPerRow};
  }

  // The same for patches: neighboring lanes load neighboring tokens, which are contiguous in an image.
  LRO_HD static constexpr Copy copy_along_tokens(int thread, int copy) {
    return {thread % kTokens, thread / kTokens + copy * (kThreads / kTokens)};
  }

  // The number of a chunk's features, from `feature` on, that exist.
  LRO_HD static constexpr int valid_features(int64_t feature, int64_t features) {
    return static_cast<int>(max64(0, min64(kChunk, features - feature)));
  }
};

// The row address of `lane` for ldmatrix.x4.trans of the A operand (rows of the tile) of a 16 x 16 step: matrices 0 to
// 3 are (rows 0-7, tokens 0-7), (rows 8-15, tokens 0-7), (rows 0-7, tokens 8-15), (rows 8-15, tokens 8-15).
LRO_HD constexpr int a_offset(int lane, int warp, int mma_row, int step) {
  int matrix = lane / 8;
  int token = step * 16 + (matrix / 2) * 8 + lane % 8;
  int feature = (warp / 4) * kWarpRows + mma_row * 16 + (matrix % 2) * 8;
  return Layout<2>::feature_offset(token, feature);
}

// The same for the B operand (columns of the tile), two MMAs of 8 columns: matrices 0 to 3 are
// (columns 0-7, tokens 0-7), (columns 0-7, tokens 8-15), (columns 8-15, tokens 0-7), (columns 8-15, tokens 8-15).
LRO_HD constexpr int b_offset(int lane, int warp, int pair, int step) {
  int matrix = lane / 8;
  int token = step * 16 + (matrix % 2) * 8 + lane % 8;
  int feature = (warp % 4) * kWarpCols + pair * 16 + (matrix / 2) * 8;
  return Layout<2>::feature_offset(token, feature);
}

// TensorFloat-32 has 4-byte elements, which ldmatrix cannot transpose: a lane loads elements `i` of the operands of an
// 8-token step one by one, 0 to 3 of A and 0 to 1 of B. In mma.m16n8k8 a lane holds k = lane % 4 and k + 4. The order
// of K is free: a lane takes two neighboring tokens, so that the four lanes' tokens are 32 bytes of banks apart and
// their eight features fill the gaps without conflicts.
LRO_HD constexpr int tf32_token(int lane, int step, int second) { return step * 8 + lane % 4 * 2 + second; }
LRO_HD constexpr int tf32_a_offset(int lane, int warp, int mma_row, int step, int i) {
  int feature = (warp / 4) * kWarpRows + mma_row * 16 + lane / 4 + (i % 2) * 8;
  return Layout<4>::feature_offset(tf32_token(lane, step, i / 2), feature);
}
LRO_HD constexpr int tf32_b_offset(int lane, int warp, int mma_col, int step, int i) {
  int feature = (warp % 4) * kWarpCols + mma_col * 8 + lane / 4;
  return Layout<4>::feature_offset(tf32_token(lane, step, i), feature);
}

// Row and column in the tile of element `e` (0 to 3) of a thread's accumulator of MMA (mma_row, mma_col).
LRO_HD constexpr int accumulator_row(int lane, int warp, int mma_row, int e) {
  return (warp / 4) * kWarpRows + mma_row * 16 + arch::mma_accumulator_row(lane, e);
}
LRO_HD constexpr int accumulator_col(int lane, int warp, int mma_col, int e) {
  return (warp % 4) * kWarpCols + mma_col * 8 + arch::mma_accumulator_col(lane, e);
}

// Column sums: a thread adds two neighboring features over 8 of a stage's tokens.
constexpr int kSumGroups = kThreads / (kTile / 2);
constexpr int kSumTokens = kTokens / kSumGroups;
LRO_HD constexpr int sum_feature(int thread) { return thread % (kTile / 2) * 2; }
LRO_HD constexpr int sum_group(int thread) { return thread / (kTile / 2); }
LRO_HD constexpr int sum_thread(int group, int feature) { return group * (kTile / 2) + feature / 2; }
LRO_HD constexpr int sum_token(int thread, int i) { return sum_group(thread) * kSumTokens + i; }

// Scratch of split tiles: all partial tiles of edge x edge, row-major, then all partial column sums.
LRO_HD constexpr int64_t partial_offset(int64_t group, int64_t split, int64_t tile, int64_t splits, int64_t tiles,
                                        int edge = kTile) {
  return ((group * splits + split) * tiles + tile) * edge * edge;
}
LRO_HD constexpr int64_t partial_sum_offset(int64_t group, int64_t split, int64_t feature, int64_t groups,
                                            int64_t splits, int64_t tiles, int64_t features, int edge = kTile) {
  return groups * splits * tiles * edge * edge + (group * splits + split) * features + feature;
}

// add_partials.cu: CTAs per tile, and the tile's element `e` (0 to 3) of a thread of CTA `slice`.
constexpr int kAddElements = 4;
LRO_HD constexpr int add_ctas(int edge) { return edge * edge / (kThreads * kAddElements); }
LRO_HD constexpr int added_element(int slice, int thread, int e) {
  return (slice * kAddElements + e) * kThreads + thread;
}

}  // namespace lowrank_ops::covariance
