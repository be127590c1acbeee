// Index arithmetic of the sm_80 decode pair: which rows, which features, which bytes a thread holds.
//
// Both products have few tokens, so the weights are the 16-row operand of m16n8k16 and the tokens its 8 columns. The
// order of the summed features inside a product is free as long as both operands agree on it: a thread takes 8
// features that lie together, 16 bytes, and gives the first four to one product and the last four to the next. So
// weights go from memory to the tensor cores without passing through shared memory.
#pragma once

#include "../host_device.h"

namespace lowrank_ops::lowrank_linear {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;           // rows of a weight per product
constexpr int kFeatures = 32;       // features per step: two products of 16
constexpr int kVector = 8;          // features in 16 bytes
constexpr int kMostTokens = 64;       // that the decode kernels get
constexpr int kMostAskedTokens = 256;  // and where they are asked for by name: no more than a few tiles of 64

// The features that a lane holds of a step, for weights and tokens alike.
LRO_HD constexpr int lane_feature(int lane) { return lane % 4 * kVector; }
// The first row of the weight that a lane holds; the second is 8 below.
LRO_HD constexpr int lane_row(int lane) { return lane / 4; }
// The token, of a group of 8, that a lane feeds.
LRO_HD constexpr int lane_token(int lane) { return lane / 4; }

// Tokens per block: all of them, in whole groups of 8, or as many as the accumulators of a warp can take.
LRO_HD constexpr int decode_token_tile(int64_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
}

// Element e (0..3) of an accumulator: a row of the weight and a token of its group of 8.
LRO_HD constexpr int accumulator_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
LRO_HD constexpr int accumulator_token(int lane, int e) { return lane % 4 * 2 + e % 2; }

// Steps are dealt to the warps in turn, a warp's are `i` = 0, 1, ...
LRO_HD constexpr int step_of_warp(int warp, int i) { return warp + i * kWarps; }

// 16-row products of up per block of the second kernel: with more tokens t is longer to read, so it serves more rows.
LRO_HD constexpr int up_products(int token_tile) { return token_tile == 8 ? 1 : 2; }

// The warps' sums meet in shared memory: (warp, row, token), tokens padded so that rows start in different banks.
LRO_HD constexpr int sum_index(int warp, int row, int token, int rows, int token_tile) {
  return (warp * rows + row) * (token_tile + 1) + token;
}
LRO_HD constexpr int64_t sum_bytes(int rows, int token_tile) {
  return int64_t{4} * sum_index(kWarps, 0, 0, rows, token_tile);
}

// Scratch: partial sums of t, (split, token, rank).
LRO_HD constexpr int64_t partial_index(int64_t split, int64_t token, int64_t r, int64_t tokens, int64_t rank) {
  return (split * tokens + token) * rank + r;
}

// t, and rows of up, in shared memory: bytes between rows of 16-bit values. 64 bytes past a multiple of 128 let the
// eight lanes that read 16 bytes each in one go, two rows of four, touch all banks once.
LRO_HD constexpr int64_t padded_rank(int64_t rank) { return round_up(rank, kFeatures); }
LRO_HD constexpr int64_t rank_pitch(int64_t rank) { return round_up(rank * 2, 128) + 64; }

}  // namespace lowrank_ops::lowrank_linear
