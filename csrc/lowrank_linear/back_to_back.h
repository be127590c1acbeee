// Index arithmetic of the sm_90 prefill kernel.
//
// A cluster takes 128 or 192 tokens. Its blocks bring x to each other, share the columns of t = x down^T, exchange them,
// and share the rows of up. Or its blocks are peers, which take 128 tokens each and bring each other the weights: many tokens read them from L2
// once for two tiles. Operands lie in shared memory as the tensor copy engine writes them with the 128-byte swizzle: a row's 64 values in
// 128 bytes, whose 16-byte chunks are permuted by the row modulo 8. t never does: what a thread has summed is, rounded,
// what it has to hold of the next product's left operand.
#pragma once

#include "../host_device.h"

namespace lowrank_ops::lowrank_linear::prefill {

constexpr int kGroupTokens = 64;  // of a warpgroup
constexpr int kBox = 64;         // values of a row per box
constexpr int kRowBytes = kBox * 2;
constexpr int kOutputs = 64;     // rows of up at a time
constexpr int kStep = 16;        // values that one wgmma sums
constexpr int kMostRank = 256;
constexpr int kMostStages = 6;
constexpr int kAlignment = 1024;  // the swizzle repeats every 1024 bytes
constexpr int kSharedLimit = 232448;

// Ranks are served by the next of these, and the fastest kernel of it or of a larger one; past the rank, the copy engine
// brings zeros.
constexpr int kLeastRanks = 64;
LRO_HD constexpr int rank_tile(int64_t rank) {
  return static_cast<int>(greatest(kLeastRanks, round_up(rank, kStep)));
}

// One of the kernels there are.
struct Variant {
  int ranks;
  int cluster;
  int groups;  // warpgroups that multiply
  int peers = 1;  // blocks of a cluster with tokens of their own

  LRO_HD constexpr int tokens() const { return groups * kGroupTokens; }
  LRO_HD constexpr int consumers() const { return groups * 128; }
  // Of the warp that brings the operands; where registers are to be handed over, of its whole warpgroup.
  LRO_HD constexpr int threads() const { return consumers() + (groups == 3 ? 128 : 32); }
  // Of t that a block sums; past the last the copy engine brings zeros here, too.
  LRO_HD constexpr int columns() const { return static_cast<int>(round_up(ceil_div(ranks, cluster), kStep)); }
  LRO_HD constexpr int steps() const { return ranks / kStep; }  // of the product with up
};
constexpr int kGroups[] = {2, 3};
constexpr int kMostPeers = 2;
constexpr int kMostTileTokens = 2 * kMostPeers * kGroupTokens;  // of a cluster
// A quarter of a multiprocessor has 16384 registers for one warp of each of four warpgroups: three that multiply, with
// 160 for a thread, and one that does not.
constexpr int kRegisters = 160, kProducerRegisters = 32;

// Whether there is a kernel for it: a thread has registers for the sums of 192 columns, of 128 where three warpgroups
// share them, and a block of a cluster sums 32 to 128 of them, 64 at least where three warpgroups do. Peers have all
// columns each. Between multiples of 64 there are ranks from 144 on, for clusters of up to two.
LRO_HD constexpr bool exists(Variant v) {
  if (v.ranks < kLeastRanks || v.ranks > kMostRank || v.ranks % kStep != 0 || v.groups < 2 || v.groups > 3) return false;
  if (v.ranks % 64 != 0 && (v.ranks < 128 || v.cluster > 2)) return false;
  if (v.peers != 1 && (v.peers != kMostPeers || v.cluster != 1 || v.groups != 2)) return false;
  if (v.cluster == 1) return v.ranks <= (v.groups == 2 ? 192 : 128);
  return (v.cluster == 2 || v.cluster == 4 || v.cluster == 8) && (v.ranks != 192 || v.cluster == 2) &&
         v.columns() >= (v.groups == 2 ? 32 : 64);
}

// A stage holds 64 features of x and, behind them, of a block's rows of down; or 64 rows of up, all ranks.
LRO_HD constexpr int x_bytes(int groups) { return groups * kGroupTokens * kRowBytes; }
constexpr int kUpBoxBytes = kOutputs * kRowBytes;
// What blocks have in common, each brings so many rows of, whole patterns of the swizzle.
LRO_HD constexpr int x_box_rows(Variant v) { return v.tokens() / v.cluster; }
LRO_HD constexpr int down_box_rows(Variant v) { return v.columns() / v.peers; }
LRO_HD constexpr int up_box_rows(Variant v) { return kOutputs / v.peers; }
LRO_HD constexpr int down_step_bytes(Variant v) { return x_bytes(v.groups) + v.columns() * kRowBytes; }
LRO_HD constexpr int up_boxes(int ranks) { return static_cast<int>(ceil_div(ranks, kBox)); }
LRO_HD constexpr int up_step_bytes(int ranks) { return up_boxes(ranks) * kUpBoxBytes; }
LRO_HD constexpr int stage_bytes(Variant v) {
  return static_cast<int>(greatest(down_step_bytes(v), up_step_bytes(v.ranks)));
}
// What the blocks of a cluster send each other: t, rounded, 16 bytes per thread and step.
LRO_HD constexpr int exchange_bytes(Variant v) { return v.cluster == 1 ? 0 : v.tokens() * v.ranks * 2; }
LRO_HD constexpr int stages(Variant v) {
  return static_cast<int>(
      least(kMostStages, (kSharedLimit - kAlignment - kMostStages * 16 - exchange_bytes(v)) / stage_bytes(v)));
}
LRO_HD constexpr int exchange_offset(Variant v) { return stages(v) * stage_bytes(v); }
LRO_HD constexpr int barrier_offset(Variant v) { return exchange_offset(v) + exchange_bytes(v); }
LRO_HD constexpr int shared_bytes(Variant v) { return kAlignment + barrier_offset(v) + stages(v) * 16; }

// Where a step of 16 summed values starts in an operand: rows of a warpgroup of x, all rows of down, of up.
LRO_HD constexpr int x_start(int warpgroup, int step) { return warpgroup * 64 * kRowBytes + step * kStep * 2; }
LRO_HD constexpr int down_start(int step, int groups) { return x_bytes(groups) + step * kStep * 2; }
LRO_HD constexpr int up_start(int step) { return step / 4 * kUpBoxBytes + step % 4 * kStep * 2; }

// A shared memory descriptor for operands whose summed values are contiguous, with the 128-byte swizzle. Offsets count
// 16 bytes: the stride one from 8 rows to the next; the leading one is not used, as no row is longer than the swizzle.
LRO_HD constexpr uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{8 * kRowBytes / 16} << 32;
  return kSwizzle128 | kStride | uint64_t{1} << 16 | ((address & 0x3FFFF) >> 4);
}

// Where accumulator i of a consumer lies: its token and its column.
LRO_HD constexpr int accumulator_token(int consumer, int i) {
  return consumer / 32 * 16 + consumer % 32 / 4 + i / 2 % 2 * 8;
}
LRO_HD constexpr int accumulator_column(int consumer, int i) { return i / 4 * 8 + consumer % 4 * 2 + i % 2; }
// Which of a consumer's columns, counted from 0, that is.
LRO_HD constexpr int bias_of_accumulator(int i) { return i / 4 * 2 + i % 2; }

// Word w (0..3) of a step's left operand holds two neighbouring columns of t: these accumulators, the lower one first.
LRO_HD constexpr int accumulator_of_word(int step, int w) { return step * 8 + w * 2; }

// Bytes from the start of the exchange to what a consumer holds of a step.
LRO_HD constexpr int exchange_index(int consumer, int step, int ranks) {
  return ((consumer / 32 * (ranks / kStep) + step) * 32 + consumer % 32) * 16;
}
// The first step whose columns block `rank` of a cluster has summed.
LRO_HD constexpr int first_step(int rank, int columns) { return rank * (columns / kStep); }

// The n-th tile of 64 rows of up that block `rank` multiplies.
LRO_HD constexpr int64_t up_tile(int rank, int n, int cluster) { return int64_t{n} * cluster + rank; }
LRO_HD constexpr int up_tiles(int rank, int cluster, int64_t out_features) {
  return static_cast<int>(ceil_div(greatest(0, ceil_div(out_features, kOutputs) - rank), cluster));
}

// To store 16 bytes at a time, the four lanes that share a token transpose the words that they hold of 32 columns, in two
// rounds of two exchanges: a lane gives one word of a pair to the lane `1 << round` away, for that lane's other one.
LRO_HD constexpr int lower_word(int round, int exchange) { return round == 0 ? exchange * 2 : exchange; }
LRO_HD constexpr int upper_word(int round, int exchange) { return lower_word(round, exchange) + (1 << round); }
LRO_HD constexpr bool gives_lower(int lane, int round) { return (lane >> round & 1) != 0; }

}  // namespace lowrank_ops::lowrank_linear::prefill
