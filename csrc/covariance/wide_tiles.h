// Index arithmetic of the wide sm_90 covariance kernel, where it differs from wgmma_tiles.h.
//
// A cluster of two CTAs owns a tile of 256 x 256: each CTA 128 rows and all columns. Both need the columns, so each CTA
// multicasts half of them to both. Per token a CTA loads as much as for a tile of 128 x 128 and does twice the MMAs.
#pragma once

#include "wgmma_tiles.h"

namespace lowrank_ops::covariance::wide {

using wgmma::kTmaBytes, wgmma::kTmaFeatures, wgmma::kMmaK, wgmma::kTokens;

constexpr int kTile = 256;
constexpr int kClusterCtas = 2;
constexpr int kRows = kTile / kClusterCtas;  // of a CTA
constexpr int kColumnTmaTiles = kTile / kTmaFeatures;
constexpr int kRowTmaTiles = kRows / kTmaFeatures;
constexpr int kColumnBytes = kColumnTmaTiles * kTmaBytes;
constexpr int kStageBytes = kColumnBytes + kRowTmaTiles * kTmaBytes;  // columns, then rows
constexpr int kStages = 4;
constexpr int kConsumers = wgmma::kConsumers;  // two warpgroups, each 64 rows
constexpr int kThreads = kConsumers + 128;     // and the producer's warpgroup, whose registers the consumers get
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
constexpr int kAccumulators = kRows * kTile / kConsumers;
// 4096 tokens, twice as many as elsewhere: with one CTA per SM nothing overlaps the epilogue.
constexpr int kChunkSteps = 4096 / kTokens;
constexpr int kSharedBytes = kStages * kStageBytes + arch::kSwizzleAlignment + 2 * kStages * 8;

// Offset in a stage of 16 tokens of a warpgroup's rows. On the diagonal the rows are among the columns and only there.
LRO_HD constexpr int a_offset(bool diagonal, int cluster_rank, int warpgroup, int k) {
  return ((diagonal ? cluster_rank * kRowTmaTiles : kColumnTmaTiles) + warpgroup) * kTmaBytes + k * kMmaK * 128;
}
// Byte offset of one of a CTA's rows in a stage on the diagonal.
LRO_HD constexpr int row_offset(int cluster_rank, int token, int row) {
  return wgmma::feature_offset(token, cluster_rank * kRows + row);
}

// A cluster's work: the first `whole` clusters take a tile each with all tokens, the others share the remaining tiles,
// `splits` clusters per tile.
struct Share {
  int64_t tile;
  int64_t split_tile;  // number of the tile among the split ones; negative: it is not split
  int64_t split;
};
LRO_HD constexpr Share share_of_cluster(int64_t cluster, int64_t whole, int64_t splits) {
  if (cluster < whole) return {cluster, -1, 0};
  return {whole + (cluster - whole) / splits, (cluster - whole) / splits, (cluster - whole) % splits};
}
LRO_HD constexpr int64_t clusters(int64_t tiles, int64_t whole, int64_t splits) {
  return whole + (tiles - whole) * splits;
}

}  // namespace lowrank_ops::covariance::wide
