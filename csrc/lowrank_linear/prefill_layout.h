// The variants of the sm_90 prefill kernel and its index arithmetic.
//
// Operands lie in shared memory as TMA writes them with the 128-byte swizzle: 64 values of a row in 128 bytes. t stays
// in registers: a thread's accumulators, rounded, are its part of the A operand of the next MMA.
#pragma once

#include "../arch/fragment.h"

namespace lowrank_ops::lowrank_linear::prefill {

constexpr int kWarpgroupTokens = 64;
constexpr int kTileK = 64;  // values of K per TMA tile
constexpr int kRowBytes = kTileK * 2;
constexpr int kTileN = 64;  // rows of up at a time
constexpr int kMmaK = 16;
constexpr int kMaxRank = 256;
constexpr int kMaxStages = 6;
constexpr int kSharedLimit = 232448;  // bytes that a CTA may opt in to on sm_90
// An SM quarter has 16384 registers for one warp of each of four warpgroups: three consumers with 160 per thread and
// one producer.
constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;

struct Variant {
  int rank_tile;   // ranks that are computed; TMA reads zeros past the last
  int cluster;     // CTAs that share a token tile: each loads part of x, sums part of t, multiplies part of up
  int warpgroups;  // consumers, of 64 tokens each
  int peers;       // CTAs with a token tile each that multicast each other the weights; then cluster is 1

  LRO_HD constexpr int ctas() const { return cluster * peers; }                      // of a cluster
  LRO_HD constexpr int cta_tokens() const { return warpgroups * kWarpgroupTokens; }  // of a CTA
  LRO_HD constexpr int token_tile() const { return cta_tokens() * peers; }           // of a cluster
  LRO_HD constexpr int consumers() const { return warpgroups * 128; }                // threads
  LRO_HD constexpr bool moves_registers() const { return warpgroups == 3; }          // by setmaxnreg
  LRO_HD constexpr int threads() const { return consumers() + (moves_registers() ? 128 : 32); }
  // Columns of t that a CTA sums; past the rank TMA reads zeros here, too.
  LRO_HD constexpr int columns() const { return static_cast<int>(round_up(ceil_div(rank_tile, cluster), kMmaK)); }
  LRO_HD constexpr int steps() const { return rank_tile / kMmaK; }  // of the MMAs with up
};

// Every kernel there is, by ascending rank. The planner takes the one with the lowest cost, a tuned table names a
// cluster and a token tile. A thread has registers for 192 accumulator columns, for 128 with three warpgroups; a CTA of
// a cluster sums 32 to 128 columns, 64 at least with three warpgroups. The planner never finds a kernel of 128 tokens
// without cluster and peers cheaper than a pair of them, so there is none.
// clang-format off
constexpr Variant kVariants[] = {
    // rank tile, cluster, warpgroups, peers
    {64, 1, 3, 1},  {64, 1, 2, 2},  {64, 2, 2, 1},
    {128, 1, 3, 1}, {128, 1, 2, 2}, {128, 2, 2, 1}, {128, 2, 3, 1}, {128, 4, 2, 1},
    {144, 1, 2, 2}, {144, 2, 3, 1},
    {160, 1, 2, 2}, {160, 2, 3, 1},
    {176, 1, 2, 2}, {176, 2, 3, 1},
    {192, 1, 2, 2}, {192, 2, 2, 1}, {192, 2, 3, 1},
    {208, 2, 3, 1}, {224, 2, 3, 1}, {240, 2, 3, 1},
    {256, 2, 2, 1}, {256, 2, 3, 1}, {256, 4, 2, 1}, {256, 4, 3, 1}, {256, 8, 2, 1},
};
// clang-format on
constexpr int kMaxTokenTile = 256;

// ---- shared memory ----

// A stage holds 64 features of x and, behind them, of the CTA's rows of down; or 64 rows of up, all ranks.
LRO_HD constexpr int x_bytes(Variant v) { return v.cta_tokens() * kRowBytes; }
LRO_HD constexpr int down_step_bytes(Variant v) { return x_bytes(v) + v.columns() * kRowBytes; }
constexpr int kUpTileBytes = kTileN * kRowBytes;
LRO_HD constexpr int up_tiles_k(Variant v) { return static_cast<int>(ceil_div(v.rank_tile, kTileK)); }
LRO_HD constexpr int up_step_bytes(Variant v) { return up_tiles_k(v) * kUpTileBytes; }
LRO_HD constexpr int stage_bytes(Variant v) { return static_cast<int>(max64(down_step_bytes(v), up_step_bytes(v))); }
// Rows per TMA tile. Of a shared operand each CTA loads an equal part, whole repetitions of the swizzle.
LRO_HD constexpr int x_tile_rows(Variant v) { return v.cta_tokens() / v.cluster; }
LRO_HD constexpr int down_tile_rows(Variant v) { return v.columns() / v.peers; }
LRO_HD constexpr int up_tile_rows(Variant v) { return kTileN / v.peers; }

// The exchange of t between the CTAs of a cluster: rounded, 16 bytes per thread and step.
LRO_HD constexpr int exchange_bytes(Variant v) { return v.cluster == 1 ? 0 : v.cta_tokens() * v.rank_tile * 2; }
LRO_HD constexpr int stages(Variant v) {
  const int free_bytes = kSharedLimit - arch::kSwizzleAlignment - kMaxStages * 16 - exchange_bytes(v);
  return static_cast<int>(min64(kMaxStages, free_bytes / stage_bytes(v)));
}
LRO_HD constexpr int exchange_offset(Variant v) { return stages(v) * stage_bytes(v); }
LRO_HD constexpr int mbarrier_offset(Variant v) { return exchange_offset(v) + exchange_bytes(v); }
LRO_HD constexpr int shared_bytes(Variant v) { return arch::kSwizzleAlignment + mbarrier_offset(v) + stages(v) * 16; }

// Offset in a stage of the operand of one MMA: rows of a warpgroup of x, all rows of down, of up.
LRO_HD constexpr int x_offset(int warpgroup, int k) { return warpgroup * 64 * kRowBytes + k * kMmaK * 2; }
LRO_HD constexpr int down_offset(Variant v, int k) { return x_bytes(v) + k * kMmaK * 2; }
LRO_HD constexpr int up_offset(int k) { return k / 4 * kUpTileBytes + k % 4 * kMmaK * 2; }

// ---- registers ----

// The column of an accumulator among the thread's own, counted from 0.
LRO_HD constexpr int bias_of_accumulator(int i) { return i / 4 * 2 + i % 2; }
// Word w (0 to 3) of the A operand of a step holds two neighboring columns of t: these accumulators, the lower one
// first.
LRO_HD constexpr int accumulator_of_word(int step, int w) { return step * 8 + w * 2; }
// Offset in the exchange of a consumer's A operand of a step.
LRO_HD constexpr int exchange_index(int consumer, int step, int rank_tile) {
  return ((consumer / 32 * (rank_tile / kMmaK) + step) * 32 + consumer % 32) * 16;
}
// The first step whose columns this CTA of the cluster has summed.
LRO_HD constexpr int first_step(int cluster_rank, int columns) { return cluster_rank * (columns / kMmaK); }

// The n-th tile of 64 rows of up of a CTA of the cluster, and how many it has.
LRO_HD constexpr int64_t up_tile(int cluster_rank, int n, int cluster) { return int64_t{n} * cluster + cluster_rank; }
LRO_HD constexpr int up_tiles(int cluster_rank, int cluster, int64_t out_features) {
  return static_cast<int>(ceil_div(max64(0, ceil_div(out_features, kTileN) - cluster_rank), cluster));
}

// To store 16 bytes at a time, the four lanes that share a token transpose their words of 32 columns in two rounds of
// two exchanges: a lane swaps one word of a pair with the lane `1 << round` away.
LRO_HD constexpr int lower_word(int round, int exchange) { return round == 0 ? exchange * 2 : exchange; }
LRO_HD constexpr int upper_word(int round, int exchange) { return lower_word(round, exchange) + (1 << round); }
LRO_HD constexpr bool gives_lower(int lane, int round) { return (lane >> round & 1) != 0; }

}  // namespace lowrank_ops::lowrank_linear::prefill
