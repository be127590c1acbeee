// Index arithmetic of the covariance kernels: which tile, which tokens, which bytes, which element.
//
// A block owns one 128 x 128 tile of the lower triangle and one range of tokens. In the sm_80 kernels a stage holds 32
// tokens of the tile's 128 row features and of its 128 column features, token-major, as 16-byte chunks of 8 features.
// wgmma_tiles.h has what differs on sm_90.
#pragma once

#include <cmath>

#include "../host_device.h"

namespace lowrank_ops::covariance {

constexpr int kTile = 128;
constexpr int kTokens = 32;          // per stage
constexpr int kThreads = 256;
constexpr int kChunk = 8;            // features of 2 bytes in 16 bytes
constexpr int kChunksPerRow = kTile / kChunk;
constexpr int kPartBytes = kTokens * kTile * 2;  // one operand of one stage in a 16-bit type
constexpr int kCopies = kTokens * kChunksPerRow / kThreads;  // chunks per thread, operand and stage
constexpr int kChunkSteps = 64;  // 2048 tokens: the longest chain of additions in the tensor cores' fp32

// Warps lie 2 x 4 over the tile; each owns 64 x 32 as 4 x 4 products of 16 x 8.
constexpr int kWarpRows = 64;
constexpr int kWarpCols = 32;
constexpr int kMmaRows = kWarpRows / 16;
constexpr int kMmaCols = kWarpCols / 8;
constexpr int kStaticSharedBytes = 4096 + 4096 + 128;  // column sums of all threads; offsets of patches; the tile
constexpr int kPartial = kTile * kTile;  // floats of a tile in scratch

struct Tile {
  int row;
  int col;  // <= row
};

LRO_HD int64_t triangle(int64_t rows) { return rows * (rows + 1) / 2; }

// The index-th tile of the lower triangle, rows one after another.
LRO_HD Tile tile_at(int64_t index) {
  int64_t row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (triangle(row) > index) --row;      // the root may round either way
  while (triangle(row + 1) <= index) ++row;
  return {static_cast<int>(row), static_cast<int>(index - triangle(row))};
}

struct Range {
  int64_t begin;
  int64_t end;
};

LRO_HD Range tokens_of_split(int64_t split, int64_t tokens_per_split, int64_t tokens) {
  return {least(split * tokens_per_split, tokens), least((split + 1) * tokens_per_split, tokens)};
}

// Byte offset of a chunk in one operand of a stage. Rows are 256 bytes apart, so the eight rows that ldmatrix
// reads at once would share their banks; the exclusive or spreads them over all 32.
LRO_HD constexpr int chunk_offset(int token, int chunk) {
  return (token * kChunksPerRow + (chunk ^ (token & 7))) * 16;
}

struct Copy {
  int token;  // in the stage
  int chunk;  // in the row
};

// The copy-th chunk a thread brings: half-warps read 256 contiguous bytes of a row.
LRO_HD constexpr Copy copy_along_features(int thread, int copy) {
  return {thread / kChunksPerRow + copy * (kThreads / kChunksPerRow), thread % kChunksPerRow};
}

// The same for patches: neighbouring lanes take neighbouring tokens, which lie side by side in an image.
LRO_HD constexpr Copy copy_along_tokens(int thread, int copy) {
  return {thread % kTokens, thread / kTokens + copy * (kThreads / kTokens)};
}

// How many of the 8 features from `feature` on exist.
LRO_HD constexpr int valid_features(int64_t feature, int64_t features) {
  return static_cast<int>(greatest(0, least(kChunk, features - feature)));
}

// The row that `lane` names to ldmatrix.x4.trans for the A operand (rows of the tile) of a 16 x 16 step: matrices
// 0..3 are (rows 0-7, tokens 0-7), (rows 8-15, tokens 0-7), (rows 0-7, tokens 8-15), (rows 8-15, tokens 8-15).
LRO_HD constexpr int a_offset(int lane, int warp, int mma_row, int step) {
  int matrix = lane / 8;
  int token = step * 16 + (matrix / 2) * 8 + lane % 8;
  int feature = (warp / 4) * kWarpRows + mma_row * 16 + (matrix % 2) * 8;
  return chunk_offset(token, feature / kChunk);
}

// The same for the B operand (columns of the tile), two 8-column products at once: matrices 0..3 are
// (columns 0-7, tokens 0-7), (columns 0-7, tokens 8-15), (columns 8-15, tokens 0-7), (columns 8-15, tokens 8-15).
LRO_HD constexpr int b_offset(int lane, int warp, int pair, int step) {
  int matrix = lane / 8;
  int token = step * 16 + (matrix % 2) * 8 + lane % 8;
  int feature = (warp % 4) * kWarpCols + pair * 16 + (matrix / 2) * 8;
  return chunk_offset(token, feature / kChunk);
}

// Where element `e` (0..3) of a thread's accumulator of product (mma_row, mma_col) lies in the tile.
LRO_HD constexpr int accumulator_row(int lane, int warp, int mma_row, int e) {
  return (warp / 4) * kWarpRows + mma_row * 16 + lane / 4 + (e / 2) * 8;
}
LRO_HD constexpr int accumulator_col(int lane, int warp, int mma_col, int e) {
  return (warp % 4) * kWarpCols + mma_col * 8 + (lane % 4) * 2 + e % 2;
}

// Column sums: a thread adds two neighbouring features over 8 of a stage's tokens.
constexpr int kSumGroups = kThreads / (kTile / 2);
constexpr int kSumTokens = kTokens / kSumGroups;
LRO_HD constexpr int sum_feature(int thread) { return thread % (kTile / 2) * 2; }
LRO_HD constexpr int sum_group(int thread) { return thread / (kTile / 2); }
LRO_HD constexpr int sum_thread(int group, int feature) { return group * (kTile / 2) + feature / 2; }
LRO_HD constexpr int sum_offset(int thread, int i) {
  int feature = sum_feature(thread);
  return chunk_offset(sum_group(thread) * kSumTokens + i, feature / kChunk) + feature % kChunk * 2;
}

// Scratch of a call with splits: all partial tiles, row by row, then all partial sums.
LRO_HD constexpr int64_t partial_offset(int64_t group, int64_t split, int64_t tile, int64_t splits, int64_t tiles) {
  return ((group * splits + split) * tiles + tile) * kPartial;
}
LRO_HD constexpr int64_t partial_sum_offset(int64_t group, int64_t split, int64_t feature, int64_t groups,
                                            int64_t splits, int64_t tiles, int64_t features) {
  return groups * splits * tiles * kPartial + (group * splits + split) * features + feature;
}

// The kernel that adds the partial tiles: 16 blocks a tile, element `e` (0..3) of a thread.
constexpr int kAddElements = 4;
constexpr int kAddBlocks = kPartial / (kThreads * kAddElements);
LRO_HD constexpr int added_element(int slice, int thread, int e) {
  return (slice * kAddElements + e) * kThreads + thread;
}

}  // namespace lowrank_ops::covariance
