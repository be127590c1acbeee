// Index arithmetic of the decode kernels: which rows, features and bytes a thread owns.
//
// There are few tokens, so the weights are the M = 16 operand of mma.m16n8k16 and the tokens its N = 8. The order of K
// within an MMA is free as long as both operands agree: a lane loads 8 neighboring features (16 bytes) and feeds the
// first four to one MMA and the last four to the next. Weights go from global memory to the tensor cores without
// passing through shared memory.
#pragma once

#include "../arch/fragment.h"

namespace lowrank_ops::lowrank_linear {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;              // rows of a weight per MMA
constexpr int kFeatures = 32;          // features per step: two MMAs
constexpr int kVector = 8;             // features in 16 bytes
constexpr int kMaxTokens = 64;         // that the planner gives to the decode kernels
constexpr int kMaxChosenTokens = 256;  // that a choice may give them: a few token tiles of 64
constexpr int kMaxCluster = 8;

// Tokens per CTA: all of them, in whole groups of 8, or as many as the accumulators of a warp can hold.
LRO_HD constexpr int decode_token_tile(int64_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
}

// The kernels that decode_sm80 is compiled for, by ascending token tile. Rows off 16 bytes load element by element,
// which the size of the tile hardly changes: the smallest tile for large ranks, the largest for all else.
struct DecodeVariant {
  int token_tile;
  bool vectorized;  // rows start and end on 16 bytes
};
constexpr DecodeVariant kDecodeSm80Variants[] = {
    {8, true}, {16, true}, {32, true}, {64, true}, {8, false}, {64, false},
};

// The kernels that decode_sm90 is compiled for, by ascending token tile and rows. Of down a CTA takes `row_tiles` x 16
// rows at a time: with many tokens x is longer to read than 16 rows, which then share it.
struct DecodeSm90Variant {
  int token_tile;
  int row_tiles;
  LRO_HD constexpr int rows() const { return row_tiles * kRows; }
};
constexpr DecodeSm90Variant kDecodeSm90Variants[] = {
    {8, 1}, {16, 1}, {32, 1}, {32, 2}, {64, 1}, {64, 2}, {64, 4},
};

// ---- the members of a group ----

struct Span {
  int64_t begin, end;
};

struct Place {
  int member;
  int64_t index;  // within the member
};
// Where an index into the items of all members is; a member has count(member) items.
template <class Count>
LRO_HD constexpr Place place_of(int64_t index, int members, const Count& count) {
  int member = 0;
  for (; member < members - 1; ++member) {
    const int64_t items = count(member);
    if (index < items) break;
    index -= items;
  }
  return {member, index};
}

// The part of `span` within the `items` items from `first` on, counted from `first`; empty where begin >= end.
LRO_HD constexpr Span part_of_member(const Span& span, int64_t first, int64_t items) {
  return {max64(span.begin - first, 0), min64(span.end - first, items)};
}

// ---- a warp's step ----

// The first feature that a lane holds of a step, for weights and tokens alike.
LRO_HD constexpr int lane_feature(int lane) { return lane % 4 * kVector; }
// The first row of the weight that a lane holds; the second is 8 below.
LRO_HD constexpr int lane_row(int lane) { return lane / 4; }
// The token, of a group of 8, that a lane loads.
LRO_HD constexpr int lane_token(int lane) { return lane / 4; }
// A warp's i-th step; steps are distributed round-robin.
LRO_HD constexpr int step_of_warp(int warp, int i) { return warp + i * kWarps; }

// 16-row tiles of up per CTA of decode_up_sm80: with more tokens t is longer to read and so serves more rows.
LRO_HD constexpr int up_row_tiles(int token_tile) { return token_tile == 8 ? 1 : 2; }

// ---- shared memory and scratch ----

// The warps' partial sums, (warp, row, token). One token of padding puts rows into different banks.
LRO_HD constexpr int sum_index(int warp, int row, int token, int rows, int token_tile) {
  return (warp * rows + row) * (token_tile + 1) + token;
}
LRO_HD constexpr int64_t sum_bytes(int rows, int token_tile) {
  return int64_t{4} * sum_index(kWarps, 0, 0, rows, token_tile);
}

// decode_sm80's scratch, offsets in floats: t in the dtype of x, rows of whole units; where features are split, the
// sums of each unit (16 rows of down, a token tile) by split. Then, behind those of all members, a counter for each unit.
LRO_HD constexpr int64_t scratch_columns(int64_t rank) { return round_up(rank, kRows); }
LRO_HD constexpr int64_t scratch_units(int64_t tokens, int64_t rank, int token_tile) {
  return ceil_div(rank, kRows) * ceil_div(tokens, token_tile);
}
LRO_HD constexpr int64_t partials_offset(int64_t tokens, int64_t rank) { return tokens * scratch_columns(rank) / 2; }
LRO_HD constexpr int64_t partial_index(int64_t unit, int64_t split, int64_t splits, int token_tile) {
  return (unit * splits + split) * kRows * token_tile;
}
LRO_HD constexpr int64_t member_floats(int64_t tokens, int64_t rank, int token_tile, int64_t splits) {
  const int64_t units = splits > 1 ? scratch_units(tokens, rank, token_tile) : 0;
  return partials_offset(tokens, rank) + partial_index(units, 0, splits, token_tile);
}
LRO_HD constexpr int64_t scratch_floats(int64_t tokens, int64_t rank, int token_tile, int64_t splits) {
  const int64_t counters = splits > 1 ? scratch_units(tokens, rank, token_tile) : 0;
  return member_floats(tokens, rank, token_tile, splits) + counters;
}

// t and rows of up in shared memory: bytes between rows of 16-bit values. 64 bytes past a multiple of 128: the eight
// lanes of a phase read two rows of four vectors each and touch every bank once.
LRO_HD constexpr int64_t rank_pitch(int64_t rank) { return round_up(rank * 2, 128) + 64; }

// decode_sm90's scratch of a member: t (tokens, rank) in the dtype of x.
LRO_HD constexpr int64_t t_floats(int64_t tokens, int64_t rank) { return ceil_div(tokens * rank, 2); }

// ---- decode_sm90: distribution of work over clusters and CTAs ----

// The features of down that a CTA of the cluster sums; empty past the last.
LRO_HD constexpr Span features_of_cta(int cluster_rank, int64_t split_features, int64_t in_features) {
  const int64_t begin = min64(cluster_rank * split_features, in_features);
  return {begin, min64(begin + split_features, in_features)};
}

// Work units of down: `rows` rows and a token tile each, all rows of a token tile before the next tile.
struct WorkUnit {
  int64_t first_row, first_token;
};
LRO_HD constexpr int64_t work_units(int64_t rank, int rows, int64_t tokens, int token_tile) {
  return ceil_div(rank, rows) * ceil_div(tokens, token_tile);
}
LRO_HD constexpr WorkUnit work_unit_at(int64_t unit, int64_t rank, int rows, int token_tile) {
  const int64_t tiles = ceil_div(rank, rows);
  return {unit % tiles * rows, unit / tiles * token_tile};
}

// The part of a unit's `sums` that a CTA of the cluster reduces and stores.
LRO_HD constexpr Span sums_of_cta(int cluster_rank, int cluster, int sums) {
  const int share = sums / cluster;
  return {cluster_rank * share, (cluster_rank + 1) * share};
}
// A CTA's sum i of a unit, in two buffers by turns: one is read by the cluster while the next is written.
LRO_HD constexpr int cta_sum_index(int round, int i, int sums) { return round % 2 * sums + i; }

// Those of `tiles`, the 16-row tiles of up of all members, that a CTA multiplies.
LRO_HD constexpr Span slab_of_cta(int64_t cta, int64_t ctas, int64_t tiles) {
  return {cta * tiles / ctas, (cta + 1) * tiles / ctas};
}

// Byte offsets in decode_sm90's dynamic shared memory; the slab's mbarrier is at 0. What only one of the GEMMs uses
// lies in the same place: the grid barrier is between them.
struct SmemLayout {
  int64_t warp_sums;  // sum_index, of either GEMM
  int64_t cta_sums;   // of down: cta_sum_index
  int64_t t;          // of up: (token, rank), rows rank_pitch apart
  int64_t slab;       // (row, rank), rows rank_pitch apart
  int64_t bytes;
};
LRO_HD constexpr SmemLayout smem_layout(int rows_down, int token_tile, int64_t rank, int64_t resident_tiles) {
  SmemLayout at{};
  at.warp_sums = 128;
  at.cta_sums = at.warp_sums + sum_bytes(rows_down, token_tile);
  at.t = at.warp_sums + sum_bytes(kRows, token_tile);
  at.slab = max64(at.cta_sums + int64_t{4} * 2 * rows_down * token_tile, at.t + token_tile * rank_pitch(rank));
  at.bytes = at.slab + resident_tiles * kRows * rank_pitch(rank);
  return at;
}

}  // namespace lowrank_ops::lowrank_linear
