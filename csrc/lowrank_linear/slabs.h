// Index arithmetic of the sm_90 decode kernel, where it differs from fragments.h: who multiplies what, and where it
// lies in shared memory.
//
// Down: a cluster takes 16 rows of down and a tile of tokens at a time, its blocks a range of features each. Up: a
// block takes a slab, 16-row tiles of up that lie together; the first ones lie in shared memory, the rest is streamed.
#pragma once

#include "fragments.h"

namespace lowrank_ops::lowrank_linear {

constexpr int kMostCluster = 8;

struct Span {
  int64_t begin, end;
};

// The features of down that block `rank` of a cluster sums; empty past the last.
LRO_HD constexpr Span features_of_block(int rank, int64_t split_features, int64_t in_features) {
  const int64_t begin = least(rank * split_features, in_features);
  return {begin, least(begin + split_features, in_features)};
}

// Units of work on down, in the order in which clusters take them: all rows of a tile of tokens, then the next tile.
struct Unit {
  int64_t first_row, first_token;
};
LRO_HD constexpr int64_t units(int64_t rank, int64_t tokens, int token_tile) {
  return ceil_div(rank, kRows) * ceil_div(tokens, token_tile);
}
LRO_HD constexpr Unit unit_at(int64_t unit, int64_t rank, int token_tile) {
  const int64_t tiles = ceil_div(rank, kRows);
  return {unit % tiles * kRows, unit / tiles * token_tile};
}

// The part of a unit's sums that block `rank` of a cluster of `blocks` adds up and writes: row i % 16, token i / 16.
LRO_HD constexpr Span sums_of_block(int rank, int blocks, int token_tile) {
  const int share = kRows * token_tile / blocks;
  return {rank * share, (rank + 1) * share};
}
// Where sum i of a unit waits for the cluster: two units in turn, so that one may be read while the next is written.
LRO_HD constexpr int block_sum_index(int round, int i, int token_tile) {
  return round % 2 * kRows * token_tile + i;
}

// The 16-row tiles of up that a block multiplies.
LRO_HD constexpr Span slab_of_block(int64_t block, int64_t blocks, int64_t out_features) {
  const int64_t tiles = ceil_div(out_features, kRows);
  return {block * tiles / blocks, (block + 1) * tiles / blocks};
}

// Byte offsets in shared memory; the slab's barrier is at 0.
struct Layout {
  int64_t sums;        // of the warps: sum_index
  int64_t block_sums;  // block_sum_index
  int64_t t;           // (token, rank), rows rank_pitch apart
  int64_t slab;        // (row, rank), rows rank_pitch apart
  int64_t bytes;
};
LRO_HD constexpr Layout layout(int token_tile, int64_t rank, int64_t resident_tiles) {
  Layout at{};
  at.sums = 128;
  at.block_sums = at.sums + sum_bytes(kRows, token_tile);
  at.t = at.block_sums + int64_t{4} * 2 * kRows * token_tile;
  at.slab = at.t + token_tile * rank_pitch(rank);
  at.bytes = at.slab + resident_tiles * kRows * rank_pitch(rank);
  return at;
}

}  // namespace lowrank_ops::lowrank_linear
